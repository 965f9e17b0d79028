# SPDX-License-Identifier: Apache-2.0
"""What a config's penalty puts behind the optimiser: prices, importance, strength."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import formats, gates, metric, peers, pricing, sparsity, steering
from jaxprune.base import CheckpointError, Graph, GraphError, Keep, PyTree, Scores
from jaxprune.criteria import check_scores
from jaxprune.train import choose
from jaxprune.train import step as steps
from jaxprune.train.folder import write_json
from jaxprune.train.loop import Job
from jaxprune.trees import channel_count

Penalty = Callable[[Graph, Keep, Scores | None], steps.Around]
# Until when the target is met, of the training under the penalty.
_MET = 0.7


def penalty(job: Job, graph: Graph, variables: PyTree) -> Penalty:
    """(smaller graph, its keep, importance) -> the method's step behind an optimiser.

    Costs and plans are of the dense graph, and functions of live counts: what is cut
    changes neither. importance: of `graph`'s channels, or None.
    """
    prune = job.config.prune
    roles, paid = prune.sides, None
    if prune.weights != "size":
        paid = choose.kind_of(job, graph, variables, prune.weights)
    if prune.repriced:
        weights: pricing.Weights = pricing.repriced(
            graph, paid, roles=roles, gates=prune.gated
        )
    elif paid is not None:
        weights = pricing.flops_weights(graph, paid, roles=roles, gates=prune.gated)
    elif prune.gated:
        weights = dict.fromkeys(graph.groups, 1.0)
    else:
        counts = channel_count(graph, roles=roles)
        weights = {n: np.sqrt(c) for n, c in counts.items()}
    own = dataclasses.replace(job.fit, lr=prune.gates_lr)
    _, rate = steps.optimizer(own if prune.accelerated else job.fit, job.total)
    more = 1.0 if prune.accelerated else steps.momentum_gain(job.fit)

    def effective(step: Any) -> Any:
        return more * rate(step)

    ramp_steps = round(prune.ramp * job.per_epoch)
    ramp = optax.linear_schedule(0.0, 1.0, ramp_steps) if ramp_steps else lambda n: 1.0
    steered = _steered(job, graph, variables, effective) if prune.target else None

    def around(smaller: Graph, keep: Keep, scores: Scores | None) -> steps.Around:
        paying = weights
        if scores is not None:
            paying = pricing.adaptive(graph, scores, weights, power=prune.adaptive)
        strength = (
            steered(paying)
            if steered
            else lambda n: prune.strength * ramp(n) * effective(n)
        )
        mine = _left(paying, keep)
        if prune.gated and prune.accelerated:
            chain = optax.chain(
                optax.scale_by_learning_rate(rate),
                gates.accelerated_gates(strength, mine),
            )
            return lambda tx: apart(tx, chain)
        d = metric.adam_steps()
        if prune.gated and prune.metric == "optimizer":
            return lambda tx: gates.preconditioned_gates(
                tx, strength, mine, steps=d, key="gates"
            )
        if prune.gated:
            last = gates.proximal_gates(strength, mine, key="gates")
        elif prune.metric == "optimizer":
            return lambda tx: metric.preconditioned(
                tx, smaller, strength, mine, steps=d, roles=roles
            )
        else:
            last = sparsity.proximal(smaller, strength, mine, roles=roles)
        return lambda tx: optax.chain(tx, last)

    return around


def importance(
    job: Job, graph: Graph, keep: Keep, variables: PyTree, number: int
) -> dict[str, np.ndarray]:
    """Scores at the dense network's sizes, for the part `number` of the training.

    Of what `keep` has left, the network `job.apply`, `graph`; what is gone counts as
    their mean. Estimated once, and kept in the work folder: processes round
    differently, and all must train alike, also behind a kill.
    """
    file = job.workdir / "importance" / f"{number}.json"
    if not peers.first_says(file.exists()):
        found = check_scores(graph, choose.importance(job, graph, variables))
        file.parent.mkdir(exist_ok=True)
        write_json(file, {n: np.asarray(s, float).tolist() for n, s in found.items()})
    peers.barrier(f"jaxprune importance {number}")
    scores = _read(file, graph)
    mean = np.concatenate(list(scores.values())).mean()
    grown = {n: np.full(len(k), mean) for n, k in keep.items()}
    for name, score in scores.items():
        grown[name][keep[name]] = score
    return grown


def _read(file: Path, graph: Graph) -> dict[str, np.ndarray]:
    try:
        found = formats.parse(formats.read_text(file))
        return check_scores(graph, {n: np.asarray(s, float) for n, s in found.items()})
    except (OSError, ValueError, TypeError, AttributeError, GraphError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); delete it to estimate again"
        ) from error


def _left(weights: pricing.Weights, keep: Keep) -> pricing.Weights:
    """The weights of the channels that are left."""
    if callable(weights):
        later = weights
        return lambda live: _left(later(live), keep)  # type: ignore[return-value]
    return {n: w[keep[n]] if np.ndim(w) else w for n, w in weights.items()}


def _steered(
    job: Job, graph: Graph, variables: PyTree, rate: optax.Schedule
) -> Callable[[pricing.Weights], steering.Strength]:
    """Weights of the penalty -> its controller, which starts by those of the first."""
    prune = job.config.prune
    length = max(1, round(_MET * job.total))
    plan = optax.linear_schedule(1.0, prune.target, length)
    kind = choose.kind_of(job, graph, variables, prune.budget)
    steering.check_target(graph, prune.target, kind)
    start = prune.strength

    def strength(weights: pricing.Weights) -> steering.Strength:
        nonlocal start
        if not start:
            total = float(jnp.sum(jax.vmap(rate)(jnp.arange(length))))
            now = _deaths(job, graph, variables, weights)
            even = steering.even_start(graph, now, prune.target, total, kind) or 1e-3
            start = float(peers.first_says(even))
        return steering.steer(graph, plan, kind=kind, rate=rate, start=start)

    return strength


def _deaths(
    job: Job, graph: Graph, variables: PyTree, weights: pricing.Weights
) -> dict[str, Any]:
    """The strengths at which the channels, or their gates, would die at once."""
    if job.config.prune.gated:
        return gates.deaths(gates.init_gates(graph), weights)
    return sparsity.deaths(graph, variables, weights, roles=job.config.prune.sides)


# Gates are trained among the params: {'network': params, 'gates': {group: float[C]}}.


def apart(
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
