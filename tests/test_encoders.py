# SPDX-License-Identifier: Apache-2.0
"""Imported encoders, against torchvision's programs written out in [N, C, H, W]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxprune import models
from jaxprune.base import CheckpointError, ConfigError

# Places of convolutions in torchvision's vgg16 and vgg16_bn, from its published state
# dicts.
VGG = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_BN = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
WIDTHS = (4, 6, 6, 6, 6)
COUNTS = (2, 2, 3, 3, 3)


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
    stages = [w for w, count in zip(widths, COUNTS, strict=True) for _ in range(count)]
    for n, out in zip(VGG_BN if norm else VGG, stages, strict=True):
        state |= conv_state(rng, f"features.{n}", out, read, 3, True)
        if norm:
            state |= norm_state(rng, f"features.{n + 1}", out)
        read = out
    return {k: v.astype(np.float32) for k, v in state.items()}


def resnet_state(depth=2):
    rng = np.random.default_rng(1)
    state = conv_state(rng, "conv1", 4, 3, 7, False) | norm_state(rng, "bn1", 4)
    read = 4
    for layer, out in enumerate((8, 8, 12, 12), 1):
        for b in range(depth):
            name, inner = f"layer{layer}.{b}", out // 4
            sizes = ((inner, read, 1), (inner, inner, 3), (out, inner, 1))
            for i, size in enumerate(sizes, 1):
                state |= conv_state(rng, f"{name}.conv{i}", *size, False)
                state |= norm_state(rng, f"{name}.bn{i}", size[0])
            if b == 0:
                state |= conv_state(rng, f"{name}.downsample.0", out, read, 1, False)
                state |= norm_state(rng, f"{name}.downsample.1", out)
            read = out
    return {k: v.astype(np.float32) for k, v in state.items()}


def conv(state, name, x, stride=1):
    """torch.nn.Conv2d, padded by half its window."""
    w = state[f"{name}.weight"]
    pad = w.shape[-1] // 2
    y = jax.lax.conv(x, w, (stride, stride), [(pad, pad)] * 2)
    return y + state.get(f"{name}.bias", np.zeros(len(w)))[:, None, None]


def norm(state, name, x):
    """torch.nn.BatchNorm2d in eval mode."""
    w, b, mean, var = (
        state[f"{name}.{k}"][:, None, None]
        for k in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * w + b


def images():
    return np.random.default_rng(2).random((2, 16, 24, 3), np.float32)


def inside(net, variables, x, name):
    """What the module `name` answers, as [N, C, H, W]."""
    _, found = net.apply(
        variables, x, capture_intermediates=lambda m, _: m.name == name
    )
    (answer,) = found["intermediates"][name]["__call__"]
    return np.asarray(answer).transpose(0, 3, 1, 2)


def imported(name, args, state, tmp_path, suffix=".npz", **more):
    net = models.build(name, {"num_classes": 3, **args})
    variables = models.init(net, jax.random.key(0), (16, 24))
    file = tmp_path / f"state{suffix}"
    if suffix == ".npz":
        np.savez(file, **state)
    else:
        safetensors.numpy.save_file(state, file)
    return net, variables, models.import_encoder(net, variables, file, **more)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_segnet_computes_what_vgg_does(tmp_path, normed, suffix):
    state, plain = vgg_state(normed), {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    args = {"widths": [4, 6, 6, 6, 6]}
    net, _, variables = imported("segnet", args, state, tmp_path, suffix, **plain)
    x = images()
    y = x.transpose(0, 3, 1, 2)
    for i, n in enumerate((VGG_BN if normed else VGG)[:2], 1):
        y = conv(state, f"features.{n}", y)
        y = norm(state, f"features.{n + 1}", y) if normed else y
        given = inside(net, variables, x, f"encoder1_bn{i}")
        np.testing.assert_allclose(given, y, rtol=1e-4, atol=1e-4)
        y = np.maximum(y, 0)


def test_the_mean_and_deviation_of_images_are_folded_in(tmp_path):
    """Exactly, but in the row of pixels at the edge."""
    state = vgg_state(True)
    net, _, variables = imported("segnet", {"widths": [*WIDTHS]}, state, tmp_path)
    x = images()
    # ImageNet's, as torchvision documents them.
    y = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    y = conv(state, "features.0", y.transpose(0, 3, 1, 2).astype(np.float32))
    y = norm(state, "features.1", y)[..., 1:-1, 1:-1]
    given = inside(net, variables, x, "encoder1_bn1")[..., 1:-1, 1:-1]
    np.testing.assert_allclose(given, y, rtol=1e-4, atol=1e-4)


def test_what_is_no_encoder_stays(tmp_path):
    args = {"widths": [*WIDTHS]}
    _, before, after = imported("segnet", args, vgg_state(True), tmp_path)
    for collection, tree in before.items():
        for name, leaves in tree.items():
            for key, leaf in leaves.items():
                same = np.array_equal(leaf, after[collection][name][key])
                assert same != name.startswith("encoder"), (name, key)
                assert after[collection][name][key].dtype == leaf.dtype


def test_fcn_takes_the_dense_layers_as_convolutions(tmp_path):
    state, rng = vgg_state(False), np.random.default_rng(3)
    for n, read, out in ((0, 6 * 49, 8), (3, 8, 10)):
        weight = rng.normal(size=(out, read)).astype(np.float32)
        state[f"classifier.{n}.weight"] = weight
        state[f"classifier.{n}.bias"] = rng.normal(size=out).astype(np.float32)
    args = {"widths": [*WIDTHS, 8, 10]}
    _, _, variables = imported("fcn", args, state, tmp_path)
    kernel = np.asarray(variables["params"]["fc_conv6"]["kernel"])
    # Of a 7x7 image both answer alike: torch flattens channels first.
    x = rng.normal(size=(7, 7, 6)).astype(np.float32)
    want = state["classifier.0.weight"] @ x.transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(np.einsum("hwi,hwio->o", x, kernel), want, rtol=1e-4)


@pytest.mark.parametrize("name", ["deeplab", "refinenet"])
def test_backbones_compute_what_resnet_does(tmp_path, name):
    state, plain = resnet_state(), {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    widths = {"deeplab": [4, 8, 8, 12, 12, 4, 4, 4], "refinenet": [4, 8, 8, 12, 12]}
    args = {"widths": widths[name], "depths": [2, 2, 2, 2]}
    args["widths"] = args["widths"] + [4] * (4 if name == "refinenet" else 0)
    net, _, variables = imported(name, args, state, tmp_path, **plain)
    x = images()
    y = jax.nn.relu(
        norm(state, "bn1", conv(state, "conv1", x.transpose(0, 3, 1, 2), 2))
    )
    pads = ((0, 0), (0, 0), (1, 1), (1, 1))
    y = jax.lax.reduce_window(
        y, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads
    )
    for layer, stride in ((1, 1), (2, 2)):
        for b in range(2):
            own, step = f"layer{layer}.{b}", stride if b == 0 else 1
            z = jax.nn.relu(norm(state, f"{own}.bn1", conv(state, f"{own}.conv1", y)))
            z = conv(state, f"{own}.conv2", z, step)
            z = jax.nn.relu(norm(state, f"{own}.bn2", z))
            z = norm(state, f"{own}.bn3", conv(state, f"{own}.conv3", z))
            given = inside(net, variables, x, f"stage{layer + 1}_block{b + 1}_bn3")
            np.testing.assert_allclose(given, z, rtol=1e-3, atol=1e-3)
            if b == 0:
                y = conv(state, f"{own}.downsample.0", y, step)
                y = norm(state, f"{own}.downsample.1", y)
            y = jax.nn.relu(y + z)


def test_files_that_do_not_fit_are_named(tmp_path):
    state, args = vgg_state(True), {"widths": [*WIDTHS]}
    del state["features.3.weight"]
    with pytest.raises(CheckpointError, match="holds 12 convolutions.*VGG-16 has 13"):
        imported("segnet", args, state, tmp_path)
    state = vgg_state(True)
    del state["features.4.running_var"]
    with pytest.raises(
        CheckpointError, match=r"state.npz lacks features.4.running_var"
    ):
        imported("segnet", args, state, tmp_path)
    state = vgg_state(True, (5, 6, 6, 6, 6))
    with pytest.raises(CheckpointError, match=r"features.0.weight has shape \(5, 3"):
        imported("segnet", args, state, tmp_path)
    state = vgg_state(True)
    state["features.0.bias"][1] = np.nan
    with pytest.raises(
        CheckpointError, match=r"features.0.bias holds what is no finite"
    ):
        imported("segnet", args, state, tmp_path)
    with pytest.raises(ConfigError, match="UNet has no encoder of torchvision's"):
        imported("unet", {"widths": [2] * 5}, vgg_state(True), tmp_path)


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
