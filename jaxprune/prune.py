# SPDX-License-Identifier: Apache-2.0
"""`prune`: trace, score, select, shrink and slim in one call."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax

from jaxprune import budget as budgets
from jaxprune import peers
from jaxprune.base import Apply, PyTree
from jaxprune.budget import Budget
from jaxprune.criteria import Criterion, Loss, chain, normalize, score
from jaxprune.latency import Unmeasured, latency, timings
from jaxprune.measures import magnitude
from jaxprune.pruned import Pruned
from jaxprune.select import MultipleOf, select
from jaxprune.slim import slim
from jaxprune.trace import trace
from jaxprune.trees import shrink


def prune(
    apply: Apply,
    variables: PyTree,
    *inputs: Any,
    budget: Budget,
    criterion: Criterion | None = None,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    key: jax.Array | None = None,
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
    scope: Literal["global", "local"] = "global",
    overrides: Mapping[str, float | bool] | None = None,
    exact: bool = True,
    **kwargs: Any,
) -> Pruned:
    """Prune a trained network to a budget: all of the core in one call.

    apply, variables, inputs, exact and kwargs (which go to apply as static, such as
    train=False): as for `trace`. criterion (by default `magnitude()`, normalised so
    that groups compare), loss, batches and key: as for `score`. The rest: as for
    `select`, but that latency(ratio) is measured here, for these inputs.

    Returns Pruned(apply, variables, graph, keep) with the slimmed apply and the shrunk
    variables. Raises what those functions raise.
    """
    budgets.check(budget)
    graph = trace(apply, variables, *inputs, exact=exact, **kwargs)
    measured = isinstance(budget.kind, Unmeasured)
    if measured:
        plain = functools.partial(apply, **kwargs)
        budget = latency(budget.ratio, timings(plain, graph, variables, *inputs))
    scores = score(
        criterion or chain(magnitude(), normalize()),
        graph,
        variables,
        loss=loss,
        batches=batches,
        key=key,
    )
    keep = select(
        graph,
        scores,
        budget,
        multiple_of=multiple_of,
        min_channels=min_channels,
        scope=scope,
        overrides=overrides,
    )
    if measured:  # clocks differ, and all processes must cut alike
        keep = peers.first_says(keep)
    small = shrink(graph, keep, variables)
    return Pruned(slim(apply, graph, keep), small, graph, keep)
