# SPDX-License-Identifier: Apache-2.0
"""Networks rebuilt from cut variables, against masked and transformed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import base, models
from jaxprune.models import segnet, segnet_basic

SMALL = {
    "segnet": (3, 4, 5, 6, 7),
    "segnet_basic": (3, 4, 5, 6),
    "unet": (2, 3, 4, 5, 6),
}


def abstract(name, widths):
    net = models.build(name, {"num_classes": 4, "widths": widths})
    return net, jax.eval_shape(lambda k: models.init(net, k, (8, 8)), jax.random.key(0))


@functools.cache
def small(name):
    """A network whose every leaf matters: none is at its initial 0 or 1."""
    net, shapes = abstract(name, SMALL[name])
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if path[-1].key == "kernel":
            return rng.normal(size=shape, scale=np.prod(shape[:-1]) ** -0.5)
        return (
            rng.uniform(0.5, 1.5, shape)
            if path[-1].key in ("scale", "var")
            else (rng.uniform(-0.3, 0.3, shape))
        )

    return net, jax.tree_util.tree_map_with_path(
        lambda p, s: np.float32(leaf(p, s.shape)), shapes
    )


def run(apply, variables, images):
    # Few optimisations: these networks are small, and run once.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(apply, compiler_options=options)(variables, images)


def leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(p, simple=True, separator="/"), v) for p, v in found]


def cut(name, variables, keep):
    """Cuts channels of every convolution by hand; keep: {convolution: bool[C]}."""
    before = {"segnet": segnet, "segnet_basic": segnet_basic}[name].conv_names()
    inputs = {b: a for a, b in zip(before, (*before[1:], "classifier"), strict=True)}
    out = {"params": {}, "batch_stats": {}}
    for path, value in leaves(variables):
        kind, layer, leaf = path.split("/")
        conv = layer.replace("_bn", "_conv")
        value = np.asarray(value)
        if conv in keep:
            value = value[..., keep[conv]]
        if leaf == "kernel" and layer in inputs:
            value = value[:, :, keep[inputs[layer]]]
        out[kind].setdefault(layer, {})[leaf] = value
    return out


def tied_keep(name, widths, ties):
    rng = np.random.default_rng(0)
    keep = {}
    for conv, width in widths.items():
        tied = keep.get(ties.get(conv))
        keep[conv] = rng.random(width) < 0.6
        keep[conv][rng.integers(width)] = True
        if tied is not None:
            keep[conv] = tied
    return keep


def masked(variables, keep):
    """Scale, shift and statistics of removed channels zeroed: they compute zeros."""
    out = jax.tree.map(np.array, variables)
    for conv, kept in keep.items():
        norm = conv.replace("_conv", "_bn")
        for leaf in out["params"][norm].values():
            leaf[~kept] = 0
    return out


@pytest.mark.parametrize("name", ["segnet", "segnet_basic"])
def test_rebuilt_network_equals_the_masked_one(name):
    net, variables = small(name)
    depth = segnet.DEPTHS if name == "segnet" else (1, 1, 1, 1)
    ties = {
        f"decoder{s + 1}_conv{depth[s]}": f"encoder{s}_conv{depth[s - 1]}"
        for s in range(1, len(depth))
    }
    module = {"segnet": segnet, "segnet_basic": segnet_basic}[name]
    widths = {
        conv: variables["params"][conv]["kernel"].shape[-1]
        for conv in module.conv_names()
    }
    keep = tied_keep(name, widths, ties)
    shrunk = cut(name, variables, keep)
    rebuilt = models.rebuild(net, shrunk)
    assert rebuilt.widths == tuple(int(k.sum()) for k in keep.values())
    images = jax.random.uniform(jax.random.key(1), (2, 37, 51, 3))
    want = run(net.apply, masked(variables, keep), images)
    seen = run(rebuilt.apply, shrunk, images)
    scale = np.abs(want).max()
    assert np.ptp(want) > 1e-3 * scale
    np.testing.assert_allclose(seen, want, atol=3e-5 * scale)


@pytest.mark.parametrize("name", SMALL)
def test_rebuild_of_itself_is_the_same_program(name):
    net, variables = abstract(name, SMALL[name])
    rebuilt = models.rebuild(net, variables)
    assert len(rebuilt.widths) == {"segnet": 25, "segnet_basic": 8, "unet": 22}[name]
    images = jax.ShapeDtypeStruct((1, 9, 13, 3), jnp.float32)
    programs = [jax.make_jaxpr(n.apply)(variables, images) for n in (net, rebuilt)]
    assert str(programs[0]) == str(programs[1])


def test_unet_rebuild_takes_every_width():
    widths = tuple(range(1, 23))
    _, variables = abstract("unet", widths)
    assert models.rebuild(models.UNet(4), variables).widths == widths


def test_rebuild_names_what_does_not_fit():
    net, variables = small("segnet")
    broken = jax.tree.map(np.array, variables)
    broken["params"]["encoder3_bn2"]["scale"] = jnp.ones(2)
    with pytest.raises(base.GraphError, match=r"encoder3_bn2/scale has shape \(2,\)"):
        models.rebuild(net, broken)
    del broken["params"]["encoder2_conv1"]
    with pytest.raises(base.GraphError, match="no leaf params/encoder2_conv1/kernel"):
        models.rebuild(net, broken)


@pytest.mark.parametrize(
    ("name", "groups"), [("segnet", 21), ("segnet_basic", 5), ("unet", 22)]
)
def test_rebuilt_network_is_what_slim_computes(name, groups):
    net, variables = small(name)
    images = jax.random.uniform(jax.random.key(1), (1, 9, 14, 3))
    graph = jaxprune.trace(net.apply, variables, images)
    assert len(graph.groups) == groups
    assert all(group.exact for group in graph.groups.values())
    rng = np.random.default_rng(1)
    keep = {
        n: np.r_[True, rng.random(g.size - 1) < 0.6] for n, g in graph.groups.items()
    }
    shrunk = jaxprune.shrink(graph, keep, variables)
    rebuilt = models.rebuild(net, shrunk)
    seen = run(rebuilt.apply, shrunk, images)
    assert np.ptp(seen) > 1e-3
    np.testing.assert_array_equal(
        seen, run(jaxprune.slim(net.apply, graph, keep), shrunk, images)
    )
