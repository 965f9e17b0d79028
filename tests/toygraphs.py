# SPDX-License-Identifier: Apache-2.0
"""Small graphs written by hand, for tests of what is done with a graph."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxprune.base import Extent, Graph, Group, Leaf, Slot, Term


def _slot(path, axis, size, role, offset=0):
    return Slot(path, axis, np.arange(offset, offset + size)[:, None], role)


def chain(*widths: int, inputs: int = 3, outputs: int = 2) -> Graph:
    """Prunable dense layers l0, l1, ... of these widths before one of `outputs`.

    FLOPs: 2 x input x output of every layer, as for one example.
    """
    sizes = (inputs, *widths, outputs)
    leaves, groups, terms = [], {}, []
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        kernel, bias = ("params", f"l{i}", "kernel"), ("params", f"l{i}", "bias")
        leaves += [
            Leaf(bias, (after,), "float32"),
            Leaf(kernel, (before, after), "float32"),
        ]
        if i < len(widths):
            slots = (
                _slot(kernel, 1, after, "out"),
                _slot(bias, 0, after, "out"),
                _slot(("params", f"l{i + 1}", "kernel"), 0, after, "in"),
            )
            groups[f"l{i}"] = Group(f"l{i}", after, slots)
        ends = (_extent(i - 1, widths, inputs), _extent(i, widths, outputs))
        terms.append(Term("flops", 2, ends, f"l{i}"))
        terms.append(Term("activation_bytes", 4, ends[1:], f"l{i}"))
    return Graph(groups, (), tuple(leaves), tuple(terms))


def _extent(i, widths, fixed):
    return Extent(0, ((f"l{i}", 1),)) if 0 <= i < len(widths) else Extent(fixed)


def variables(graph: Graph, seed: int = 0):
    """Normal random {'params': ...} for a graph."""
    rng = np.random.default_rng(seed)
    tree: dict = {}
    for leaf in graph.leaves:
        node = tree
        for name in leaf.path[:-1]:
            node = node.setdefault(name, {})
        node[leaf.path[-1]] = jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)
    return tree


def init(net, x, seed: int = 0):
    """Variables of a linen net, its `init` not compiled: He-normal, zeros and ones."""
    rng = np.random.default_rng(seed)

    def value(keys, leaf):
        if keys[-1].key == "kernel":
            scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, keys[-1].key in ("scale", "var"), leaf.dtype)

    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(value, shapes)


def apply(variables, x):
    """The ReLU network of a `chain`."""
    layers = variables["params"]
    for i in range(len(layers)):
        x = jax.nn.relu(x) if i else x
        x = x @ layers[f"l{i}"]["kernel"] + layers[f"l{i}"]["bias"]
    return x


def frozen_backbone():
    """Graph and variables of two untrained layers before a trained head, its kernel."""
    rng = np.random.default_rng(0)
    sizes = (5, 8, 16, 3)
    kernels = [jnp.asarray(rng.normal(size=s)) for s in itertools.pairwise(sizes)]
    names = [("frozen", "a"), ("frozen", "b"), ("params", "head")]
    leaves = tuple(
        Leaf((*n, "kernel"), k.shape, "float32", n[0] == "params")
        for n, k in zip(names, kernels)
    )
    groups = {
        name: Group(
            name,
            sizes[i + 1],
            (
                _slot(leaves[i].path, 1, sizes[i + 1], "out"),
                _slot(leaves[i + 1].path, 0, sizes[i + 1], "in"),
            ),
        )
        for i, name in enumerate("ab")
    }
    variables: dict = {}
    for (collection, layer), kernel in zip(names, kernels):
        variables.setdefault(collection, {})[layer] = {"kernel": kernel}
    return Graph(groups, (), leaves), variables, kernels[-1]


def of(variables, graph, name, c):
    """theta[g,c] as one float64 vector, read slot by slot, and its length."""
    parts = []
    for slot in graph.groups[name].slots:
        x = variables
        for key in slot.path:
            x = x[key]
        parts.append(
            np.take(np.asarray(x, np.float64), slot.indices[c], slot.axis).ravel()
        )
    return np.concatenate(parts)


@st.composite
def chains(draw, max_layers=4, max_width=24):
    """Random chains."""
    widths = draw(st.lists(st.integers(1, max_width), min_size=1, max_size=max_layers))
    return chain(
        *widths, inputs=draw(st.integers(1, 5)), outputs=draw(st.integers(1, 5))
    )
