# SPDX-License-Identifier: Apache-2.0
"""The post-pruning path: a trained network is cut back by cost complexity.

As CART prunes a tree (Breiman et al., "Classification and regression trees", 1984), the
weakest link goes first: the channels with the least increase of the loss per cost
saved. The networks T0 > T1 > ... are nested; alpha, the ratio at which each is cut from
the one before, rises along the path.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budget as budgets
from jaxprune.base import ConfigError, DataError, Graph, Keep, PyTree
from jaxprune.budget import Budget
from jaxprune.cost import cost
from jaxprune.criteria import Criterion, Loss, scorer
from jaxprune.measures import taylor
from jaxprune.select import MultipleOf, allowed_counts
from jaxprune.steps import Path, Step
from jaxprune.trees import mask

Risk = Callable[[PyTree, Any], Any]


def prune_path(
    graph: Graph,
    variables: PyTree,
    loss: Loss,
    batches: Iterable[Any],
    *,
    risk: Risk | None = None,
    validation: Iterable[Any] | None = None,
    block: float = 0.05,
    until: Budget | None = None,
    kind: budgets.Kind = "flops",
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
    criterion: Criterion | None = None,
    key: jax.Array | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Path:
    """Weakest-link pruning of a trained network, from dense until nothing may be cut.

    Before each block, the criterion estimates on the masked network what the loss gains
    when a channel goes, dR; then units of `multiple_of` channels, those with least dR
    first, are cut from the group with the least dR/dC, where dC is the fraction of the
    dense cost that this saves now (as far as `until` asks for it), until the block is
    full. A block's alpha is its
    dR/dC, or that of the block before where that is larger: the block would have been
    cut along with it. So alphas rise, as CART's do, and of steps with equal alpha the
    last is the one that minimises risk + alpha * cost.

    Args:
      graph: of the dense network; variables: trained, dense.
      loss: loss(variables, batch) -> scalar, for the criterion.
      batches: a finite iterable, kept in memory and used before every block.
      risk: risk(variables, batch) -> [B], one per image, or ([B], bool[B] which count);
        by default the loss, one a batch.
      validation: batches for the risk; `batches` by default.
      block: the fraction of the dense cost to cut between two estimates; 0: one unit.
      until: stop when this is met; otherwise when nothing may be cut.
      kind: of the cost.
      multiple_of, min_channels: as for `select`.
      criterion: `taylor()` by default.
      key: for a criterion that draws random numbers.
      on_step: called with every step, as soon as it is known.

    Raises ConfigError, BudgetError, DataError or GraphError for malformed arguments.

    The masked loss and risk are compiled once for the whole path.
    """
    if not 0 <= block < 1:
        raise ConfigError(
            f"block={block!r}: the fraction of the cost per step, in [0, 1)"
        )
    dense = float(budgets.measure(graph, kind, budgets.sizes(graph)))
    allowed = allowed_counts(graph, multiple_of, min_channels)
    batches = _finite(batches, "batches")
    held = batches if validation is None else _finite(validation, "validation")
    estimate = scorer(criterion or taylor(), graph, loss)
    evaluate = evaluator(graph, risk or loss)

    def walk() -> Iterator[Step]:
        keep, alpha = graph.full(), 0.0
        while True:
            yield Step(alpha, keep, cost(graph, keep), *evaluate(keep, variables, held))
            if until is not None and _met(graph, keep, until):
                return
            rises = estimate(variables, batches=batches, key=key, keep=keep)
            excess = _excess(graph, keep, until, kind)
            target = min(block * dense, excess)
            keep, rise, saved = _cut(graph, keep, rises, allowed, kind, target, excess)
            if not saved:
                return
            alpha = max(alpha, rise * dense / saved)

    steps = []
    for step in walk():
        steps.append(step)
        if on_step is not None:
            on_step(step)
    return Path(tuple(steps))


def _cut(
    graph: Graph,
    keep: Keep,
    rises: dict[str, np.ndarray],
    allowed: dict[str, np.ndarray],
    kind: budgets.Kind,
    target: float,
    excess: float,
) -> tuple[dict[str, np.ndarray], float, float]:
    """Cut the weakest units until `target` is saved: (keep, dR of all, cost saved).

    What a unit saves beyond the `excess` over the budget is worth nothing.
    """
    order, total = [], []
    for name, stays in keep.items():
        remaining = np.flatnonzero(stays)
        weakest = remaining[np.argsort(rises[name][remaining], kind="stable")]
        order.append(weakest)
        total.append(np.append(0.0, np.cumsum(rises[name][weakest], dtype=float)))
    start = np.array([len(o) for o in order])
    kept, saved = start.copy(), 0.0
    now = before = float(budgets.measure(graph, kind, kept))
    while saved < target or saved == 0:
        lower, saving = _units(graph, kept, allowed, kind, now)
        trial = kept - np.diag(kept - lower)
        rise = [t[s - x] - t[s - k] for t, s, x, k in zip(total, start, lower, kept)]
        worth = np.minimum(saving, excess - saved)
        ratio = np.divide(rise, worth, out=np.full(len(kept), np.inf), where=worth > 0)
        if not np.isfinite(ratio).any():
            break
        kept = trial[ratio.argmin()]
        now = float(budgets.measure(graph, kind, kept))
        saved = before - now
    keep = {n: k.copy() for n, k in keep.items()}
    for stays, weakest, cut in zip(keep.values(), order, start - kept):
        stays[weakest[:cut]] = False
    rise = sum(t[c] for t, c in zip(total, start - kept))
    return keep, float(rise), saved


def _units(
    graph: Graph,
    kept: np.ndarray,
    allowed: dict[str, np.ndarray],
    kind: budgets.Kind,
    now: float,
) -> tuple[np.ndarray, np.ndarray]:
    """To what each group falls by a unit, and what that saves.

    A unit is made wider where it saves nothing, as measured time does that is flat.
    """
    lower = kept
    saving = np.zeros(len(kept))
    while True:
        flat = saving <= 0
        next_ = [_next_lower(a, k) for a, k in zip(allowed.values(), lower)]
        wider = np.where(flat, next_, lower)
        if np.array_equal(wider, lower):
            return lower, saving
        lower = wider
        trial = kept - np.diag(kept - lower)
        saving = now - budgets.measure(graph, kind, trial)


def _next_lower(counts: np.ndarray, kept: int) -> int:
    """The largest allowed count below `kept`, or `kept` itself where there is none."""
    below = counts[counts < kept]
    return int(below[-1]) if len(below) else int(kept)


def evaluator(graph: Graph, risk: Risk) -> Callable[..., tuple[float, float]]:
    """(keep, variables, batches) -> mean risk and its standard error; traced once."""

    @jax.jit
    def risks(keep: Keep, variables: PyTree, batch: Any) -> tuple[jax.Array, jax.Array]:
        result = risk(mask(graph, keep, variables), batch)
        values, counts = result if isinstance(result, tuple) else (result, None)
        values = jnp.atleast_1d(values)
        return values, jnp.ones(values.shape, bool) if counts is None else counts

    def evaluate(keep: Keep, variables: PyTree, batches: Any) -> tuple[float, float]:
        parts = [jax.device_get(risks(keep, variables, b)) for b in batches]
        values = np.concatenate([v[c.astype(bool)] for v, c in parts]).astype(
            np.float64
        )
        if not len(values):
            raise DataError("the risk counts no image of the validation batches")
        spread = values.std(ddof=1) if len(values) > 1 else 0.0
        return float(values.mean()), float(spread / math.sqrt(len(values)))

    return evaluate


def _finite(batches: Iterable[Any], what: str) -> list[Any]:
    batches = list(batches)
    if not batches:
        raise DataError(f"{what} is empty (or an iterator that was used up before)")
    return batches


def _excess(
    graph: Graph, keep: Keep, until: Budget | None, kind: budgets.Kind
) -> float:
    """What is still over the budget, so that the last block does not cut far below."""
    if until is None or until.kind != kind:
        return math.inf
    kept = np.array([k.sum() for k in keep.values()])
    return float(budgets.measure(graph, kind, kept)) - budgets.limit(graph, until)


def _met(graph: Graph, keep: Keep, budget: Budget) -> bool:
    kept = np.array([k.sum() for k in keep.values()])
    within = budgets.measure(graph, budget.kind, kept) <= budgets.limit(graph, budget)
    return bool(within)
