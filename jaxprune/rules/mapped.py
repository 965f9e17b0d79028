# SPDX-License-Identifier: Apache-2.0
"""Programs that each device runs on its shard, and what the devices exchange.

An axis that is laid over devices is not cut, so that every shard stays as long as the
others; the rest of an array is the same on all of them, its removed indices too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxprune import jaxpr as jx
from jaxprune.labels import Value, fixed, unknown
from jaxprune.walk import Context, Cut, Rule, rebind


def _shard_map(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> Any:
    """Every shard costs; what devices do alike, for nothing is split, costs once."""
    p = eqn.params
    over = {name for spec in (*p["in_specs"], *p["out_specs"]) for name in _axes(spec)}
    inside = [_whole(context, eqn, v, s) for v, s in zip(ins, p["in_specs"])]
    inner = dataclasses.replace(context, labels=context.labels.scratch())
    tape = inner.walk(jx.program(p["jaxpr"]), inside)
    shards = math.prod(p["mesh"].shape[name] for name in over)
    inner.labels.terms = [
        term._replace(coefficient=term.coefficient * shards)
        for term in inner.labels.terms
    ]
    context.labels.absorb(inner.labels)
    outs = [_whole(context, eqn, v, s) for v, s in zip(tape.outs, p["out_specs"])]
    return outs, tape


def _axes(spec: Any) -> list[str]:
    """The axes of the mesh that a PartitionSpec names."""
    parts = [part if isinstance(part, tuple) else (part,) for part in spec]
    return [name for part in parts for name in part if name is not None]


def _whole(context: Context, eqn: jx.Eqn, value: Value, spec: Any) -> Value:
    """The value without the labels of axes that a PartitionSpec lays over devices."""
    labels = list(value.labels)
    for axis, over in enumerate(spec):
        if over is not None and over != ():
            context.labels.freeze(labels[axis], jx.Site(eqn))
            labels[axis] = None
    return value._replace(labels=tuple(labels))


def _rewrite_shard_map(cut: Cut) -> list[Any]:
    (cut, operands), p = cut.parts(), cut.eqn.params

    def body(*args: Any) -> tuple[Any, ...]:
        return tuple(cut.run(cut.node.aux, *args))

    mapped = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=tuple(p["out_specs"]),
        axis_names=set(p["newly_manual_axes"]),
        check_vma=p["check_vma"],
    )
    return list(mapped(*operands))


def _exchange(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Each element with those of the same place on other devices.

    Where all of them hold 0 the sum does too, and what nobody sends is 0; of several
    equal numbers that number is the largest and the least.
    """
    del context
    keeps = eqn.primitive.name in ("pmax", "pmin", "pvary")
    outs = []
    for value in ins:
        fill = tuple(f if keeps or f == 0 else unknown(f) for f in value.held())
        leaf = value.leaf if eqn.primitive.name == "pvary" else None
        outs.append(Value(value.labels, fill, value.const if keeps else None, leaf))
    return outs


def _all_gather(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """What the devices hold end to end, or along a new axis."""
    (value,), axis = ins, eqn.params["all_gather_dimension"]
    labels, fill = list(value.labels), list(value.held())
    if eqn.params["tiled"]:
        context.labels.freeze(labels[axis], jx.Site(eqn))
        labels[axis] = None
    else:
        labels.insert(axis, None)
        fill.insert(axis, None)
    return [Value(tuple(labels), tuple(fill), value.const)]


def _place(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Which device it is: a number."""
    del context, eqn, ins
    return [fixed(0)]


RULES = {
    "shard_map": Rule(_shard_map, _rewrite_shard_map),
    "all_gather": Rule(_all_gather, rebind),
    "axis_index": Rule(_place, rebind),
    **{
        name: Rule(_exchange, rebind)
        for name in ("pmax", "pmin", "ppermute", "psum", "psum_invariant", "pvary")
    },
}
