# SPDX-License-Identifier: Apache-2.0
"""Costs and the weights of a penalty as functions of live counts, in a jitted step.

Counts are {group: number of live channels}, traced or not. The polynomials of `cost`
and the tables of `latency` are evaluated in the graph: nothing leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budget, trees
from jaxprune.base import (
    BOTH,
    ConfigError,
    Extent,
    Graph,
    GraphError,
    Path,
    Role,
    Scores,
    check_roles,
)
from jaxprune.cost import parameter_extents, summands
from jaxprune.criteria import check_scores
from jaxprune.sharded import fetched

Counts = Mapping[str, Any]
Repriced = Callable[[Counts], Mapping[str, Any]]
Weights = Mapping[str, Any] | Repriced


def flops_weights(
    graph: Graph,
    kind: budget.Kind = "flops",
    *,
    roles: tuple[Role, ...] = BOTH,
    gates: bool = False,
) -> dict[str, np.ndarray]:
    """Weights {group: float[C]} that make the penalty paid in FLOPs (or another cost).

    sqrt(entries in theta[g,c]) times the cost of a channel at the dense network, the
    latter relative to its mean over all channels. gates: the cost alone, for a gate is
    one number. kind: as of a budget, or what `timings` measured, so that milliseconds
    pay. See `repriced` for the network as it is by then. Raises BudgetError for an
    unknown kind, or one that the dense network has nothing of.
    """
    share = budget.marginal(graph, kind)
    # 1 where no channel has a part in the cost, and all weights are 0.
    mean = share @ budget.sizes(graph) / max(graph.channels, 1) or 1.0
    counts = trees.channel_count(graph, roles=roles)
    if gates:
        counts = {n: np.ones_like(count) for n, count in counts.items()}
    return {n: np.sqrt(counts[n]) * s / mean for n, s in zip(graph.groups, share)}


def repriced(
    graph: Graph,
    kind: budget.Kind | None = "flops",
    *,
    roles: tuple[Role, ...] = BOTH,
    gates: bool = False,
) -> Repriced:
    """Weights that follow the network as channels die, evaluated in the jitted step.

    At every step they are those that `flops_weights` gives for the network cut to its
    live channels: sqrt(live entries in theta[g,c]) times what a channel costs *now*,
    relative to its mean over live channels. A channel gets cheaper as its neighbours
    die, and the penalty moves on to where the cost is. With kind None, sqrt(live
    entries) alone. gates: without the entries, as for `flops_weights`.

    Pass the result as `weights` of `group_lasso`, `proximal`, `proximal_gates`, .... A
    cost of one's own must be written in jax.numpy. Raises BudgetError as
    `flops_weights` does, ConfigError for unknown roles.
    """
    check_roles(roles)
    entries_of = _live_entries(graph, roles)

    def size(live: Counts) -> Mapping[str, Any]:
        return dict.fromkeys(graph.groups, 1.0) if gates else entries_of(live)

    if kind is None:
        return lambda live: {n: jnp.sqrt(s) for n, s in size(live).items()}
    budget.marginal(graph, kind)
    parts = _parts(graph, kind)

    def weights(live: Counts) -> dict[str, jax.Array]:
        kept = _stacked(graph, live)
        cut = budget.cuts(jnp, kind, kept)
        # Term by term: what a channel has no part in cancels exactly.
        saved = parts(kept) - parts(kept - cut[..., None] * jnp.eye(len(kept)))
        price = (saved.sum(axis=-1) / cut).max(axis=0)
        mean = jnp.sum(price * kept) / jnp.sum(kept)
        price = price / jnp.where(mean > 0, mean, 1)
        entries = size(live)
        return {n: jnp.sqrt(entries[n]) * p for n, p in zip(graph.groups, price)}

    return weights


def adaptive(
    graph: Graph,
    scores: Scores,
    weights: Weights | None = None,
    *,
    power: float = 1.0,
    roles: tuple[Role, ...] = BOTH,
) -> Weights:
    """Weights of the adaptive lasso: those given, over importance^power.

    A lasso that kills most channels shrinks those that stay nearly as much. With
    `scores` that rank the dense network's channels, such as `score(taylor(), ...)`,
    what matters is penalised little, and what does not fades while the rest adapts.
    With weights paid in FLOPs, a channel dies at a strength of (its weights' root mean
    square) * importance / cost, much as links of the path go. Scores count relative to
    their mean over all channels, those under a millionth of it as that. weights: sqrt
    of the number of entries by default; of `repriced`, what follows the live channels
    still does. power 0 changes nothing.

    Raises GraphError for scores that do not fit the graph, are not finite, negative, or
    all 0; ConfigError for a power that is not in [0, 4].

    Source: Zou, "The adaptive lasso and its oracle properties", 2006, eq. 4; of groups:
    Wang & Leng, "A note on adaptive group lasso", 2008.
    """
    if not 0 <= power <= 4:
        raise ConfigError(f"adaptive: power={power!r} must be in [0, 4]")
    scores = check_scores(graph, scores)
    if not scores:
        return {}
    every = np.concatenate([np.float64(s) for s in scores.values()])
    if (every < 0).any() or not every.any():
        raise GraphError("adaptive: scores must not be negative, nor all 0")
    factors = {
        n: np.maximum(np.float64(s) / every.mean(), 1e-6) ** -power
        for n, s in scores.items()
    }
    if callable(weights):
        later = weights
        return lambda live: {n: w * factors[n] for n, w in later(live).items()}
    own = resolved(graph, weights, roles, dict)
    return {n: w * factors[n] for n, w in own.items()}


def live_cost(
    graph: Graph, kind: budget.Kind = "flops"
) -> Callable[[Counts], jax.Array]:
    """counts -> the fraction of the dense cost of `kind` that they carry, float32[].

    Raises BudgetError for an unknown kind, or one that the dense network has nothing
    of.
    """
    budget.marginal(graph, kind)
    parts = _parts(graph, kind)
    return lambda live: parts(_stacked(graph, live)).sum(axis=-1)


def resolved(
    graph: Graph,
    weights: Weights | None,
    roles: tuple[Role, ...],
    live: Callable[[], Counts],
) -> dict[str, Any]:
    """{group: float or float[C]}; sqrt(entries) for None, of `live()` where repriced.

    Raises GraphError for weights that do not fit the graph.
    """
    if weights is None:
        counts = trees.channel_count(graph, roles=roles)
        return {n: np.sqrt(c) for n, c in counts.items()}
    found = weights(live()) if callable(weights) else weights
    return checked_weights({n: g.size for n, g in graph.groups.items()}, found)


def concrete(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights, in NumPy where their numbers are known."""

    def known(x: Any) -> bool:
        return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)

    return {n: fetched(w) if known(w) else w for n, w in weights.items()}


def checked_weights(sizes: Mapping[str, int], weights: Any) -> dict[str, Any]:
    """The weights in the groups' order; GraphError for such as are no penalty's."""
    found = fitting(sizes, weights, "weights")
    for name, weight in found.items():
        known = isinstance(weight, np.ndarray | np.generic | int | float)
        if known and not np.all((np.asarray(weight) >= 0) & np.isfinite(weight)):
            raise GraphError(
                f"weights of group {name!r} are negative, infinite, or no numbers"
            )
    return found


def fitting(
    sizes: Mapping[str, int], values: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """The values of groups of these sizes, in their order; else GraphError."""
    if not isinstance(values, Mapping):
        raise GraphError(
            f"{what}={values!r:.80}: say of which group, {{group: float or float[C]}}"
        )
    for name in values:
        if name not in sizes:
            raise GraphError(f"{what} name group {name!r}, which the graph lacks")
    for name, size in sizes.items():
        if name not in values:
            raise GraphError(f"{what} lack group {name!r} (float[{size}])")
        shape = np.shape(values[name])
        if shape not in ((), (size,)):
            raise GraphError(
                f"group {name!r} has {size} channels, its {what} have shape {shape}"
            )
    return {n: values[n] for n in sizes}


def _stacked(graph: Graph, live: Counts) -> jax.Array:
    """float32[G] in the graph's order."""
    counts = [jnp.asarray(live[n], jnp.float32) for n in graph.groups]
    return jnp.stack(counts) if counts else jnp.zeros(0)


def _parts(graph: Graph, kind: budget.Kind) -> Callable[[jax.Array], jax.Array]:
    """Summands of a cost, float32[..., T], as fractions of the dense network's."""
    if kind == "channels":
        return lambda kept: kept / max(graph.channels, 1)
    if isinstance(kind, str):
        return summands(graph, "activation_bytes" if kind == "bytes" else kind)
    dense = float(kind.at(list(graph.groups), budget.sizes(graph)))
    names = list(graph.groups)
    if hasattr(kind, "summands"):
        return lambda kept: kind.summands(names, kept) / dense
    return lambda kept: jnp.float32(kind.at(names, kept))[..., None] / dense


def _live_entries(
    graph: Graph, roles: tuple[Role, ...]
) -> Callable[[Counts], dict[str, Any]]:
    """counts -> {group: trained entries of one of its channels}, of live ones alone."""
    trained = [leaf.path for leaf in graph.leaves if leaf.trained]
    axes = dict(zip(trained, parameter_extents(graph), strict=True))
    # {group: {path: {axis: indices of each channel}}}
    own: dict[str, dict[Path, dict[int, int]]] = {}
    for name, group in graph.groups.items():
        parts = own.setdefault(name, {})
        for slot in group.slots:
            if slot.path in axes and slot.role in roles:
                columns = parts.setdefault(slot.path, {})
                times = slot.indices.shape[1]
                columns[slot.axis] = columns.get(slot.axis, 0) + times

    def length(extent: Extent, live: Counts) -> Any:
        return extent.fixed + sum(times * live[g] for g, times in extent.groups)

    def of(live: Counts) -> dict[str, Any]:
        live = {n: jnp.asarray(c, jnp.float32) for n, c in live.items()}
        found: dict[str, Any] = {}
        for name, parts in own.items():
            total = jnp.zeros(())
            for path, columns in parts.items():
                lengths = [length(e, live) for e in axes[path]]
                for axis, times in columns.items():
                    lengths[axis], whole = times, lengths[axis]
                    total += math.prod(lengths)
                    # What lies on a later axis, too, was counted here.
                    lengths[axis] = whole - times
            found[name] = total
        return found

    return of
