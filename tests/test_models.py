# SPDX-License-Identifier: Apache-2.0
"""The shipped networks against published counts and independent NumPy references."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

from jaxprune import base, models
from jaxprune.models import segnet, segnet_basic, unet
from jaxprune.train import settings, stages
from jaxprune.train.config import Config, Network, check

SMALL = {
    "segnet": (3, 4, 5, 6, 7),
    "segnet_basic": (3, 4, 5, 6),
    "unet": (2, 3, 4, 5, 6),
    "fcn": (3, 4, 5, 6, 7, 8, 9),
    "deeplab": (4, 8, 12, 16, 20, 6, 3, 5),
    "refinenet": (4, 8, 12, 16, 20, 7, 6, 5, 4),
}
FLAT = {name: {"depths": (1, 1, 1, 1)} for name in ("deeplab", "refinenet")}


def abstract(name, classes, size=(8, 8), **fields):
    net = models.build(name, {"num_classes": classes, **fields})
    return net, jax.eval_shape(lambda k: models.init(net, k, size), jax.random.key(0))


def small(name, **fields):
    own = {"num_classes": 4, "widths": SMALL[name], **FLAT.get(name, {})}
    return models.build(name, {**own, **fields}), fresh(name)


@functools.cache
def fresh(name):
    own = {"num_classes": 4, "widths": SMALL[name], **FLAT.get(name, {})}
    return models.init(models.build(name, own), jax.random.key(0), (9, 13))


def quick_jit(function):
    """Compiled with few optimisations: these networks are small, and run once."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(function, compiler_options=options)


def run(net, variables, images):
    return quick_jit(net.apply)(variables, images)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "classes", "widths", "trained"),
    [
        ("segnet", 11, (64, 128, 256, 512, 512), 29_449_355),
        ("segnet", 11, (32, 64, 128, 256, 256), 7_370_315),
        ("segnet_basic", 11, (64,), 1_416_587),
        # 31,037,698 is the known size with batch norm and without the 5,888 biases that
        # batch norm makes redundant.
        ("unet", 2, (64, 128, 256, 512, 1024), 31_037_698 + 5_888),
    ],
)
def test_published_parameter_counts(name, classes, widths, trained):
    _, shapes = abstract(name, classes, widths=widths)
    assert count(shapes["params"]) == trained


# FCN by its stride: the layers that are scored, and where they are on the way.
SCORED = {32: ("fc7",), 16: ("fc7", "pool4"), 8: ("fc7", "pool4", "pool3")}


@pytest.mark.parametrize("stride", SCORED)
def test_published_parameter_counts_of_fcn(stride):
    """FCN-32s is VGG-16 with a 1x1 layer for its last; the others score more layers.

    A layer of n features has (n + 1) K numbers to score it. Where two scores meet, the
    paper also learns a kernel [4, 4, K, K] that samples the coarser one up, from a
    bilinear one on; here, sampling stays bilinear and has no numbers.
    """
    k, widths = 21, {"fc7": 4096, "pool4": 512, "pool3": 256}
    scores = sum((widths[name] + 1) * k for name in SCORED[stride])
    _, shapes = abstract("fcn", k, stride=stride)
    # torchvision's vgg16_bn, whose last layer is of 1,000 classes. Its fc6 and fc7 have
    # no batch norm.
    headless = 138_365_992 - (4096 + 1) * 1000
    assert count(shapes["params"]) == headless + 2 * (4096 + 4096) + scores
    # The paper's table 1 has 134 million; norms, scores and kernels add no half of one.
    sampling = 4 * 4 * k * k * (len(SCORED[stride]) - 1)
    assert round((count(shapes["params"]) + sampling) / 1e6) == 134


def upsampled(x, factor):
    """Bilinear, [B, H, W, K]: pixels are squares, and beyond the edge are its own."""
    for axis in (1, 2):
        n = x.shape[axis]
        at = np.clip((np.arange(factor * n) + 0.5) / factor - 0.5, 0, n - 1)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        part = (at - low).reshape(-1, *[1] * (3 - axis))
        x = x.take(low, axis) * (1 - part) + x.take(low + (n > 1), axis) * part
    return x


@pytest.mark.parametrize("stride", SCORED)
def test_fcn_adds_scores_of_its_stride_and_samples_them_up(stride):
    net = models.build(
        "fcn", {"num_classes": 4, "widths": SMALL["fcn"], "stride": stride}
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, 9, 13, 3)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: rng.uniform(0.1, 0.5, x.shape).astype(np.float32), shapes
    )
    for size in ((1, 1), (9, 13), (40, 70)):
        image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
        assert jax.eval_shape(net.apply, variables, image).shape == (2, *size, 4)

    @quick_jit
    def found(variables, images):
        own = {"capture_intermediates": lambda m, _: str(m.name).startswith("score")}
        logits, inside = net.apply(variables, images, **own)
        return logits, {n: x["__call__"][0] for n, x in inside["intermediates"].items()}

    logits, scores = found(variables, rng.random((2, 64, 96, 3), np.float32))
    names = ("score", "score4", "score3")[: len(SCORED[stride])]
    for name, cell in zip(names, (32, 16, 8)):
        assert scores[name].shape == (2, 64 // cell, 96 // cell, 4)
    total = np.float64(scores.pop("score"))
    for name in names[1:]:
        total = upsampled(total, 2) + scores.pop(name)
    assert not scores
    np.testing.assert_allclose(logits, upsampled(total, stride), rtol=1e-5)


def test_a_config_chooses_the_stride_of_fcn():
    config = Config(network=Network("fcn"))
    assert "stride" not in stages.network_args(check(config), 11)
    coarse = check(settings.override(config, "network.stride=16"))
    assert models.build("fcn", stages.network_args(coarse, 11)).stride == 16
    assert settings.override(coarse, "network.stride=none") == config
    for name, stride, words in (
        ("fcn", 4, "network.stride = 4: must be 8, 16 or 32, or none"),
        ("segnet", 8, "network.stride = 8: must be none where network.name is not 'fc"),
    ):
        with pytest.raises(base.ConfigError, match=words):
            check(Config(network=Network(name, stride=stride)))


@pytest.mark.parametrize("name", ["deeplab", "refinenet"])
def test_a_config_chooses_the_depths_of_a_resnet(name):
    config = Config(network=Network(name))
    assert "depths" not in stages.network_args(check(config), 11)
    deep = check(settings.override(config, "network.depths=3,4,23,3"))
    net = models.build(name, stages.network_args(deep, 11))
    assert tuple(net.depths) == (3, 4, 23, 3)
    for other, depths, words in (
        (name, (3, 4, 6), r"network.depths = \(3, 4, 6\): must be four numbers from 1"),
        (name, (3, 4, 0, 3), "must be four numbers from 1"),
        ("segnet", (3, 4, 6, 3), "network.depths = .*must be none where network.name"),
    ):
        with pytest.raises(base.ConfigError, match=words):
            check(Config(network=Network(other, depths=depths)))


def test_segnet_counts_by_kind():
    _, shapes = abstract("segnet", 11)
    norms = {k: v for k, v in shapes["params"].items() if "_bn" in k}
    convs = {k: v for k, v in shapes["params"].items() if k not in norms}
    assert len(convs) == 26
    assert len(norms) == 25
    assert count(convs) == 29_433_483
    assert count(norms) == count(shapes["batch_stats"]) == 15_872


@pytest.mark.parametrize(
    ("name", "widths", "want"),
    [
        ("segnet", segnet.WIDTHS, 106_712_432_640),
        ("segnet", (32, 64, 128, 256, 256), 27_026_000_000),
        ("segnet_basic", (64,), 59_188_838_400),
    ],
)
def test_published_multiply_adds(name, widths, want):
    net, shapes = abstract(name, 11, widths=widths)
    images = jax.ShapeDtypeStruct((1, 360, 480, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(net.apply)(shapes, images).jaxpr
    seen = networks.multiply_adds(jaxpr)
    if want % 1_000_000:
        assert seen == want
    else:  # published to five digits
        assert abs(seen - want) < 500_000


def test_names_are_stable():
    _, shapes = abstract("segnet", 11)
    names = segnet.conv_names()
    assert (names[0], names[12], names[13], names[24]) == (
        "encoder1_conv1",
        "encoder5_conv3",
        "decoder5_conv1",
        "decoder1_conv1",
    )
    norms = [name.replace("conv", "bn") for name in names]
    assert set(shapes["params"]) == {*names, *norms, "classifier"}
    assert len(segnet_basic.conv_names()) == 8
    assert len(unet.conv_names()) == 22


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (9, 13), (32, 48)])
def test_any_size(name, size):
    net, variables = small(name)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    logits = jax.eval_shape(net.apply, variables, images)
    assert logits.shape == (2, *size, 4)


@pytest.mark.parametrize("name", SMALL)
def test_training_updates_statistics_and_reaches_every_leaf(name):
    net, variables = small(name)
    images = jax.random.uniform(jax.random.key(1), (2, 9, 14, 3))

    def loss(params):
        variables_ = {**variables, "params": params}
        logits, new = net.apply(variables_, images, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(logits - 1)), (logits, new["batch_stats"])

    grads, (logits, stats) = quick_jit(jax.grad(loss, has_aux=True))(
        variables["params"]
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, variables["batch_stats"])
    chex.assert_tree_all_finite(grads)
    assert logits.shape == (2, 9, 14, 4)
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), stats, variables["batch_stats"]
    )
    assert all(jax.tree.leaves(changed))
    kernels = [g for path, g in leaves(grads) if path.endswith("kernel")]
    assert all(np.any(g) for g in kernels)


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), v) for p, v in found]


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_computes_low_and_returns_float32(name):
    net, variables = small(name, dtype="bfloat16")
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((1, 9, 13, 3), jnp.float32)
    assert jax.eval_shape(net.apply, variables, images).dtype == jnp.float32
    text = str(jax.make_jaxpr(net.apply)(variables, images))
    assert re.search(r"bf16\[1,\d+,\d+,4\] = conv_general_dilated", text)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((64, 128), r"length 5 \(one a stage\), or 25 \(one a convolution\)"),
        ((64, 0, 1, 1, 1), r"widths\[1\]=0; must be a positive integer"),
        ((64, 1.5, 1, 1, 1), r"widths\[1\]=1.5; must be a positive integer"),
        ((1,) * 15 + (2,) + (1,) * 9, r"decoder5_conv3 \(2\) and encoder4_conv3 \(1\)"),
    ],
)
def test_bad_widths_are_named(widths, message):
    with pytest.raises(base.ConfigError, match=message):
        models.SegNet(11, widths)


def test_other_networks_say_their_lengths():
    with pytest.raises(base.ConfigError, match="length 1 .* or 4 .* or 8"):
        models.SegNetBasic(11, (1, 2))
    with pytest.raises(base.ConfigError, match="length 5 .* or 22"):
        models.UNet(11, (1, 2))
    with pytest.raises(base.ConfigError, match="num_classes=0"):
        models.UNet(0)


def test_build_names_the_mistake():
    with pytest.raises(
        base.ConfigError, match="segnet, segnet_basic, unet, fcn, deeplab, refinenet"
    ):
        models.build("resnet", {"num_classes": 2})
    with pytest.raises(base.ConfigError, match="no field 'width'; it has num_classes"):
        models.build("unet", {"num_classes": 2, "width": 3})
    with pytest.raises(base.ConfigError, match="needs the field 'num_classes'"):
        models.build("unet", {})
    with pytest.raises(base.ConfigError, match="dtype='float33'"):
        models.build("unet", {"num_classes": 2, "dtype": "float33"})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"images\[None\]"),
        (np.zeros((1, 8, 8, 4), np.float32), "with 3 channels in the last axis"),
        (np.zeros((1, 0, 8, 3), np.float32), "are empty"),
        (np.zeros((1, 8, 8, 3), np.uint8), "divide 8-bit images by 255"),
    ],
)
@pytest.mark.parametrize("name", SMALL)
def test_bad_images_are_named(name, images, message):
    net, variables = abstract(name, 4, widths=SMALL[name])
    with pytest.raises(base.DataError, match=message):
        jax.eval_shape(net.apply, variables, images)


def test_local_response_norm_matches_loops():
    x = np.random.default_rng(0).normal(size=(2, 3, 7)) * 100
    want = np.empty_like(x)
    for *where, c in np.ndindex(x.shape):
        near = x[(*where, slice(max(c - 2, 0), c + 3))]
        want[(*where, c)] = x[(*where, c)] / (1 + 1e-4 / 5 * (near**2).sum()) ** 0.75
    seen = segnet_basic.local_response_norm(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(seen, want, rtol=1e-5)


def test_dropout_samples_differ_only_when_asked():
    net, variables = small("segnet", dropout=0.5)
    images = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3))
    keys = jax.random.split(jax.random.key(2))
    plain = models.SegNet(4, SMALL["segnet"])
    mean = run(net, variables, images)
    np.testing.assert_array_equal(mean, run(plain, variables, images))

    @quick_jit
    def draw(key):
        return net.apply(variables, images, sample=True, rngs={"dropout": key})

    a, b = map(draw, keys)
    assert np.any(a != b) and np.any(a != mean)


def test_init_is_he_normal():
    net = models.SegNet(11, (16, 16, 16, 16, 16))
    params = models.init(net, jax.random.key(0), (8, 8))["params"]
    kernels = [np.asarray(v) for path, v in leaves(params) if path.endswith("kernel")]
    normal = [k.ravel() / math.sqrt(2 / math.prod(k.shape[:-1])) for k in kernels]
    values = np.concatenate(normal)
    # 60,000 standard normals: mean and deviation within five standard errors.
    assert abs(values.mean()) < 5 / math.sqrt(values.size)
    assert abs(values.std() - 1) < 5 / math.sqrt(2 * values.size)
    assert np.unique(values).size > 0.99 * values.size
    constants = {path: v for path, v in leaves(params) if "kernel" not in path}
    assert all(np.all(v == ("scale" in path)) for path, v in constants.items())
