# SPDX-License-Identifier: Apache-2.0
"""`trace`: from a function and the shapes of its arguments to its channel groups."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxprune import jaxpr as jx
from jaxprune.base import (
    OUTPUT,
    UNREAD,
    Apply,
    Graph,
    GraphError,
    Leaf,
    Path,
    PyTree,
    check_function,
    key_path,
    path_str,
)
from jaxprune.groups import check_strict, graph_of
from jaxprune.labels import FROM_INPUT, Labels, Value, fixed
from jaxprune.rules import RULES
from jaxprune.splits import settle
from jaxprune.walk import Context, Tape, analyse


def trace(
    apply: Apply,
    variables: PyTree,
    *inputs: Any,
    exact: bool = True,
    strict: Sequence[str] = (),
    **kwargs: Any,
) -> Graph:
    """Find the channel groups of `apply(variables, *inputs, **kwargs)`.

    variables and inputs: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and
    dtypes are used, nothing is computed and no array allocated. kwargs are static
    (`train=False`). With exact=False, sums leave out what removed channels would add,
    as at small widths, and groups where that matters are marked; else it is added, or
    the group frozen. strict: names of modules, or fnmatch patterns, of which only the
    network's input may freeze anything.

    Returns a `Graph`; its groups are in order of first use. Raises GraphError where
    variables hold no array, or arrays without a key path of their own, where a module
    of `strict` is frozen, or there is none of that name, and for a module as `apply`.
    """
    check_function(apply)
    flat, treedef = jax.tree_util.tree_flatten_with_path(variables)
    leaves = _leaves(flat, _nnx_statistics(variables))
    _check_leaves(leaves)
    structs = [struct(x) for _, x in flat]
    abstract, rebuild = abstract_inputs(inputs)

    def dense(flat_variables: list[Any], flat_inputs: list[Any]) -> Any:
        tree = jax.tree.unflatten(treedef, flat_variables)
        return apply(tree, *rebuild(flat_inputs), **kwargs)

    program, out = jx.trace(dense, structs, abstract)
    states = state_outputs(out, leaves)

    def analysis(labels: Labels) -> list[Value]:
        ins = [
            leaf_value(labels, i, leaf.shape, x)
            for i, (leaf, x) in enumerate(zip(leaves, structs))
        ]
        for i in _unread(program, len(ins)):
            for axis in ins[i].labels:
                labels.freeze(axis, UNREAD)
        given = [fixed(len(v.aval.shape)) for v in program.invars[len(ins) :]]
        given = [value._replace(leaf=FROM_INPUT) for value in given]
        tape = analyse(Context(labels, RULES), program, [*ins, *given])
        _finish(labels, tape, ins, states)
        return ins

    labels, solved, ins = settle(analysis, exact)
    graph = graph_of(labels, solved, leaves, ins)
    check_strict(graph, strict)
    return graph


def struct(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype (weak or not) of an array or a Python number."""
    if is_arraylike(x):
        weak = getattr(x, "weak_type", False)
        dtype = x.dtype
        if jax.numpy.issubdtype(dtype, jax.numpy.number):
            # NumPy's float64 is float32 to JAX, unless told otherwise.
            dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.ShapeDtypeStruct(
            x.shape, dtype, weak_type=weak, sharding=jx.explicit_sharding(x)
        )
    return jax.eval_shape(lambda: jax.numpy.asarray(x))


def is_arraylike(x: Any) -> bool:
    """Whether x has a shape and a dtype, and is not a type (`np.float32`) itself."""
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def abstract_inputs(
    inputs: PyTree,
) -> tuple[list[jax.ShapeDtypeStruct], Callable[[Sequence[Any]], Any]]:
    """The arrays among the inputs, abstract, and how to put new ones in place."""
    flat, treedef = jax.tree.flatten(inputs)
    arrays = [i for i, x in enumerate(flat) if is_arraylike(x)]

    def rebuild(new: Sequence[Any]) -> Any:
        filled = list(flat)
        for i, x in zip(arrays, new, strict=True):
            filled[i] = x
        return jax.tree.unflatten(treedef, filled)

    return [struct(flat[i]) for i in arrays], rebuild


def leaf_value(labels: Labels, number: int, shape: tuple, x: Any) -> Value:
    """A variable: its own labels on every axis, and zero where a channel is removed."""
    if not jx.is_array(x):
        return fixed(len(shape))
    axes = tuple(labels.fresh(n) for n in shape)
    return Value(axes, (0.0,) * len(shape), None, number)


def state_outputs(out: PyTree, leaves: Sequence[Leaf]) -> list[int | None]:
    """For each output, the leaf that it updates (batch statistics), if any.

    Its key path ends in the leaf's and it has its shape. Of paths without a module,
    such as a list's, that may be chance: all leaves must come back, side by side.
    """
    by_path = {leaf.path: i for i, leaf in enumerate(leaves)}
    states: list[int | None] = []
    beside: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for keys, x in jax.tree_util.tree_flatten_with_path(out)[0]:
        path, found = key_path(keys), None
        for start in range(len(path)):
            number = by_path.get(path[start:])
            if number is not None and leaves[number].shape == x.shape and x.shape:
                if _has_module(path[start:]):
                    found = number
                else:
                    beside[path[:start]].append((len(states), number))
                break
        states.append(found)
    arrays = sum(1 for leaf in leaves if leaf.shape)
    for place in beside.values():
        if len(place) == arrays:
            for output, number in place:
                states[output] = number
    return states


def _has_module(path: Path) -> bool:
    """Whether a path has more than one part, and one that is no index."""
    return len(path) > 1 and not all(part.isdecimal() for part in path)


def _leaves(
    flat: Sequence[tuple[Any, Any]], statistics: Sequence[Path]
) -> tuple[Leaf, ...]:
    paths = [key_path(keys) for keys, _ in flat]
    collections = any(path[:1] == ("params",) for path in paths)
    leaves = []
    for path, (_, x) in zip(paths, flat):
        try:
            x = struct(x)
        except TypeError as error:
            raise GraphError(
                f"{path_str(path)} is no array but {type(x).__name__}; what is no "
                "number belongs in apply's other arguments, or in a closure"
            ) from error
        trained = jx.is_array(x) and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
        trained = trained and (path[:1] == ("params",) or not collections)
        trained = trained and path not in statistics
        leaves.append(Leaf(path, tuple(x.shape), str(x.dtype), trained))
    return tuple(leaves)


def _check_leaves(leaves: Sequence[Leaf]) -> None:
    if not any(leaf.shape for leaf in leaves):
        raise GraphError("variables hold no array; pass what apply takes first")
    seen: set[Path] = set()
    for leaf in leaves:
        if not leaf.path:
            raise GraphError("variables are one array; name it: {'kernel': array}")
        if leaf.path in seen:
            raise GraphError(
                f"two arrays of the variables are {path_str(leaf.path)}; rename one"
            )
        seen.add(leaf.path)


def _nnx_statistics(variables: PyTree) -> list[Path]:
    """Where an nnx state holds variables other than parameters."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return []
    flat, _ = jax.tree_util.tree_flatten_with_path(
        variables, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return [
        key_path(keys)
        for keys, x in flat
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param)
    ]


def _unread(program: jx.Program, count: int) -> list[int]:
    """Of the first `count` inputs, those that no equation and no output has."""
    atoms = [a for eqn in program.eqns for a in eqn.invars]
    read = {a for a in (*atoms, *program.outvars) if not jx.is_literal(a)}
    return [i for i, var in enumerate(program.invars[:count]) if var not in read]


def _finish(
    labels: Labels, tape: Tape, ins: Sequence[Value], states: Sequence[int | None]
) -> None:
    """The user's outputs are fixed; updated variables go with the variables."""
    for value, state in zip(tape.outs, states):
        for axis, line in enumerate(value.labels):
            if state is None:
                labels.freeze(line, OUTPUT)
            else:
                labels.unify(line, ins[state].labels[axis], OUTPUT)
