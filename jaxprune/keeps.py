# SPDX-License-Identifier: Apache-2.0
"""What a keep is, {group: bool[C]}: checked against a graph, and composed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.base import Graph, GraphError, Group, Keep


def compose(keep1: Keep, keep2: Keep) -> dict[str, np.ndarray]:
    """The keep of the dense network that cuts by `keep1`, then `keep2` out of the rest.

    keep2[g] is bool[number of True in keep1[g]], both are concrete. Raises GraphError
    naming a group that only one of them has, that is not bool, or does not fit.
    """
    for keep in (keep1, keep2):
        if not isinstance(keep, Mapping):
            raise GraphError(
                f"a keep is {{group name: bool[C]}}, not {type(keep).__name__}"
            )
    for name in (*keep1, *keep2):
        if name not in keep1 or name not in keep2:
            which = "first" if name not in keep1 else "second"
            raise GraphError(f"the {which} keep lacks group {name!r}")
    composed = {}
    for name in keep1:
        given = keep1[name], keep2[name]
        if any(isinstance(value, jax.core.Tracer) for value in given):
            raise GraphError(
                f"group {name!r}: a keep is traced, but shapes depend on it; compose "
                "concrete keeps, outside of jit"
            )
        first, second = map(np.array, given)
        for value in (first, second):
            if value.dtype != bool or value.ndim != 1:
                raise GraphError(
                    f"group {name!r}: a keep is bool[C], this one is {value.dtype} of "
                    f"shape {value.shape}"
                )
        if second.shape != (first.sum(),):
            raise GraphError(
                f"group {name!r}: the first keep leaves {first.sum()} channels, the "
                f"second one is for shape {second.shape}"
            )
        composed[name] = np.zeros_like(first)
        composed[name][np.flatnonzero(first)[second]] = True
    return composed


def check_keep(graph: Graph, keep: Keep, *, concrete: bool = False) -> dict[str, Any]:
    """The keep as bool arrays in the graph's order.

    Raises GraphError that names the first group which is missing, unknown, of another
    size or emptied.
    """
    if not isinstance(keep, Mapping):
        raise GraphError(
            f"a keep is {{group name: bool[C]}}, not {type(keep).__name__}; "
            "jaxprune.select returns one, graph.full() keeps everything"
        )
    for name in keep:
        if name not in graph.groups:
            near = difflib.get_close_matches(str(name), graph.groups, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise GraphError(f"keep names group {name!r}, which the graph lacks{hint}")
    checked = {}
    for name, group in graph.groups.items():
        if name not in keep:
            raise GraphError(f"keep lacks group {name!r} (bool[{group.size}])")
        checked[name] = _check_channels(group, keep[name], concrete)
    return checked


def _check_channels(group: Group, value: Any, concrete: bool) -> Any:
    if isinstance(value, jax.core.Tracer):
        if concrete:
            raise GraphError(
                f"group {group.name!r}: the keep is traced, but shapes depend on it; "
                "pass a concrete keep, or use mask inside jit"
            )
    else:
        value = np.asarray(value)
    if value.shape != (group.size,):
        raise GraphError(
            f"group {group.name!r} has {group.size} channels, its keep has shape "
            f"{value.shape}"
        )
    if value.dtype != bool:
        raise GraphError(
            f"group {group.name!r}: a keep is bool, this one is {value.dtype}; for "
            "soft masks see jaxprune.gate"
        )
    if isinstance(value, np.ndarray) and not value.any():
        raise GraphError(
            f"group {group.name!r}: keep removes all {group.size} channels; keep at "
            "least one"
        )
    return value
