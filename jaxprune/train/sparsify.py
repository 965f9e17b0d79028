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
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import gates, metric, pricing, sparsity, steering
from jaxprune.base import Apply, Graph, Keep, PyTree, Scores, key_path
from jaxprune.budget import measure, sizes
from jaxprune.keeps import compose
from jaxprune.slim import slim
from jaxprune.train import choose
from jaxprune.train import step as steps
from jaxprune.train.config import Prune
from jaxprune.train.loop import Job, train
from jaxprune.train.progress import Progress
from jaxprune.trees import channel_count, expand, mask, shrink, shrink_graph


def sparsify(
    job: Job, graph: Graph, dense: steps.State, progress: Progress
) -> tuple[PyTree, PyTree]:
    """(variables, optimiser state) of the dense network after `lasso_epochs`.

    The method's proximal steps come behind the optimiser's (docs/method.md). A
    channel that they have brought to 0 is 0 in the variables throughout, and so is one
    that was cut on the way.
    """
    prune, fit = job.config.prune, job.config.train
    fit = dataclasses.replace(fit, epochs=prune.lasso_epochs, lr=fit.lr / 2, warmup=0.0)
    carried = dense.opt_state if prune.carry_optimizer else None
    job = dataclasses.replace(job, fit=fit, teacher=None, carried=carried)
    gated = prune.method == "gates"
    penalty = _penalty(job, graph, dense.average)
    start = _with_gates(graph, dense.average) if gated else dense.average
    keep: dict[str, np.ndarray] = graph.full()

    def trained(number: int, end: int, begun: steps.State | None) -> steps.State:
        """The state at the end of a part, of the network as `keep` has left it."""
        smaller = shrink_graph(graph, keep)
        apply = slim(job.apply, graph, keep) if number else job.apply
        scores = None
        if prune.adaptive:
            now = dense.average if begun is None else begun.average
            now = _folded(smaller, now) if gated and begun is not None else now
            bare = dataclasses.replace(job, apply=apply)
            scores = _grown(keep, choose.importance(bare, smaller, now))
        here = dataclasses.replace(
            job,
            stage=f"{prune.method}{number or ''}",
            apply=_gated(apply, smaller) if gated else apply,
            around=penalty(smaller, keep, scores),
            begun=begun,
            until=end,
        )
        return train(here, start, progress)

    first, *others = cut_steps(job, prune.cuts_in_training)
    state = trained(0, first, None)
    for number, end in enumerate(others, 1):
        smaller = shrink_graph(graph, keep)
        more = _wide(prune, graph, keep, alive(smaller, state.variables))
        keep = compose(keep, more)
        _tell(prune, graph, keep, int(state.step), progress)
        state = trained(number, end, cut_state(smaller, more, state))
    return _dense(graph, keep, state, gated)


def cut_steps(job: Job, count: int) -> list[int]:
    """The steps at which a training ends, or is cut, at most `count` times before.

    Evenly spread, at ends of epochs.
    """
    parts = job.total / job.per_epoch * np.arange(1, count + 1) / (count + 1)
    inner = np.unique(np.rint(parts).astype(int)) * job.per_epoch
    return [*(int(n) for n in inner if 0 < n < job.total), job.total]


def alive(graph: Graph, variables: PyTree) -> dict[str, np.ndarray]:
    """The keep of what is not 0: of the gates, where there are any, or the weights."""
    found = variables["params"]
    if "gates" in found and set(found) == {"network", "gates"}:
        return gates.gates_to_keep(found["gates"])
    return sparsity.dead(graph, variables)


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
    graph: Graph, keep: Keep, state: steps.State, gated: bool
) -> tuple[PyTree, PyTree]:
    """The average with zeros for what is gone, and the optimiser's state likewise."""
    smaller = shrink_graph(graph, keep)
    stays = alive(smaller, state.variables)
    trained = _folded(smaller, state.average) if gated else state.average
    # What has died is not yet 0 in the moving average.
    grown = expand(graph, keep, mask(smaller, stays, trained))
    return grown, None if gated else expand(graph, keep, state.opt_state)


def _wide(prune: Prune, graph: Graph, keep: Keep, more: Keep) -> Keep:
    """`more`, of what `keep` has left, with zeros up to widths that are wanted."""
    whole = compose(keep, more)
    ranks = {n: k.astype(float) for n, k in keep.items()}  # none that is gone already
    wide = choose.widened(prune, graph, whole, ranks)
    return {n: wide[n][keep[n]] for n in wide}


def _tell(
    prune: Prune, graph: Graph, keep: Keep, step: int, progress: Progress
) -> None:
    now = measure(graph, "flops", np.array([k.sum() for k in keep.values()]))
    share = now / max(measure(graph, "flops", sizes(graph)), 1)
    progress.note(f"{prune.method}: cut to {share:.1%} of the FLOPs at step {step}")


def _penalty(
    job: Job, graph: Graph, variables: PyTree
) -> Callable[[Graph, Keep, Scores | None], steps.Around]:
    """(smaller graph, its keep, importance) -> the method's step behind an optimiser.

    Costs and plans are of the dense graph, and functions of live counts: what is cut
    changes neither.
    """
    prune = job.config.prune
    paid = None
    if prune.weights != "size":
        paid = choose.kind_of(job, graph, variables, prune.weights)
    if prune.repriced:
        weights: pricing.Weights = pricing.repriced(graph, paid)
    elif paid is None:
        weights = {n: np.sqrt(c) for n, c in channel_count(graph).items()}
    else:
        weights = pricing.flops_weights(graph, paid)
    own = dataclasses.replace(job.fit, lr=prune.gates_lr)
    _, rate = steps.optimizer(own if prune.accelerated else job.fit, job.total)

    def around(smaller: Graph, keep: Keep, scores: Scores | None) -> steps.Around:
        paying = weights
        if scores is not None:
            paying = pricing.adaptive(graph, scores, weights, power=prune.adaptive)
        strength = _strength(job, graph, variables, paying, rate)
        mine = _left(paying, keep)
        if prune.method == "gates" and prune.accelerated:
            chain = optax.chain(
                optax.scale_by_learning_rate(rate),
                gates.accelerated_gates(strength, mine),
            )
            return lambda tx: _apart(tx, chain)
        if prune.method == "gates":
            last = _on_gates(gates.proximal_gates(strength, mine))
        elif prune.metric == "optimizer":
            d = metric.adam_steps()
            return lambda tx: metric.preconditioned(
                tx, smaller, strength, mine, steps=d
            )
        else:
            last = sparsity.proximal(smaller, strength, mine)
        return lambda tx: optax.chain(tx, last)

    return around


def _grown(keep: Keep, scores: Scores) -> dict[str, np.ndarray]:
    """Scores of what is left, at the dense network's sizes; their mean for the rest."""
    mean = np.concatenate([np.asarray(s, float) for s in scores.values()]).mean()
    grown = {n: np.full(len(k), mean) for n, k in keep.items()}
    for name, score in scores.items():
        grown[name][keep[name]] = score
    return grown


def _left(weights: pricing.Weights, keep: Keep) -> pricing.Weights:
    """The weights of the channels that are left."""
    if callable(weights):
        later = weights
        return lambda live: _left(later(live), keep)  # type: ignore[return-value]
    return {n: w[keep[n]] if np.ndim(w) else w for n, w in weights.items()}


def _strength(
    job: Job,
    graph: Graph,
    variables: PyTree,
    weights: pricing.Weights,
    rate: optax.Schedule,
) -> steering.Strength:
    prune = job.config.prune
    if not prune.target:
        return lambda n: prune.strength * rate(n)
    length = max(1, round(0.7 * job.total))
    plan = optax.linear_schedule(1.0, prune.target, length)
    kind = choose.kind_of(job, graph, variables, prune.budget)
    steering.check_target(graph, prune.target, kind)
    start = prune.strength
    if not start:
        total = float(jnp.sum(jax.vmap(rate)(jnp.arange(length))))
        now = _deaths(prune, graph, variables, weights)
        start = steering.even_start(graph, now, prune.target, total, kind) or 1e-3
    return steering.steer(graph, plan, kind=kind, rate=rate, start=start)


def _deaths(
    prune: Prune, graph: Graph, variables: PyTree, weights: pricing.Weights
) -> dict[str, Any]:
    """The strengths at which the channels, or their gates of 1, would die at once."""
    if prune.method == "lasso":
        return dict(sparsity.deaths(graph, variables, weights))
    sizes = {n: jnp.ones(g.size) for n, g in graph.groups.items()}
    own = pricing.resolved(
        graph, weights, pricing.BOTH, lambda: {n: len(x) for n, x in sizes.items()}
    )
    return steering.deaths_of(sizes, own)


# Gates are trained among the params: {'network': params, 'gates': {group: float[C]}}.


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


def _on_gates(
    proximal: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """`proximal` for the gates; the network's own params pass."""

    def init(params: PyTree) -> Any:
        return proximal.init(params["gates"])

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        known = None if params is None else params["gates"]
        gates, state = proximal.update(updates["gates"], state, known)
        return {**updates, "gates": gates}, state

    return optax.GradientTransformation(init, update)


def _apart(
    network: optax.GradientTransformation, own: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Two optimisers: of the network's params, and of the gates."""
    both = {"network": network, "gates": own}

    def init(params: PyTree) -> Any:
        return {n: tx.init(params[n]) for n, tx in both.items()}

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        known = params if params is not None else dict.fromkeys(both)
        found = {n: tx.update(updates[n], state[n], known[n]) for n, tx in both.items()}
        return {n: u for n, (u, _) in found.items()}, {
            n: s for n, (_, s) in found.items()
        }

    return optax.GradientTransformation(init, update)
