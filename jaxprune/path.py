# SPDX-License-Identifier: Apache-2.0
"""The post-pruning path: a trained network is cut back by cost complexity.

As CART prunes a tree (Breiman et al., "Classification and regression trees", 1984), the
weakest link goes first: the channels with the least increase of the loss per cost
saved. The networks T0 > T1 > ... are nested; alpha, the ratio at which each is cut from
the one before, rises along the path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import budget as budgets
from jaxprune import graph_io, path_io, risks, weakest
from jaxprune.base import ConfigError, DataError, Graph, GraphError, Keep, PyTree
from jaxprune.budget import Budget
from jaxprune.cost import cost
from jaxprune.criteria import Criterion, Loss, check_key, scorer
from jaxprune.measures import taylor
from jaxprune.risks import Risk, finite
from jaxprune.select import MultipleOf, allowed_counts, check_budget
from jaxprune.steps import Path, Step
from jaxprune.trees import mask

Recover = Callable[[Step, PyTree], PyTree]


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
    kind: budgets.Kind | None = None,
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
    criterion: Criterion | None = None,
    measured: bool = False,
    recover: Recover | None = None,
    file: str | os.PathLike[str] | None = None,
    key: jax.Array | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Path:
    """Weakest-link pruning of a trained network, from dense until nothing may be cut.

    Before each block, the criterion estimates on the masked network what the loss gains
    when a channel goes, dR; then units of `multiple_of` channels, those with least dR
    first, are cut from the group with the least dR/dC, where dC is the fraction of the
    dense cost that this saves now (as far as `until` asks for it), until the block is
    full. A block's alpha is its dR/dC, or that of the block before where that is
    larger: the block would have been cut along with it. So alphas rise, as CART's do,
    and of steps with equal alpha the last is the one that minimises risk +
    alpha * cost, as far as dR is a loss: with measured=True it is, and of `taylor(1)`
    and `fisher()` with roles=('in',) an estimate of it. The default squares it, so that
    its alphas order the cuts and have no unit. Where a block's own ratio is the less
    one, the two together pay from the ratio of their sums on, which lies between.

    Args:
      graph: of the dense network; variables: trained, dense.
      loss: loss(variables, batch) -> scalar, for the criterion.
      batches: a finite iterable, kept in memory and used before every block.
      risk: risk(variables, batch) -> [B], one per image, or ([B], bool[B] which count),
        or, with {name: array} to be summed over the batches (`Step.sums`), all three;
        by default the loss, one a batch.
      validation: batches for the risk; `batches` by default.
      block: the fraction of the dense cost to cut between two estimates; 0: one unit.
      until: stop when this is met; otherwise when nothing may be cut.
      kind: of the cost; by default that of `until`, or FLOPs.
      multiple_of, min_channels: as for `select`.
      criterion: `taylor()` by default; `taylor(1)`, `fisher()`, `measured()` and
        `reconstruction_error()` estimate a rise as well.
      measured: the criterion only ranks the channels of a group. dR of the units that
        are next in each is what the mean loss over `batches` gains without them: a pass
        over `batches` for every group and for every unit cut. Units without which it
        is not finite stay.
      recover: recover(step, variables) -> variables, of the same shapes, behind every
        block: `variables` retrained for a while. They come masked, at dense shapes, and
        are masked again when they are back; `step` has the risk before. The walk goes
        on from what it returns, and the step's risk is evaluated anew.
      file: every step is kept there at once, and a walk that was stopped goes on behind
        the last one, to the same path; see `Path.load`. Arrays and numbers are compared
        with those that it began with; that the functions and the criterion are the same
        is up to you. With `recover`, each step's shrunk variables lie beside it
        (`path_io.load_variables`).
      key: for a criterion that draws random numbers; folded with the step's number.
      on_step: called with every new step, as soon as it is known.

    Raises ConfigError, BudgetError, DataError or GraphError for malformed arguments:
    before any work for an `until` that no cut meets, and for a file of another walk;
    DataError for a dense network whose risk is not finite, GraphError for estimates
    that are not.

    The masked loss and risk are compiled once for the whole path.
    """
    if not 0 <= block < 1:
        raise ConfigError(
            f"block={block!r}: the fraction of the cost per step, in [0, 1)"
        )
    if until is not None:
        check_budget(graph, until, multiple_of, min_channels)
    if key is not None:
        check_key("prune_path", key)
    batches = finite(batches)
    held = batches if validation is None else finite(validation, "validation")
    risk_of = risks.evaluator(graph, risk or loss)
    loss_of = risk_of if risk is None else risks.evaluator(graph, loss)
    walk = _Walk(
        graph,
        batches,
        held,
        scorer(criterion or taylor(), graph, loss),
        loss_of if measured else None,
        risk_of,
        recover,
        allowed_counts(graph, multiple_of, min_channels),
        kind or (until.kind if until else "flops"),
        block,
        until,
        key,
    )
    steps: list[Step] = []
    if file is not None:
        steps += path_io.resume(file, _described(walk, variables))
        if recover is not None and len(steps) > 1:
            last = len(steps) - 1, steps[-1]
            variables = path_io.masked_variables(graph, file, *last, variables)
    while (found := _next(walk, steps, variables)) is not None:
        step, variables = found
        if file is not None:
            if recover is not None and steps:
                path_io.save_variables(graph, file, len(steps), step, variables)
            path_io.append(file, step)
        steps.append(step)
        if on_step is not None:
            on_step(step)
    return Path(tuple(steps))


class _Walk(NamedTuple):
    """What stays the same along a path."""

    graph: Graph
    batches: list[Any]
    held: list[Any]
    estimate: Callable[..., dict[str, np.ndarray]]
    measure: Callable[..., risks.Found] | None
    evaluate: Callable[..., risks.Found]
    recover: Recover | None
    allowed: dict[str, np.ndarray]
    kind: budgets.Kind
    block: float
    until: Budget | None
    key: jax.Array | None


def _next(
    walk: _Walk, steps: Sequence[Step], variables: PyTree
) -> tuple[Step, PyTree] | None:
    """The step behind these and its variables; None where the path ends."""
    if not steps:
        step = _looked_at(walk, 0.0, walk.graph.full(), variables)
        if not math.isfinite(step.risk):
            raise DataError(
                f"the risk of the dense network is {step.risk}; are weights, risk and "
                "validation batches finite?"
            )
        return step, variables
    last = steps[-1]
    if walk.until is not None and budgets.met(walk.graph, last.keep, walk.until):
        return None
    link = _weakest(walk, last.keep, len(steps), variables)
    if link is None:
        return None
    alpha = max(last.alpha, link.rise * _dense(walk) / link.saved)
    step = _looked_at(walk, alpha, link.keep, variables)
    if walk.recover is not None:
        variables = _recovered(walk.graph, walk.recover, step, variables)
        step = _looked_at(walk, alpha, link.keep, variables)
    return step, variables


def _weakest(
    walk: _Walk, keep: Keep, number: int, variables: PyTree
) -> weakest.Link | None:
    """The block that is cut before step `number`."""
    graph, kind, measure = walk.graph, walk.kind, walk.measure
    # By number, so that a resumed walk draws what an uninterrupted one would have.
    key = None if walk.key is None else jax.random.fold_in(walk.key, number)
    scores = walk.estimate(variables, batches=walk.batches, key=key, keep=keep)
    order = weakest.order(keep, scores)
    if measure is None:
        rises = weakest.summed(scores, order)
    else:
        rises = weakest.measured(
            keep, order, lambda k: measure(k, variables, walk.batches).risk
        )
    excess = _excess(graph, keep, walk.until, kind)
    target = min(walk.block * _dense(walk), excess)

    def enough(kept: np.ndarray) -> bool:
        until = walk.until
        return until is not None and budgets.within(graph, kept, until)

    return weakest.cut(
        graph, keep, order, rises, walk.allowed, kind, target, excess, enough
    )


def _looked_at(walk: _Walk, alpha: float, keep: Keep, variables: PyTree) -> Step:
    found = walk.evaluate(keep, variables, walk.held)
    return Step(alpha, dict(keep), cost(walk.graph, keep), *found)


def _recovered(graph: Graph, recover: Recover, step: Step, variables: PyTree) -> PyTree:
    """The variables after the user's retraining, masked before and behind it."""
    before = mask(graph, step.keep, variables)
    # What `mask` passes on is the caller's: a training step may donate what it gets.
    before = jax.tree.map(
        lambda b, v: b.copy() if b is v and isinstance(b, jax.Array) else b,
        before,
        variables,
    )
    after = recover(step, before)
    if _shapes(after) != _shapes(before):
        raise GraphError(
            "recover must return the variables that it was given, retrained: the same "
            "containers, shapes and dtypes"
        )
    return mask(graph, step.keep, after)


def _shapes(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda x: x, tree))
    return treedef, [(x.shape, x.dtype) for x in leaves]


def _dense(walk: _Walk) -> float:
    sizes = budgets.sizes(walk.graph)
    return float(budgets.measure(walk.graph, walk.kind, sizes))


def _described(walk: _Walk, variables: PyTree) -> dict[str, Any]:
    """What tells walks apart, but for functions: these must be the same by themselves.

    A cost of one's own is known by what it says of the dense and the least network.
    """
    graph, until = walk.graph, walk.until
    least = np.array([counts[0] for counts in walk.allowed.values()])
    allowed = {n: counts.tolist() for n, counts in walk.allowed.items()}
    return {
        "graph": _text_checksum(graph_io.graph_body(graph)),
        "variables": path_io.checksum(variables),
        "batches": path_io.checksum(walk.batches),
        "validation": path_io.checksum(walk.held),
        "key": None if walk.key is None else path_io.checksum(walk.key),
        "block": float(walk.block),
        "kind": str(walk.kind) if isinstance(walk.kind, str) else "measured",
        "costs": [_dense(walk), float(budgets.measure(graph, walk.kind, least))],
        "until": None if until is None else budgets.limit(graph, until),
        "widths": _text_checksum(str(allowed)),
        "measured": walk.measure is not None,
        "recover": walk.recover is not None,
    }


def _text_checksum(text: str) -> int:
    return path_io.checksum(np.frombuffer(text.encode(), np.uint8))


def _excess(
    graph: Graph, keep: Keep, until: Budget | None, kind: budgets.Kind
) -> float:
    """What is still over the budget, so that the last block does not cut far below."""
    if until is None or until.kind != kind:
        return math.inf
    kept = np.array([k.sum() for k in keep.values()])
    return float(budgets.measure(graph, kind, kept)) - budgets.limit(graph, until)
