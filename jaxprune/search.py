# SPDX-License-Identifier: Apache-2.0
"""Keeps found by trial: the best of N random masks, and a particle filter over masks.

Both need nothing but the loss of masked networks: no gradient, no weights looked at.
One compiled function serves all masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxprune.base import ConfigError, Graph, GraphError, Keep, PyTree
from jaxprune.budget import Budget, check, measure, sizes
from jaxprune.criteria import check_key
from jaxprune.keeps import compose
from jaxprune.risks import Risk, evaluator, finite
from jaxprune.select import MultipleOf, select
from jaxprune.trees import shrink_graph


def best_of(
    graph: Graph,
    variables: PyTree,
    loss: Risk,
    batches: Iterable[Any],
    budget: Budget,
    *,
    count: int = 128,
    key: jax.Array,
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
) -> dict[str, np.ndarray]:
    """The keep of least loss among `count` random ones that meet the budget.

    Each is `select`ed with scores that are uniform and independent: close below the
    budget, every group cut by about the same fraction.

    Args:
      graph: of the dense network; variables: trained, dense.
      loss: loss(variables, batch) -> scalar, or as the `risk` of `prune_path`.
      batches: a finite iterable, kept in memory and used for every mask.
      budget: what may stay at most, e.g. `flops(0.4)`.
      key: of the masks; the same key gives the same keep.
      multiple_of, min_channels: as for `select`.

    Raises BudgetError for a budget that cannot be met, ConfigError for a count under 1
    or a key that is none, DataError for empty batches, GraphError where no mask has a
    finite loss.

    Source: Anwar & Sung, "Coarse pruning of convolutional neural networks with random
    masks", 2017, with channels for their granularities.
    """
    check(budget)
    _check("best_of", count=count)
    rng = _generator("best_of", key)
    keeps = [
        _random_keep(graph, budget, rng, multiple_of, min_channels)
        for _ in range(count)
    ]
    losses = _judge(graph, variables, loss, batches)(keeps)
    return keeps[int(np.argmin(losses))]


def particle_filter(
    graph: Graph,
    variables: PyTree,
    loss: Risk,
    batches: Iterable[Any],
    budget: Budget,
    *,
    particles: int = 16,
    stages: int = 8,
    temperature: float = 0.25,
    perturb: float = 0.0,
    key: jax.Array,
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
) -> dict[str, np.ndarray]:
    """The best of a population of masks that are cut, weighed and resampled in turn.

    Sequential importance resampling: every particle is a keep, at first the full one.
    At each stage t of T each is cut at random to the fraction ratio^(t / T) of the
    cost, weighs exp(-(loss - least loss) / (temperature * deviation of the losses)),
    and is resampled in proportion to it. Of those at the budget the best is returned.
    Evaluates particles * stages losses, as `best_of` does with that count.

    Args:
      graph, variables, loss, batches, budget, multiple_of, min_channels: as for
        `best_of`.
      temperature: the lower, the sooner the best particles displace the others.
      perturb: behind the resampling, the probability with which a channel changes
        places with one of its group that is on the other side, of those that stay and
        those that do not the fewer ones; 0: a particle's masks are nested.
      key: of all draws; the same key gives the same keep.

    Raises ConfigError for numbers out of range, and what `best_of` does.

    Source: Anwar, Hwang, Sung, "Structured pruning of deep convolutional neural
    networks", 2017, whose weights are of the misclassification rate; systematic
    resampling: Kitagawa, "Monte Carlo filter and smoother", 1996.
    """
    check(budget)
    _check("particle_filter", particles=particles, stages=stages)
    if not 0 < temperature:
        raise ConfigError(f"particle_filter: temperature={temperature!r}: positive")
    if not 0 <= perturb < 1:
        raise ConfigError(f"particle_filter: perturb={perturb!r}: in [0, 1)")
    rng = _generator("particle_filter", key)
    judge = _judge(graph, variables, loss, batches)

    dense = float(measure(graph, budget.kind, sizes(graph)))

    def cut(keep: Keep, stage: int) -> dict[str, np.ndarray]:
        """At random, of what the keep leaves, to the stage's fraction of the cost."""
        smaller = shrink_graph(graph, keep)
        now = float(measure(smaller, budget.kind, sizes(smaller)))
        ratio = min(budget.ratio ** (stage / stages) * dense / now, 1.0)
        drawn = _random_keep(
            smaller, Budget(budget.kind, ratio), rng, multiple_of, min_channels
        )
        return compose(keep, drawn)

    keeps = [graph.full() for _ in range(particles)]
    cut(keeps[0], stages)  # a budget that cannot be met is told before any work
    for stage in range(1, stages + 1):
        keeps = [cut(k, stage) for k in keeps]
        losses = judge(keeps)
        if stage < stages:
            chosen = resampled(weights(losses, temperature), rng)
            keeps = [_moved(keeps[i], perturb, rng) for i in chosen]
    return keeps[int(np.argmin(losses))]


def weights(losses: np.ndarray, temperature: float) -> np.ndarray:
    """float64[N] that sum to 1: exp(-(loss - least) / (temperature * deviation)).

    The deviation is that of the finite losses; what is not finite weighs nothing.
    """
    finite = np.isfinite(losses)
    spread = temperature * np.std(losses[finite])
    above = np.where(finite, losses, np.inf) - np.min(losses[finite])
    with np.errstate(invalid="ignore"):
        raw = np.exp(-above / spread) if spread > 0 else finite.astype(float)
    return raw / raw.sum()


def resampled(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int[N], the particles that go on: systematic resampling, N w[i] of each i.

    Rounded up or down; the expectation is exact.
    """
    count = len(weights)
    places = (rng.random() + np.arange(count)) / count
    ends = np.cumsum(weights)
    return np.searchsorted(ends / ends[-1], places, side="right")


def _random_keep(
    graph: Graph,
    budget: Budget,
    rng: np.random.Generator,
    multiple_of: MultipleOf,
    min_channels: int,
) -> dict[str, np.ndarray]:
    scores = {n: rng.random(g.size) for n, g in graph.groups.items()}
    return select(
        graph, scores, budget, multiple_of=multiple_of, min_channels=min_channels
    )


def _moved(
    keep: Keep, probability: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The keep with some channels swapped for others of their groups."""
    moved = {n: np.array(k) for n, k in keep.items()}
    for stays in moved.values() if probability else ():
        inside, outside = map(rng.permutation, map(np.flatnonzero, (stays, ~stays)))
        count = rng.binomial(min(len(inside), len(outside)), probability)
        stays[inside[:count]], stays[outside[:count]] = False, True
    return moved


def _judge(
    graph: Graph, variables: PyTree, loss: Risk, batches: Iterable[Any]
) -> Callable[[list[dict[str, np.ndarray]]], np.ndarray]:
    """keeps -> float[N], the mean loss of each masked network; infinite for NaN."""
    held = finite(batches)
    evaluate = evaluator(graph, loss)

    def judge(keeps: list[dict[str, np.ndarray]]) -> np.ndarray:
        losses = np.array([evaluate(k, variables, held)[0] for k in keeps])
        if not np.isfinite(losses).any():
            raise GraphError(
                f"none of {len(keeps)} masked networks has a finite loss; are weights, "
                "loss and batches finite?"
            )
        return np.where(np.isfinite(losses), losses, np.inf)

    return judge


def _generator(name: str, key: jax.Array) -> np.random.Generator:
    check_key(name, key)
    return np.random.default_rng(np.ravel(jax.random.key_data(key)))


def _check(name: str, **counts: int) -> None:
    for field, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: {field}={value!r}: a positive integer")
