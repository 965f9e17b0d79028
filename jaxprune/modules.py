# SPDX-License-Identifier: Apache-2.0
"""Handing back plain modules: the user's own nnx module, at the widths that are left.

A module's code may do something else at other widths (a LayerNorm divides by another
count), so what comes out is compared with `slim` on a probe before it is handed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import matching
from jaxprune.base import Graph, GraphError, Keep, Path, PyTree
from jaxprune.slim import relative_error, slim


class _Resized(NamedTuple):
    """A variable that a module holds: dense and small shape, axes summed over."""

    dense: tuple[int, ...]
    small: tuple[int, ...]
    summed: frozenset[int]


def to_nnx(
    module: Any,
    graph: Graph,
    keep: Keep,
    variables: PyTree,
    *inputs: Any,
    **kwargs: Any,
) -> Any:
    """The user's nnx module with smaller variables, where that is what `slim` computes.

    A copy of `module` gets the shrunk variables, and its attributes that held a size
    (`in_features`, `num_features`, `kernel_shape` ...) the size that is left. Then both
    are run on the inputs.

    Args:
      module: the dense nnx.Module, in the mode in which it is to be compared; it is not
        changed.
      graph: of `nnx.merge(graphdef, state)(*inputs, **kwargs)` over the whole state.
      keep: {group: bool[C]}.
      variables: the shrunk nnx.State, as `jaxprune.shrink` returns it.
      inputs: the probe; a ShapeDtypeStruct stands for standard normal numbers.
      kwargs: for the module's call.

    Raises:
      GraphError: the module's own code does not reproduce `slim` at these widths; the
        message says what happened. `slim` is always right.
    """
    from flax import nnx

    definition, state = nnx.split(module)
    del state

    def apply(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        return nnx.merge(definition, variables)(*inputs, **kwargs)

    probe = [_probe(x, i) for i, x in enumerate(inputs)]
    want = slim(apply, graph, keep)(variables, *probe, **kwargs)
    small = _resized(module, graph, keep, variables)
    try:
        got = nnx.clone(small)(*probe, **kwargs)  # a call may change statistics
    except Exception as error:  # any error of the user's own code at these widths
        raise _refusal(f"its code fails: {type(error).__name__}: {error}") from error
    _compare(want, got)
    return small


def _resized(module: Any, graph: Graph, keep: Keep, variables: PyTree) -> Any:
    """A copy with the shrunk variables and the sizes among its attributes changed."""
    from flax import nnx

    small = nnx.clone(module)
    nnx.update(small, variables)
    kept = matching.kept_indices(graph, keep)
    summed = {
        (slot.path, slot.axis)
        for group in graph.groups.values()
        for slot in group.slots
        if slot.role == "in"
    }
    held: dict[Path, list[_Resized]] = {}
    for leaf, cut in zip(graph.leaves, kept):
        shape = tuple(
            n if k is None else len(k) for n, k in zip(leaf.shape, cut, strict=True)
        )
        axes = frozenset(a for a in range(len(shape)) if (leaf.path, a) in summed)
        held.setdefault(leaf.path[:-1], []).append(_Resized(leaf.shape, shape, axes))
    for path, part in nnx.iter_modules(small):
        mine = held.get(tuple(map(str, path)), [])
        if any(v.dense != v.small for v in mine):
            _fix_attributes(part, mine)
    return small


def _fix_attributes(part: Any, held: Sequence[_Resized]) -> None:
    for name, value in list(vars(part).items()):
        if name.startswith("_") or isinstance(value, bool):
            continue
        if isinstance(value, int | np.integer):
            new: Any = _new_size(name, int(value), held)
        elif isinstance(value, tuple) and all(type(n) is int for n in value):
            new = _new_sizes(value, held)
        else:
            continue
        if new != value:
            setattr(part, name, new)


def _new_size(name: str, size: int, held: Sequence[_Resized]) -> int:
    """The one size that `size` has become, by the attribute's name where there are two.

    `in_features` is the length of an axis that is summed over, `out_features` and
    `num_features` are not.
    """
    axes = [
        (small, axis in v.summed)
        for v in held
        for axis, (dense, small) in enumerate(zip(v.dense, v.small))
        if dense == size
    ]
    sizes = {small for small, _ in axes}
    if len(sizes) > 1:
        inner = name.startswith("in")
        sizes = {small for small, summed in axes if summed == inner}
    return sizes.pop() if len(sizes) == 1 else size


def _new_sizes(sizes: tuple[int, ...], held: Sequence[_Resized]) -> tuple[int, ...]:
    """Sizes that are part of a variable's shape, as they are now."""
    n = len(sizes)
    for v in held:
        for start in range(len(v.dense) - n + 1 if n > 1 else 0):
            if v.dense[start : start + n] == sizes:
                return v.small[start : start + n]
    return sizes


def _probe(x: Any, number: int) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.random.normal(jax.random.key(number), x.shape, x.dtype)
    return jnp.zeros(x.shape, x.dtype)


def _compare(want: PyTree, got: PyTree) -> None:
    wanted, gotten = jax.tree.leaves(want), jax.tree.leaves(got)
    shapes = [np.shape(x) for x in wanted], [np.shape(x) for x in gotten]
    if shapes[0] != shapes[1]:
        raise _refusal(f"its outputs have shapes {shapes[1]}, slim's {shapes[0]}")
    for a, b in zip(wanted, gotten):
        a, b = np.asarray(a), np.asarray(b)
        error = relative_error(a, b)
        # Rounding grows with depth; what is another function is off by far more.
        allowed = (
            0.3 * float(jnp.finfo(a.dtype).eps) ** 0.5 if a.dtype.kind in "fcV" else 0
        )
        if error > allowed:
            raise _refusal(f"its output is off by {error:.2g} of the largest value")


def _refusal(what: str) -> GraphError:
    return GraphError(
        f"the module cannot be rebuilt at these widths: {what}. Use jaxprune.slim, "
        "which runs the dense module's program on the small variables"
    )
