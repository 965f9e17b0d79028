# SPDX-License-Identifier: Apache-2.0
"""FCN, DeepLabv3+ and RefineNet: published counts, groups, plain smaller nets."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import models
from jaxprune.base import INPUT, OUTPUT, WINDOW, ConfigError
from jaxprune.models import resnet

NETS: dict[str, dict[str, Any]] = {
    "fcn": {"widths": (3, 4, 5, 6, 7, 8, 9)},
    "deeplab": {"widths": (4, 8, 12, 16, 20, 6, 3, 5), "depths": (1, 2, 1, 1)},
    "refinenet": {"widths": (4, 8, 12, 16, 20, 7, 6, 5, 4), "depths": (1, 1, 2, 1)},
}


def shapes(name: str, **fields: Any) -> tuple[Any, Any]:
    net = models.build(name, {"num_classes": 21, **fields})
    return net, jax.eval_shape(
        lambda k: models.init(net, k, (64, 64)), jax.random.key(0)
    )


def count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def conv(read: int, made: int, kernel: int = 1) -> int:
    return kernel**2 * read * made + made


def test_fcn_is_vgg_and_its_scores() -> None:
    _, tree = shapes("fcn")
    vgg = 14_714_688 + 102_764_544 + 16_781_312  # features, fc6, fc7
    norms = 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512 + 2 * 4096)
    scores = conv(4096, 21) + conv(512, 21) + conv(256, 21)
    assert count(tree["params"]) == vgg + norms + scores
    _, tree = shapes("fcn", stride=32)
    assert count(tree["params"]) == vgg + norms + conv(4096, 21)


@pytest.mark.parametrize("name", ["deeplab", "refinenet"])
def test_the_backbone_is_resnet_50(name: str) -> None:
    _, tree = shapes(name)
    mine = {k: v for k, v in tree["params"].items() if k[:4] in ("stem", "stag")}
    biases = 26_560  # which the published 23,508,032 do without
    assert count(mine) == 23_508_032 + biases


def test_heads_by_the_papers_widths() -> None:
    _, tree = shapes("deeplab")
    backbone = 23_508_032 + 26_560
    depth = {n: 9 * n + n for n in (2048, 256 + 48, 256)}
    convs = conv(2048, 256) * 5 + 3 * depth[2048] + conv(5 * 256, 256) + conv(256, 48)
    convs += depth[304] + conv(304, 256) + depth[256] + conv(256, 256)
    norms = 2 * (5 * 256 + 3 * 2048 + 256 + 48 + 304 + 256 + 256 + 256)
    assert count(tree["params"]) == backbone + convs + norms + conv(256, 21)

    _, tree = shapes("refinenet")
    # Nothing is fused there: units, pooling, unit.
    coarse = conv(2048, 512, 3) + (4 + 2 + 2) * conv(512, 512, 3)
    fine = 3 * (4 + 1 + 1 + 2 + 2) * conv(256, 256, 3)  # near, both fusions, the rest
    fine += sum(conv(n, 256, 3) for n in (1024, 512, 256))
    far = 4 * conv(512, 512, 3) + conv(512, 256, 3) - conv(256, 256, 3)
    far += 2 * 4 * conv(256, 256, 3)
    last = 2 * 2 * conv(256, 256, 3)  # two units before the classifier
    want = backbone + coarse + fine + far + last + conv(256, 21, 3)
    assert count(tree["params"]) == want


@pytest.mark.parametrize("name", NETS)
def test_every_convolution_can_be_cut_exactly(name: str) -> None:
    net, tree = shapes(name)
    images = jax.ShapeDtypeStruct((1, 65, 97, 3), jnp.float32)
    graph = jp.trace(net.apply, tree, images, train=False)
    assert all(g.exact for g in graph.groups.values())
    assert {f.cause for f in graph.frozen} <= {INPUT, OUTPUT, WINDOW}
    slots = {s.path for g in graph.groups.values() for s in g.slots if s.role == "out"}
    kernels = {n for n, leaves in tree["params"].items() if "kernel" in leaves}
    stay = {n for n in kernels if n.startswith(("classifier", "score"))}
    assert {n for n in kernels if ("params", n, "kernel") in slots} == kernels - stay


@pytest.mark.parametrize("name", NETS)
def test_the_plain_smaller_network_is_what_slim_computes(name: str) -> None:
    net = models.build(name, {"num_classes": 4, **NETS[name]})
    images = np.random.default_rng(0).random((2, 45, 70, 3), np.float32)
    variables = models.init(net, jax.random.key(1), (64, 64))
    graph = jp.trace(net.apply, variables, images, train=False)
    keep = networks.random_keep(graph, 0)
    small = jp.shrink(graph, keep, variables)
    plain = models.rebuild(net, small)
    options = {"xla_backend_optimization_level": 0}
    slim = jp.slim(net.apply, graph, keep)
    want, cut, again = (
        jax.jit(f, compiler_options=options)(v, images)
        for f, v in (
            (net.apply, jp.mask(graph, keep, variables)),
            (slim, small),
            (plain.apply, small),
        )
    )
    scale = np.abs(want).max()
    assert np.ptp(np.asarray(want)) > 0.05 * scale
    np.testing.assert_allclose(cut, want, atol=1e-4 * scale)
    np.testing.assert_allclose(again, want, atol=1e-4 * scale)
    jaxpr = jax.make_jaxpr(plain.apply)(small, images[:1]).jaxpr
    one = jp.trace(net.apply, variables, images[:1], train=False)
    assert jp.cost(one, keep).flops == 2 * networks.multiply_adds(jaxpr)


def test_bad_fields_are_named() -> None:
    for name, fields, match in (
        ("fcn", {"stride": 4}, "stride=4; one of 8, 16, 32"),
        ("fcn", {"widths": (1, 2)}, "length 7 .five stages.*or 15"),
        ("deeplab", {"depths": (3, 4)}, "four positive integers"),
        ("refinenet", {"depths": (3, 4, 0, 1)}, "four positive integers"),
        ("deeplab", {"widths": (8,) * 7}, "length 8 .one a part.*or 62"),
    ):
        with pytest.raises(ConfigError, match=match):
            models.build(name, {"num_classes": 2, **fields})
    count = len(models.refinenet.conv_names((1, 1, 1, 1)))
    widths = [8] * count
    widths[resnet.conv_names((1, 1, 1, 1)).index("stage3_block1_conv3")] = 9
    with pytest.raises(ConfigError, match="stage3_block1_conv3 .9. .*added up"):
        models.RefineNet(2, widths, (1, 1, 1, 1))
