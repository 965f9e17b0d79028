# SPDX-License-Identifier: Apache-2.0
"""Layers of stacked parameters and recurrent cells, in linen and in nnx."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from test_control import check_law, half, sizes
from test_laws import TRAIN

import jaxprune as jp


class Block(nn.Module):
    """A residual block, as `nn.scan` takes it."""

    width: int
    norm: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        y = nn.Dense(self.width)(x)
        if self.norm:
            y = nn.BatchNorm(use_running_average=not train)(y)
        return x + nn.Dense(x.shape[-1])(nn.relu(y)), y.mean(-1)


class Stacked(nn.Module):
    """Blocks of stacked parameters between two dense layers."""

    widths: tuple[int, int] = (8, 6)
    depth: int = 4
    norm: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        outer, inner = self.widths
        blocks = nn.scan(
            nn.remat(Block, static_argnums=(2,)) if self.remat else Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        x, means = blocks(inner, self.norm)(nn.Dense(outer)(x), train)
        return nn.Dense(2)(x) * means.sum(0)[..., None]


@pytest.mark.parametrize("kw", [{}, TRAIN], ids=["eval", "train"])
@pytest.mark.parametrize("net", [{}, {"norm": True}, {"remat": True}], ids=str)
def test_stacked_blocks_are_cut_alike(net: Any, kw: Any) -> None:
    apply, variables, x = networks.linen(lambda: Stacked(**net), shape=(5, 3))
    if not net.get("norm"):
        kw = {k: v for k, v in kw.items() if k == "train"}
    graph = check_law(apply, variables, x, -x, **kw)
    assert sizes(graph) == [6, 8]
    small = jp.shrink(graph, half(graph), variables)
    stack = next(v for k, v in small["params"].items() if "Block" in k)
    assert stack["Dense_0"]["kernel"].shape == (4, 4, 3)


def test_a_scan_costs_as_often_as_it_passes() -> None:
    apply, variables, x = networks.linen(Stacked, shape=(5, 3))
    graph = jp.trace(apply, variables, x)
    for outer, inner in ((8, 6), (5, 3), (1, 2)):
        kept = {8: outer, 6: inner}
        keep = {n: np.arange(g.size) < kept[g.size] for n, g in graph.groups.items()}
        macs = 5 * (3 * outer + 4 * 2 * outer * inner + outer * 2)
        assert jp.cost(graph, keep).flops == 2 * macs
        net = functools.partial(Stacked, (outer, inner))
        small = networks.linen(net, shape=(5, 3))
        assert jp.cost(graph, keep) == jp.cost(jp.trace(*small))


def _zeros(key: Any, shape: Any, dtype: Any) -> Any:
    """A first carry in the precision of the day."""
    del key, dtype
    return jnp.zeros(shape)


class Recurrent(nn.Module):
    """A recurrent layer, read also through a sum over its channels."""

    cell: Any
    widths: tuple[int, int] = (4, 6)
    back: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        before, hidden = self.widths
        cell = self.cell(hidden, carry_init=_zeros)
        rnn = nn.RNN(cell, return_carry=True, reverse=self.back, keep_order=self.back)
        last, h = rnn(nn.Dense(before)(x))
        last = jax.tree.leaves(last)[0]
        return nn.Dense(2)(h) * h.sum(-1, keepdims=True) + nn.Dense(2)(last)[:, None]


CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell")


@pytest.mark.parametrize("cell", CELLS)
def test_hidden_channels_of_recurrent_cells_are_cut(cell: str) -> None:
    net = functools.partial(Recurrent, getattr(nn, cell), back=cell == "GRUCell")
    apply, variables, x = networks.linen(net, shape=(2, 5, 3))
    graph = check_law(apply, variables, x, -x)
    assert sizes(graph) == [4, 6]
    small = networks.linen(lambda: net((2, 3)), shape=(2, 5, 3))
    assert jp.cost(graph, half(graph)) == jp.cost(jp.trace(*small))


def test_kernels_that_are_used_as_one_are_read_alike() -> None:
    """Four kernels side by side in one product: their rows are inputs, all of them."""
    net = functools.partial(Recurrent, nn.OptimizedLSTMCell)
    graph = jp.trace(*networks.linen(net, shape=(2, 5, 3)))
    roles = {
        (slot.path[-2], slot.axis): slot.role
        for group in graph.groups.values()
        for slot in group.slots
        if slot.path[-1] == "kernel"
    }
    for gate in "ifgo":
        assert roles["h" + gate, 0] == roles["i" + gate, 0] == "in"
        assert roles["h" + gate, 1] == roles["i" + gate, 1] == "out"


class NnxBlock(nnx.Module):
    """A residual block in nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(8, 6, rngs=rngs)
        self.second = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.second(nnx.relu(self.first(x)))


class NnxStacked(nnx.Module):
    """Blocks of stacked parameters in nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.head = (nnx.Linear(*w, rngs=rngs) for w in ((3, 8), (8, 2)))
        self.blocks = nnx.vmap(NnxBlock)(rngs.split(4))

    def __call__(self, x: Any) -> Any:
        run = nnx.scan(
            lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return self.head(run(self.stem(x), self.blocks))


def nnx_law(net: nnx.Module, x: Any) -> jp.Graph:
    definition, params, rest = nnx.split(net, nnx.Param, ...)
    params = networks.randomised(params, 0)

    def apply(v: Any, x: Any) -> Any:
        return nnx.merge(definition, v["params"], rest, copy=True)(x)

    return check_law(apply, {"params": params}, x, -x)


def test_stacked_blocks_of_nnx_are_cut_alike() -> None:
    graph = nnx_law(NnxStacked(nnx.Rngs(0)), networks.images(0, (5, 3)))
    assert sizes(graph) == [6, 8]


class NnxRecurrent(nnx.Module):
    """A recurrent layer in nnx."""

    def __init__(self, cell: Any, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(cell(3, 6, rngs=rngs))
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        cell, shape = self.rnn.cell, x[:, 0].shape
        first = cell.initialize_carry(shape, nnx.Rngs(0), carry_init=_zeros)
        h = self.rnn(x, initial_carry=first)
        return self.head(h) * h.sum(-1, keepdims=True)


@pytest.mark.parametrize("cell", CELLS[:3])
def test_hidden_channels_of_nnx_cells_are_cut(cell: str) -> None:
    net = NnxRecurrent(getattr(nnx, cell), nnx.Rngs(0))
    graph = nnx_law(net, networks.images(0, (2, 5, 3)))
    assert sizes(graph) == [6]
