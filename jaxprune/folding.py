# SPDX-License-Identifier: Apache-2.0
"""`fold_batch_norm`: batch norm by running statistics, in the kernel before it.

A product's answer times and plus what does not depend on the input, channel by channel,
is the product with a scaled kernel and one bias. Which multiplications and additions
those are is read off the function's own program (`absorb.py` walks it).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import absorb
from jaxprune.base import Apply, Graph, GraphError, Path, PyTree, key_path, path_str
from jaxprune.taps import program_of
from jaxprune.trace import struct

# Beside a kernel that took up a batch norm, under its name with this behind it.
SUFFIX = "_folded_bias"


class Folded(NamedTuple):
    """A function and its tree, in which kernels have taken up the batch norms.

    variables: nested dicts by key path, without the leaves that nothing reads any more;
    beside each 'kernel' that changed, 'kernel_folded_bias' [out]. merged: by the
    kernel's key path, those of the leaves that went into it. left: batch norms that
    stay, by the path of one of their leaves, and why.
    """

    apply: Apply
    variables: PyTree
    merged: Mapping[str, tuple[str, ...]]
    left: Mapping[str, str]


def fold_batch_norm(
    apply: Apply, variables: PyTree, *inputs: Any, **kwargs: Any
) -> Folded:
    """Merge batch norms that use running statistics into the products before them.

    inputs, kwargs: as of `trace`; the function in inference mode (`train=False`). Of a
    convolution or matrix product whose answer y is read by nothing else,

        (y + b - mean) * (scale / sqrt(var + eps)) + bias

    becomes the product with a kernel times the middle factor, and one bias; so does any
    other chain of multiplications and additions of variables, channel by channel.
    Factors that are numbers of the program alone stay where they are, since they may be
    others at another size; those made with variables, such as eps above, must not
    depend on a size or an argument. The result takes other batch and image sizes, and
    trees that were trained on, saved or loaded. Where the answer, or the kernel, is
    read elsewhere too, or the factor does not lie along the channels, nothing is
    changed, and `left` says so.

    To save what was folded, keep the graph and the keep of what it was made from:
    `save(path, pruned._replace(apply=folded.apply, variables=folded.variables))`.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(variables)
    paths = [key_path(keys) for keys, _ in flat]
    template = jax.tree.unflatten(treedef, [struct(x) for _, x in flat])
    program, _, given = program_of(apply, template, inputs, kwargs)
    found = absorb.look(program, [struct(x) for _, x in flat], given)

    def parts(arrays: list[Any]) -> dict[int, tuple[Any, Any]]:
        return absorb.fold(program, arrays, given, found)

    made = jax.jit(parts)([jnp.asarray(x) for _, x in flat]) if found.merged else {}
    gone = {n for numbers in found.merged.values() for n in numbers} - found.read
    tree: dict[str, Any] = {}
    for number, (path, (_, x)) in enumerate(zip(paths, flat, strict=True)):
        if number in made:
            kernel, bias = made[number]
            _put(tree, path, kernel)
            _put(tree, bias_path(path), bias)
        elif number not in gone:
            _put(tree, path, x)
    return Folded(
        folded(apply, template),
        tree,
        {
            path_str(paths[n]): tuple(path_str(paths[m]) for m in sorted(numbers))
            for n, numbers in found.merged.items()
        },
        {path_str(paths[n]): cause for n, cause in found.left.items()},
    )


def folded(apply: Apply, template: PyTree) -> Apply:
    """`apply` for trees that `fold_batch_norm` made of variables like `template`.

    It looks at the tree: the kernels with a folded bias beside them are those whose
    batch norms are left out. Raises GraphError for a tree that does not fit, and where
    another mode of the function (train=True) reads what is no longer there.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(template)
    paths = [key_path(keys) for keys, _ in flat]
    structs = [struct(x) for _, x in flat]
    template = jax.tree.unflatten(treedef, structs)

    @functools.wraps(apply)
    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        held = {
            key_path(keys): x
            for keys, x in jax.tree_util.tree_flatten_with_path(variables)[0]
        }
        biases = _biases(paths, held)
        leaves = [
            functools.partial(_leaf, held, path, like)
            for path, like in zip(paths, structs, strict=True)
        ]
        program, out, given = program_of(apply, template, inputs, kwargs)
        values, used = absorb.run(program, leaves, structs, given, biases)
        missing = [path_str(paths[n]) for n in biases if n not in used]
        if missing:
            raise GraphError(
                f"{missing[0]} holds a folded batch norm, but this call of "
                f"{getattr(apply, '__name__', 'apply')} has none there to leave out; "
                "call it as it was folded, in inference mode (train=False)"
            )
        return jax.tree.unflatten(jax.tree.structure(out), values)

    return run


def is_folded(graph: Graph, paths: Sequence[Path]) -> bool:
    """Whether `fold_batch_norm` made a tree of these key paths of the graph's leaves.

    Biases that the graph knows were folded before it was traced, and are like others.
    """
    own = {leaf.path for leaf in graph.leaves}
    return any(path and path[-1].endswith(SUFFIX) for path in paths if path not in own)


def unfolded(
    graph: Graph, shapes: Sequence[tuple[int, ...]], variables: PyTree = None
) -> PyTree:
    """Nested dicts of the graph's leaves at these shapes, as they were before.

    Those of `variables`, a folded tree, stand in their places; GraphError for a leaf
    that is neither one of these nor a folded bias.
    """
    held = jax.tree_util.tree_flatten_with_path(variables)[0]
    given = {key_path(keys): x for keys, x in held}
    own = {leaf.path for leaf in graph.leaves}
    for path in given.keys() - own - {bias_path(path) for path in own}:
        raise GraphError(f"variables hold {path_str(path)}, which the graph lacks")
    tree: dict[str, Any] = {}
    for leaf, shape in zip(graph.leaves, shapes, strict=True):
        blank = jax.ShapeDtypeStruct(shape, jnp.dtype(leaf.dtype))
        _put(tree, leaf.path, given.get(leaf.path, blank))
    return tree


def bias_path(kernel: Path) -> Path:
    """Where the folded bias of a kernel lies."""
    return (*kernel[:-1], kernel[-1] + SUFFIX)


def _biases(paths: Sequence[Path], held: Mapping[Path, Any]) -> dict[int, Any]:
    known = {bias_path(path): number for number, path in enumerate(paths)}
    # What the function was given before is its own, such as an earlier fold's biases.
    own = set(paths)
    for path in held:
        if path not in own and path not in known:
            raise GraphError(f"variables hold {path_str(path)}, which is not read")
    return {known[path]: x for path, x in held.items() if path not in own}


def _leaf(held: Mapping[Path, Any], path: Path, like: jax.ShapeDtypeStruct) -> Any:
    if path not in held:
        raise GraphError(
            f"{path_str(path)} was folded into a kernel, and this call reads it; call "
            "the function as it was folded, in inference mode (train=False)"
        )
    x = held[path]
    if jnp.shape(x) != like.shape:
        raise GraphError(
            f"{path_str(path)} has shape {jnp.shape(x)}, where {like.shape} was folded"
        )
    return jnp.asarray(x)


def _put(tree: dict[str, Any], path: Path, x: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = x
