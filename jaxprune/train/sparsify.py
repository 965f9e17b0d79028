# SPDX-License-Identifier: Apache-2.0
"""Training on under a penalty before the cut: the group lasso, or gates.

What has died may be cut on the way, so that training gets faster as it goes. Each part
of it, up to a cut, has its own checkpoints: 'lasso', 'lasso1', .... A cut is a function
of the last of them alone, so that a run killed anywhere goes on to the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune import gates, sparsity
from jaxprune.base import Apply, Graph, Keep, PyTree, Role, key_path
from jaxprune.budget import measure, sizes
from jaxprune.keeps import compose
from jaxprune.slim import slim
from jaxprune.train import choose, penalty
from jaxprune.train import step as steps
from jaxprune.train.config import Prune
from jaxprune.train.loop import Job, finished, train
from jaxprune.train.progress import Progress
from jaxprune.trees import expand, mask, shrink, shrink_graph

# Trains a part, or reads what it has ended with.
_Part = Callable[[Job, PyTree], steps.State]


def sparsify(
    job: Job, graph: Graph, dense: steps.State, progress: Progress
) -> tuple[PyTree, PyTree]:
    """(variables, optimiser state) of the dense network after `lasso_epochs`.

    The method's proximal steps come behind the optimiser's (docs/method.md). A
    channel that they have brought to 0 is 0 in the variables throughout, and so is one
    that was cut on the way.
    """
    return _sparsified(
        job, graph, dense, lambda here, start: train(here, start, progress), progress
    )


def sparsified(job: Job, graph: Graph, dense: steps.State) -> tuple[PyTree, PyTree]:
    """What `sparsify` gave; CheckpointError where its training has not ended."""
    return _sparsified(job, graph, dense, finished)


def _sparsified(
    job: Job,
    graph: Graph,
    dense: steps.State,
    part: _Part,
    progress: Progress | None = None,
) -> tuple[PyTree, PyTree]:
    prune, fit = job.config.prune, job.config.train
    fit = dataclasses.replace(fit, epochs=prune.lasso_epochs, lr=fit.lr / 2, warmup=0.0)
    carried = dense.opt_state if prune.carry_optimizer else None
    job = dataclasses.replace(job, fit=fit, teacher=None, carried=carried)
    gated = prune.gated
    stage = "gates" if gated else "lasso"
    around = penalty.penalty(job, graph, dense.average)
    start = _with_gates(graph, dense.average) if gated else dense.average
    keep: dict[str, np.ndarray] = graph.full()

    def trained(number: int, end: int, begun: steps.State | None) -> steps.State:
        """The state at the end of a part, of the network as `keep` has left it."""
        smaller = shrink_graph(graph, keep)
        apply = slim(job.apply, graph, keep) if number else job.apply
        scores = None
        if prune.adaptive:
            now = dense.average if begun is None else begun.average
            if gated and begun is not None:
                now = _folded(smaller, now)
            bare = dataclasses.replace(job, apply=apply)
            scores = penalty.importance(bare, smaller, keep, now, number)
        here = dataclasses.replace(
            job,
            stage=f"{stage}{number or ''}",
            apply=_gated(apply, smaller) if gated else apply,
            around=around(smaller, keep, scores),
            begun=begun,
            until=end,
        )
        return part(here, start)

    first, *others = cut_steps(job, prune.cuts_in_training)
    state = trained(0, first, None)
    for number, end in enumerate(others, 1):
        smaller = shrink_graph(graph, keep)
        lives = alive(smaller, state.variables, prune.sides)
        more = _wide(prune, graph, keep, lives)
        keep = compose(keep, more)
        if progress is not None:
            _tell(stage, graph, keep, int(state.step), progress)
        state = trained(number, end, cut_state(smaller, more, state))
    return _dense(graph, keep, state, prune)


def cut_steps(job: Job, count: int) -> list[int]:
    """The steps at which a training ends, or is cut, at most `count` times before.

    Evenly spread, at ends of epochs.
    """
    parts = job.total / job.per_epoch * np.arange(1, count + 1) / (count + 1)
    inner = np.unique(np.rint(parts).astype(int)) * job.per_epoch
    return [*(int(n) for n in inner if 0 < n < job.total), job.total]


def alive(
    graph: Graph, variables: PyTree, roles: tuple[Role, ...]
) -> dict[str, np.ndarray]:
    """The keep of what is not 0: of the gates, where there are any, or the weights."""
    found = variables["params"]
    if "gates" in found and set(found) == {"network", "gates"}:
        return gates.gates_to_keep(found["gates"])
    return sparsity.dead(graph, variables, roles=roles)


def cut_state(graph: Graph, keep: Keep, state: steps.State) -> steps.State:
    """The state of the smaller network: variables, average, the optimiser's, gates.

    Training goes on as it would with all three masked, where the optimiser works
    element by element (law 4).
    """

    def cut(keys: Any, x: Any) -> Any:
        path = key_path(keys)
        mine = len(path) > 1 and "gates" in path[:-1] and path[-1] in keep
        return x[keep[path[-1]]] if mine else x

    trees = state.variables, state.average, state.opt_state
    small = jax.tree_util.tree_map_with_path(cut, shrink(graph, keep, trees))
    return steps.State(state.step, *small)


def _dense(
    graph: Graph, keep: Keep, state: steps.State, prune: Prune
) -> tuple[PyTree, PyTree]:
    """The average with zeros for what is gone, and the optimiser's state likewise."""
    smaller = shrink_graph(graph, keep)
    stays = alive(smaller, state.variables, prune.sides)
    trained = _folded(smaller, state.average) if prune.gated else state.average
    # What has died is not yet 0 in the moving average.
    grown = expand(graph, keep, mask(smaller, stays, trained))
    return grown, None if prune.gated else expand(graph, keep, state.opt_state)


def _wide(prune: Prune, graph: Graph, keep: Keep, more: Keep) -> Keep:
    """`more`, of what `keep` has left, with zeros up to widths that are wanted."""
    whole = compose(keep, more)
    ranks = {n: k.astype(float) for n, k in keep.items()}  # none that is gone already
    wide = choose.widened(prune, graph, whole, ranks)
    return {n: wide[n][keep[n]] for n in wide}


def _tell(stage: str, graph: Graph, keep: Keep, step: int, progress: Progress) -> None:
    now = measure(graph, "flops", np.array([k.sum() for k in keep.values()]))
    share = now / max(measure(graph, "flops", sizes(graph)), 1)
    progress.note(f"{stage}: cut to {share:.1%} of the FLOPs at step {step}")


# Of gates among the params, see `penalty`.


def _with_gates(graph: Graph, variables: PyTree) -> PyTree:
    params = {"network": variables["params"], "gates": gates.init_gates(graph)}
    return {**variables, "params": params}


def _folded(graph: Graph, variables: PyTree) -> PyTree:
    """The network's own variables, which compute what the gated ones do."""
    params = variables["params"]
    return gates.gate(
        graph, params["gates"], {**variables, "params": params["network"]}
    )


def _gated(apply: Apply, graph: Graph) -> Apply:
    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        return apply(_folded(graph, variables), *inputs, **kwargs)

    return run
