# SPDX-License-Identifier: Apache-2.0
"""Imported encoders, against torchvision's programs written out in [N, C, H, W]."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tinyrun

from jaxprune import models
from jaxprune.base import CheckpointError, ConfigError
from jaxprune.train import stages
from jaxprune.train.config import Config, Data, Network, Prune

# Places of convolutions in torchvision's vgg16 and vgg16_bn, from its published state
# dicts.
VGG = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_BN = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
WIDTHS = (4, 6, 6, 6, 6)
COUNTS = (2, 2, 3, 3, 3)
STAGES = [s for s, count in enumerate(COUNTS) for _ in range(count)]
NORM = {
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def conv_state(rng, name, out, read, window, bias):
    state = {f"{name}.weight": rng.normal(size=(out, read, window, window)) * 0.3}
    if bias:
        state[f"{name}.bias"] = rng.normal(size=out)
    return state


def norm_state(rng, name, out):
    return {
        f"{name}.weight": rng.normal(size=out),
        f"{name}.bias": rng.normal(size=out),
        f"{name}.running_mean": rng.normal(size=out),
        f"{name}.running_var": rng.uniform(0.5, 2, size=out),
    }


def vgg_state(norm, widths=WIDTHS):
    rng, state, read = np.random.default_rng(0), {}, 3
    for n, stage in zip(VGG_BN if norm else VGG, STAGES, strict=True):
        out = widths[stage]
        state |= conv_state(rng, f"features.{n}", out, read, 3, True)
        if norm:
            state |= norm_state(rng, f"features.{n + 1}", out)
        read = out
    return {k: v.astype(np.float32) for k, v in state.items()}


def with_dense(state, read=6, widths=(8, 10)):
    """VGG's first two dense layers, which FCN takes as convolutions, of 7x7 and 1x1."""
    rng, sizes = np.random.default_rng(3), (read * 49, *widths)
    for n, i in ((0, 0), (3, 1)):
        weight = rng.normal(size=(sizes[i + 1], sizes[i])).astype(np.float32)
        state[f"classifier.{n}.weight"] = weight
        state[f"classifier.{n}.bias"] = rng.normal(size=len(weight)).astype(np.float32)
    return state


def resnet_state(depth=2, basic=False):
    rng = np.random.default_rng(1)
    state = conv_state(rng, "conv1", 4, 3, 7, False) | norm_state(rng, "bn1", 4)
    read = 4
    for layer, out in enumerate((8, 8, 12, 12), 1):
        for b in range(depth):
            name, inner = f"layer{layer}.{b}", out // 4
            sizes = ((inner, read, 1), (inner, inner, 3), (out, inner, 1))
            sizes = ((out, read, 3), (out, out, 3)) if basic else sizes
            for i, size in enumerate(sizes, 1):
                state |= conv_state(rng, f"{name}.conv{i}", *size, False)
                state |= norm_state(rng, f"{name}.bn{i}", size[0])
            if b == 0:
                state |= conv_state(rng, f"{name}.downsample.0", out, read, 1, False)
                state |= norm_state(rng, f"{name}.downsample.1", out)
            read = out
    return {k: v.astype(np.float32) for k, v in state.items()}


def windows(x, size, stride, dilation=1):
    """Of [N, C, H, W] every window: [N, C, H', W', size, size]."""
    reach = dilation * (size - 1) + 1
    found = np.lib.stride_tricks.sliding_window_view(x, (reach, reach), axis=(2, 3))
    return found[:, :, ::stride, ::stride, ::dilation, ::dilation]


def padded(x, by, value=0.0):
    return np.pad(x, ((0, 0), (0, 0), (by, by), (by, by)), constant_values=value)


def conv(state, name, x, stride=1, dilation=1):
    """torch.nn.Conv2d, padded by half its window."""
    w = np.float64(state[f"{name}.weight"])
    x = padded(x, dilation * (w.shape[-1] // 2))
    y = np.einsum("nchwij,ocij->nohw", windows(x, w.shape[-1], stride, dilation), w)
    return y + state.get(f"{name}.bias", np.zeros(len(w)))[:, None, None]


def norm(state, name, x):
    """torch.nn.BatchNorm2d in eval mode."""
    w, b, mean, var = (
        np.float64(state[f"{name}.{k}"])[:, None, None]
        for k in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * w + b


def pool(x, size, by=0):
    """torch.nn.MaxPool2d of stride 2."""
    return windows(padded(x, by, -np.inf), size, 2).max(axis=(-1, -2))


def images(size=(16, 24)):
    return np.random.default_rng(2).random((2, *size, 3), np.float32)


def inside(net, variables, x):
    """{module: what it answers, as [N, C, H, W]}, but for the network as a whole."""

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(variables, x):
        own = {"capture_intermediates": lambda m, _: m.name is not None}
        return net.apply(variables, x, **own)[1]["intermediates"]

    answers = {n: a["__call__"] for n, a in run(variables, x).items() if n[0] != "_"}
    return {n: np.asarray(a).transpose(0, 3, 1, 2) for n, (a,) in answers.items()}


def assert_near(given, want):
    np.testing.assert_allclose(given, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@functools.cache
def untrained(name, args):
    """The network, and zeros for its variables."""
    net = models.build(name, {"num_classes": 3, **dict(args)})
    shapes = jax.eval_shape(net.init, jax.random.key(0), images())
    return net, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def imported(name, args, state, tmp_path, suffix=".npz", **more):
    net, variables = untrained(name, tuple(args.items()))
    file = tmp_path / f"state{suffix}"
    if suffix == ".npz":
        np.savez(file, **state)
    else:
        safetensors.numpy.save_file(state, file)
    return net, variables, models.import_encoder(net, variables, file, **more)


def vgg_places(normed):
    """(our convolution, our norm, theirs, their norm or None), in VGG's order."""
    places, index = [], {}
    for n, stage in zip(VGG_BN if normed else VGG, STAGES, strict=True):
        i = index[stage] = index.get(stage, 0) + 1
        own = f"features.{n + 1}" if normed else None
        name = f"encoder{stage + 1}"
        places.append((f"{name}_conv{i}", f"{name}_bn{i}", f"features.{n}", own))
    return places


def resnet_places(depth=2):
    """The same; the fourth of each stage's first block is the projection."""
    places = [("stem_conv1", "stem_bn1", "conv1", "bn1")]
    for layer, block, i in itertools.product(range(1, 5), range(depth), range(1, 5)):
        own, their = f"stage{layer + 1}_block{block + 1}", f"layer{layer}.{block}"
        names = (f"{their}.conv{i}", f"{their}.bn{i}")
        if i == 4:
            names = (f"{their}.downsample.0", f"{their}.downsample.1")
        if i < 4 or block == 0:
            places.append((f"{own}_conv{i}", f"{own}_bn{i}", *names))
    return places


RESNETS = {
    "deeplab": (4, 8, 8, 12, 12) + (4,) * 3,
    "refinenet": (4, 8, 8, 12, 12) + (4,) * 4,
}
DENSE = [
    ("fc_conv6", "fc_bn6", "classifier.0", None),
    ("fc_conv7", "fc_bn7", "classifier.3", None),
]
IMPORTS = {
    "segnet-vgg16_bn": (
        "segnet",
        {"widths": WIDTHS},
        vgg_state(True),
        vgg_places(True),
    ),
    "segnet-vgg16": ("segnet", {"widths": WIDTHS}, vgg_state(False), vgg_places(False)),
    "fcn-vgg16": (
        "fcn",
        {"widths": (*WIDTHS, 8, 10)},
        with_dense(vgg_state(False)),
        vgg_places(False) + DENSE,
    ),
    **{
        f"{name}-resnet": (
            name,
            {"widths": widths, "depths": (2,) * 4},
            resnet_state(),
            resnet_places(),
        )
        for name, widths in RESNETS.items()
    },
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("case", IMPORTS)
def test_every_array_of_the_file_is_found_at_its_place(tmp_path, case, suffix):
    """And none at two: all of them differ, also where shapes are equal."""
    name, args, state, places = IMPORTS[case]
    assert len({x.tobytes() for x in state.values()}) == len(state)
    # The published files hold these, too.
    more = {"fc.bias": np.ones(9), "bn1.num_batches_tracked": np.array(7)}
    _, before, after = imported(name, args, state | more, tmp_path, suffix, **PLAIN)
    left = dict(state)
    for own, own_norm, their, their_norm in places:
        kernel = np.asarray(after["params"][own]["kernel"])
        wanted = left.pop(f"{their}.weight")
        height, width, read, out = kernel.shape
        wanted = wanted.reshape(out, read, height, width).transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(kernel, wanted)
        bias = left.pop(f"{their}.bias", np.zeros(out))
        np.testing.assert_array_equal(after["params"][own]["bias"], bias)
        found = after["params"][own_norm] | after["batch_stats"][own_norm]
        if their_norm is None:  # one that changes nothing, by Flax's epsilon of 1e-5
            same = {"scale": 1, "bias": 0, "mean": 0, "var": np.float32(1 - 1e-5)}
            assert all((found[k] == v).all() for k, v in same.items())
        else:
            for key, theirs in NORM.items():
                vector = left.pop(f"{their_norm}.{theirs}")
                np.testing.assert_array_equal(found[key], vector)
    assert not left
    imports = ("encoder", "fc", "stem", "stage")
    mine = {n for n in before["params"] if n.startswith(imports)}
    assert mine == {n for place in places for n in place[:2]}
    # What is no encoder stays, and all keep their dtypes.
    for collection, tree in before.items():
        for module, leaves in tree.items():
            for key, leaf in leaves.items():
                given = after[collection][module][key]
                assert given.dtype == leaf.dtype and given.shape == leaf.shape
                assert module in mine or given is leaf, (module, key)


@pytest.mark.parametrize("normed", [True, False])
def test_segnet_computes_what_vgg_does(tmp_path, normed):
    state, x = vgg_state(normed), images((32, 64))
    net, _, variables = imported("segnet", {"widths": WIDTHS}, state, tmp_path, **PLAIN)
    given, before = inside(net, variables, x), STAGES[0]
    y = np.float64(x).transpose(0, 3, 1, 2)
    for (_, ours, name, own), stage in zip(vgg_places(normed), STAGES, strict=True):
        y = pool(y, 2) if stage != before else y
        y, before = conv(state, name, y), stage
        y = norm(state, own, y) if normed else y
        assert_near(given[ours], y)
        y = np.maximum(y, 0)
    assert y.shape == (2, 6, 2, 4)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_weights_in_16_bits_are_read(tmp_path, kind):
    state = {k: x.astype(jnp.dtype(kind)) for k, x in vgg_state(False).items()}
    args = {"widths": WIDTHS}
    _, _, got = imported("segnet", args, state, tmp_path, ".safetensors", **PLAIN)
    wanted = {k: np.float32(x) for k, x in state.items()}
    _, _, want = imported("segnet", args, wanted, tmp_path, **PLAIN)
    chex.assert_trees_all_equal(got, want)


def test_the_mean_and_deviation_of_images_are_folded_in(tmp_path):
    """Exactly, but in the row of pixels at the edge."""
    state = vgg_state(True)
    net, _, variables = imported("segnet", {"widths": WIDTHS}, state, tmp_path)
    x = images()
    # ImageNet's, as torchvision documents them.
    y = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    y = conv(state, "features.0", y.transpose(0, 3, 1, 2))
    y = norm(state, "features.1", y)[..., 1:-1, 1:-1]
    assert_near(inside(net, variables, x)["encoder1_bn1"][..., 1:-1, 1:-1], y)


def test_fcn_takes_the_dense_layers_as_convolutions(tmp_path):
    state, args = with_dense(vgg_state(False)), {"widths": (*WIDTHS, 8, 10)}
    _, _, variables = imported("fcn", args, state, tmp_path)
    # Of a 7x7 image both answer alike: torch flattens channels first.
    x = np.random.default_rng(4).normal(size=(7, 7, 6))
    for name, their in (("fc_conv6", "classifier.0"), ("fc_conv7", "classifier.3")):
        layer = variables["params"][name]
        want = state[f"{their}.weight"] @ x.transpose(2, 0, 1).ravel()
        want += state[f"{their}.bias"]
        x = np.einsum("hwi,hwio->o", x, np.float64(layer["kernel"])) + layer["bias"]
        np.testing.assert_allclose(x, want, rtol=1e-4)
        x = x[None, None]


@pytest.mark.parametrize("name", RESNETS)
def test_backbones_compute_what_resnet_does(tmp_path, name):
    """All of its 29 convolutions; DeepLab's last stage is dilated, not strided."""
    state, x = resnet_state(), images((64, 64))
    args = {"widths": RESNETS[name], "depths": (2,) * 4}
    net, _, variables = imported(name, args, state, tmp_path, **PLAIN)
    given = inside(net, variables, x)

    def normed(place, y, *how):
        _, ours, conv_name, norm_name = place
        y = norm(state, norm_name, conv(state, conv_name, y, *how))
        assert_near(given[ours], y)
        return y

    stem, *places = resnet_places()
    y = normed(stem, np.float64(x).transpose(0, 3, 1, 2), 2)
    y = pool(np.maximum(y, 0), 3, 1)
    places = iter(places)

    def stage(y, places, normed, strides, dilations):
        for block, (stride, dilation) in enumerate(zip(strides, dilations)):
            z = np.maximum(normed(next(places), y), 0)
            z = np.maximum(normed(next(places), z, stride, dilation), 0)
            z = normed(next(places), z)
            y = normed(next(places), y, stride) if block == 0 else y
            y = np.maximum(y + z, 0)
        return y

    for layer in range(1, 4):
        y = stage(y, places, normed, (2 if layer > 1 else 1, 1), (1, 1))
    places = list(places)  # of the last stage
    dilated = name == "deeplab"
    how = ((1, 1), (1, 2)) if dilated else ((2, 1), (1, 1))
    found = stage(y, iter(places), normed, *how)
    assert found.shape == ((2, 12, 4, 4) if dilated else (2, 12, 2, 2))

    def free(place, y, *how):
        _, _, conv_name, norm_name = place
        return norm(state, norm_name, conv(state, conv_name, y, *how))

    # Dilated, it computes what it would at the stride, and between.
    strided = stage(y, iter(places), free, (2, 1), (1, 1))
    every = 2 if dilated else 1
    np.testing.assert_allclose(found[:, :, ::every, ::every], strided, rtol=1e-9)


def test_files_that_do_not_fit_are_named(tmp_path):
    state, args = vgg_state(True), {"widths": WIDTHS}
    del state["features.3.weight"]
    with pytest.raises(CheckpointError, match="holds 12 convolutions.*VGG-16 has 13"):
        imported("segnet", args, state, tmp_path)
    for name in (
        "features.4.running_var",
        "features.1.running_mean",
        "features.3.bias",
    ):
        state = vgg_state(True)
        del state[name]
        with pytest.raises(CheckpointError, match=f"state.npz lacks {name}"):
            imported("segnet", args, state, tmp_path)
    state = {k: x for k, x in vgg_state(True).items() if "running" not in k}
    with pytest.raises(CheckpointError, match="lacks features.1.running_mean"):
        imported("segnet", args, state, tmp_path)
    state = vgg_state(True)
    state["features.1.running_var"][1] = -0.1
    with pytest.raises(
        CheckpointError, match="features.1.running_var holds a negative"
    ):
        imported("segnet", args, state, tmp_path)
    state = vgg_state(True, (5, 6, 6, 6, 6))
    with pytest.raises(CheckpointError, match=r"features.0.weight has shape \(5, 3"):
        imported("segnet", args, state, tmp_path)
    state = vgg_state(True)
    state["features.0.bias"][1] = np.nan
    with pytest.raises(CheckpointError, match="features.0.bias holds what is no "):
        imported("segnet", args, state, tmp_path)
    with pytest.raises(ConfigError, match="UNet has no encoder of torchvision's"):
        imported("unet", {"widths": (2,) * 5}, vgg_state(True), tmp_path)


@pytest.mark.parametrize("name", RESNETS)
def test_other_resnets_are_refused_by_name(tmp_path, name):
    args = {"widths": RESNETS[name], "depths": (2,) * 4}
    with pytest.raises(
        CheckpointError, match="state.npz holds a ResNet of basic blocks, as ResNet-18"
    ):
        imported(name, args, resnet_state(basic=True), tmp_path)
    # ResNet-101 holds all that ResNet-50 has, and more.
    with pytest.raises(CheckpointError, match=r"more than 2 blocks in layer1.*\(2, 2"):
        imported(name, args, resnet_state(3), tmp_path)
    state = resnet_state(1)
    with pytest.raises(CheckpointError, match=r"state.npz lacks layer1.1.conv1.weight"):
        imported(name, args, state, tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_damaged_files_and_strange_ones_are_named(tmp_path, suffix):
    net = models.build("segnet", {"num_classes": 3, "widths": [2] * 5})
    file = tmp_path / f"x{suffix}"
    with pytest.raises(CheckpointError, match=f"x{suffix}"):
        models.import_encoder(net, {"params": {}, "batch_stats": {}}, file)
    for content in (b"", b"abc" * 100):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"x{suffix}"):
            models.import_encoder(net, {"params": {}, "batch_stats": {}}, file)
    with pytest.raises(CheckpointError, match="vgg16.pth: encoders are read from .npz"):
        models.import_encoder(net, {"params": {}, "batch_stats": {}}, "vgg16.pth")


def configured(monkeypatch, name, widths, file):
    """A run's config that names the file, on frames of noise."""
    splits = tinyrun.job(Path(file).parent / "data").splits
    monkeypatch.setattr(
        stages, "load_split", lambda _, name, **more: getattr(splits, name)
    )
    return Config(
        network=Network(name, widths=widths, encoder=str(file)),
        data=Data("synthetic", size=tinyrun.SIZE),
        prune=Prune(criterion="magnitude", multiple_of=1, min_channels=1),
    )


def test_a_run_starts_from_the_encoder_that_its_config_names(tmp_path, monkeypatch):
    state, file = vgg_state(True), tmp_path / "vgg.npz"
    np.savez(file, **state)
    config = configured(monkeypatch, "segnet", WIDTHS, file)
    net, _ = untrained("segnet", (("widths", WIDTHS),))
    drawn = models.init(net, jax.random.key(config.seed), tinyrun.SIZE)
    monkeypatch.setattr(models, "init", lambda *args: drawn)
    begun = []

    def train(job, variables, progress):
        begun.append((job.stage, variables))
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train", train)
    with pytest.raises(KeyboardInterrupt):
        stages.run(config, tmp_path / "run")
    ((stage, variables),) = begun
    assert stage == "train"
    for own, own_norm, their, their_norm in vgg_places(True)[1:]:
        kernel = state[f"{their}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(variables["params"][own]["kernel"], kernel)
        var = state[f"{their_norm}.running_var"]
        np.testing.assert_array_equal(variables["batch_stats"][own_norm]["var"], var)
    # Of images in [0, 1]: ImageNet's deviation is folded into the first.
    kernel = state["features.0.weight"].transpose(2, 3, 1, 0)
    kernel = kernel / np.array([[0.229], [0.224], [0.225]])
    first = variables["params"]["encoder1_conv1"]["kernel"]
    np.testing.assert_allclose(first, kernel, rtol=1e-6)
    # The decoder is as it was drawn.
    for name in ("decoder5_conv1", "classifier"):
        assert variables["params"][name]["kernel"] is drawn["params"][name]["kernel"]
    # A file that is gone by the time the run goes on is named as well.
    file.unlink()
    with pytest.raises(ConfigError, match=r"network.encoder = '.*vgg.npz': .*No such"):
        stages.run(config, tmp_path / "run")
    # It need not be there any more once the dense network is trained.
    monkeypatch.setattr(stages, "ended", lambda job: job.stage == "train")
    with pytest.raises(KeyboardInterrupt):
        stages.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "widths", "given", "words"),
    [
        ("segnet", WIDTHS, None, "No such file"),
        ("segnet", WIDTHS, b"abc" * 100, "state.npz"),
        ("segnet", (5, *WIDTHS[1:]), vgg_state(True), "features.0.weight has shape"),
        ("fcn", (*WIDTHS, 8, 10), resnet_state(), "0 convolutions features.N.weight"),
        ("segnet_basic", (4,), vgg_state(True), "SegNetBasic has no encoder"),
    ],
    ids=["missing", "damaged", "other widths", "another network", "no encoder"],
)
def test_a_bad_encoder_is_told_before_a_run_s_work(
    tmp_path, monkeypatch, name, widths, given, words
):
    file = tmp_path / "state.npz"
    if isinstance(given, bytes):
        file.write_bytes(given)
    elif given is not None:
        np.savez(file, **given)
    config = configured(monkeypatch, name, widths, file)
    with pytest.raises(ConfigError, match=f"network.encoder = '{file}': .*{words}"):
        stages.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
