# SPDX-License-Identifier: Apache-2.0
"""Which channels stay, by the config's method: pure functions of a job and weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budget as budgets
from jaxprune import (
    criteria,
    data,
    features,
    measures,
    path,
    peers,
    search,
    sparsity,
)
from jaxprune.base import Apply, Graph, Keep, PyTree, Scores
from jaxprune.budget import Budget
from jaxprune.cost import cost
from jaxprune.criteria import Criterion, check_criterion, score
from jaxprune.latency import timings
from jaxprune.layerwise import check_readers, lasso_select
from jaxprune.select import allowed_counts, select
from jaxprune.train import layout as layouts
from jaxprune.train import metrics, points
from jaxprune.train import step as steps
from jaxprune.train.config import Prune
from jaxprune.train.folder import TIMINGS
from jaxprune.train.loop import Job
from jaxprune.train.progress import Progress


def choose(
    job: Job,
    graph: Graph,
    variables: PyTree,
    budget: Budget,
    progress: Progress,
    number: int = 1,
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]] | None]:
    """(keep, rows of the path or None) of the network `job.apply`, `graph`.

    number: of the round; a path is kept in its file, and goes on from there.
    """
    prune = job.config.prune
    if prune.walked:
        return _walk(job, graph, variables, budget, progress, number)
    if prune.method == "layerwise":
        return _layerwise(job, graph, variables, budget), None
    if prune.method in ("random_masks", "particles"):
        return _tried(job, graph, variables, budget, progress), None
    scores = _scores(job, graph, variables, budget.kind)
    if prune.sparse:
        # Zeros that stay cost time but change nothing; widths are as they are wanted.
        alive = widened(prune, graph, sparsity.dead(graph, variables), scores)
        if budgets.met(graph, alive, budget):
            return alive, None
    keep = select(
        graph,
        scores,
        budget,
        multiple_of=prune.multiple_of,
        min_channels=prune.min_channels,
        scope=prune.scope,
    )
    return keep, None


def check_method(
    prune: Prune, apply: Apply, graph: Graph, variables: PyTree, images: Any
) -> None:
    """Raise GraphError where the config's method can't score a group of the network.

    From shapes alone. apply, graph, variables: of the dense network; images: float32
    [B, H, W, 3]. Nothing is known of milliseconds yet.
    """
    kind = cast(budgets.Kind, "flops" if prune.budget == "latency" else prune.budget)
    if prune.method == "layerwise":
        check_readers(
            apply,
            graph,
            variables,
            images,
            Budget(kind, prune.ratio),
            multiple_of=prune.multiple_of,
            min_channels=prune.min_channels,
            train=False,
        )

    def loss(variables: PyTree, batch: Any) -> Any:
        return jnp.sum(apply(variables, batch, train=False))

    for criterion in _criteria(prune, kind):
        check_criterion(
            criterion,
            graph,
            variables,
            loss=loss,
            batch=images,
            key=jax.random.key(0),
        )


def _criteria(prune: Prune, kind: budgets.Kind) -> Iterator[Criterion]:
    """All that the config's method will score channels by."""
    if prune.walked:
        yield _ESTIMATES[prune.estimate]()
    elif prune.method == "criterion":
        yield _criterion(prune, prune.criterion, kind)
    elif prune.sparse:
        yield _criterion(prune, "magnitude", kind)
    if prune.adaptive:
        yield _criterion(_bare(prune), prune.criterion, kind)


def kind_of(job: Job, graph: Graph, variables: PyTree, name: str) -> budgets.Kind:
    """A kind of cost by its name; of 'latency', what this device was found to need.

    job.apply, graph, variables: of the dense network.
    """
    if name != "latency":
        return cast(budgets.Kind, name)
    config = job.config
    batch = (config.evaluate.batch, *config.data.size, 3)
    images = jax.ShapeDtypeStruct(batch, np.float32)
    file = job.workdir / TIMINGS

    def found() -> budgets.Kind:
        return timings(job.apply, graph, variables, images, cache=file, train=False)

    # One measures, the others read: clocks differ, and all must cut alike.
    if jax.process_count() > 1 and jax.process_index() == 0:
        found()
    # As long as that takes, and it starts anew if it is cut off.
    with peers.patience(peers.MOST):
        peers.barrier("jaxprune timings")
    return found()


def widened(
    prune: Prune, graph: Graph, keep: Keep, scores: Scores
) -> dict[str, np.ndarray]:
    """The keep with as many more channels as make a number that a group may keep.

    graph: of the dense network. Those with the best scores come in.
    """
    allowed = allowed_counts(graph, prune.multiple_of, prune.min_channels)
    wider = {}
    for name, stays in keep.items():
        count = allowed[name][np.searchsorted(allowed[name], np.sum(stays))]
        best = np.lexsort((-np.asarray(scores[name]), ~stays))  # those that stay first
        wider[name] = stays.copy()
        wider[name][best[:count]] = True
    return wider


def estimates(job: Job, count: int) -> list[Any]:
    """Training batches that estimates see: no flips or colours, in a seeded order.

    Whole images where `data.stored` has the aspect of `data.size`, else crops of them.
    """
    how = data.Augment(crop=job.config.data.size, flip=False)
    batches = data.batches(
        job.splits.train, batch=job.fit.batch, seed=job.config.seed, augment=how
    )
    return list(itertools.islice(batches, count))


def images(job: Job, count: int) -> list[Any]:
    """The images of `estimates`, as the network takes them."""
    return [steps.scaled(batch["image"]) for batch in estimates(job, count)]


def _layerwise(
    job: Job, graph: Graph, variables: PyTree, budget: Budget
) -> dict[str, np.ndarray]:
    """Chosen by the LASSO. Behind the cut, `reconstruct` makes these refits again."""
    prune = job.config.prune
    keep, _ = lasso_select(
        job.apply,
        graph,
        variables,
        images(job, prune.reconstruct),
        budget,
        multiple_of=prune.multiple_of,
        min_channels=prune.min_channels,
        train=False,
    )
    return keep


def _tried(
    job: Job, graph: Graph, variables: PyTree, budget: Budget, progress: Progress
) -> dict[str, np.ndarray]:
    """The best of random masks, by their risk on the validation split."""
    prune = job.config.prune
    progress.note(f"prune: the validation losses of {prune.trials} masked networks")
    if prune.method == "random_masks":
        find = functools.partial(search.best_of, count=prune.trials)
    else:
        each = prune.trials // prune.stages
        find = functools.partial(
            search.particle_filter, particles=each, stages=prune.stages
        )
    return find(
        graph,
        variables,
        _risk(job),
        _validation(job),
        budget,
        key=jax.random.key(job.config.seed),
        multiple_of=prune.multiple_of,
        min_channels=prune.min_channels,
    )


def _scores(
    job: Job, graph: Graph, variables: PyTree, kind: budgets.Kind
) -> dict[str, np.ndarray]:
    prune = job.config.prune
    name = "magnitude" if prune.sparse else prune.criterion
    return _scored(job, graph, variables, name, _criterion(prune, name, kind))


def importance(job: Job, graph: Graph, variables: PyTree) -> dict[str, np.ndarray]:
    """The scores of the config's criterion as they are, of an adaptive penalty."""
    prune = _bare(job.config.prune)
    criterion = _criterion(prune, prune.criterion, "flops")
    return _scored(job, graph, variables, prune.criterion, criterion)


def _bare(prune: Prune) -> Prune:
    """With scores as the criterion gives them."""
    return dataclasses.replace(prune, normalize="none", per_cost=False)


def _scored(
    job: Job, graph: Graph, variables: PyTree, name: str, criterion: Criterion
) -> dict[str, np.ndarray]:
    prune = job.config.prune
    looks = name in ("taylor", "fisher", "activation", "apoz", "reconstruction")
    return score(
        criterion,
        graph,
        variables,
        loss=_loss(job) if looks else None,
        batches=estimates(job, prune.batches) if looks else None,
        key=jax.random.key(job.config.seed),
    )


def _criterion(prune: Prune, name: str, kind: budgets.Kind) -> Criterion:
    known: dict[str, Any] = {
        "taylor": measures.taylor,
        "fisher": measures.fisher,
        "geometric_median": functools.partial(measures.geometric_median, kernels=True),
        "activation": features.activation,
        "apoz": functools.partial(features.activation, "apoz"),
        "reconstruction": features.reconstruction,
        "lamp": functools.partial(measures.lamp, kernels=True),
        "magnitude": _magnitude(prune),
        "l2": functools.partial(measures.magnitude, 2, kernels=True),
        "group_l2": functools.partial(measures.magnitude, 2, roles=("out", "in")),
        "bn_scale": measures.bn_scale,
        "random": measures.random,
    }
    parts = [known[name]()]
    # LAMP's scores are relative to the group, and made to be compared as they are.
    if prune.normalize != "none" and name != "lamp":
        parts.append(criteria.normalize(prune.normalize))
    if prune.per_cost:
        parts.append(criteria.per_cost(kind))
    return criteria.chain(*parts)


def _magnitude(prune: Prune) -> Any:
    """The norm of the filter, or of what a penalty has shrunk.

    Of the weights that read a channel, where they hold its gate, or its penalty.
    """
    if prune.gated or prune.roles == "in":
        return functools.partial(measures.magnitude, roles=("in",))
    return functools.partial(measures.magnitude, kernels=not prune.sparse)


def _logits(job: Job, variables: PyTree, batch: Any) -> Any:
    """Logits under each batch's own statistics: masked channels spoil running ones."""
    variables = layouts.whole(steps.layout_of(job.config.scale), variables)
    images = steps.scaled(batch["image"])
    # A generator for dropout, where there is any; what it draws hardly matters here.
    rngs = {"dropout": jax.random.key(job.config.seed)}
    return job.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[
        0
    ]


def _loss(job: Job) -> Any:
    target = _target(job)

    def loss(variables: PyTree, batch: Any) -> Any:
        logits = _logits(job, variables, batch)
        return steps.cross_entropy(logits, batch["label"], target)

    return loss


def _risk(job: Job) -> Any:
    """Per image, its loss in nats, and whether it counts: it has labelled pixels.

    And the confusion matrix of the batch, to be summed.
    """
    target = _target(job)

    def risk(variables: PyTree, batch: Any) -> Any:
        logits, labels = _logits(job, variables, batch), batch["label"]
        losses = jax.vmap(lambda x, y: steps.cross_entropy(x, y, target))(
            logits, labels
        )
        counted = jnp.any(labels != target.ignore, axis=(1, 2))
        confusion = metrics.confusion(logits, labels, target.ignore)
        return losses, counted, {"confusion": confusion}

    return risk


def _target(job: Job) -> steps.Target:
    weights = data.class_weights(job.splits.train, job.fit.class_weights)
    return steps.Target(job.splits.train.classes.ignore, weights)


def _validation(job: Job) -> list[Any]:
    """The validation split; its last batch is filled with frames that do not count."""
    batches = list(data.eval_batches(job.splits.val, job.fit.batch))
    over = len(batches) * job.fit.batch - len(job.splits.val)
    if over:
        first = batches[0]["image"] if len(batches) > 1 else batches[0]["image"][:-over]
        batches[-1]["image"][-over:] = np.resize(first, (over, *first.shape[1:]))
    return batches


def _walk(
    job: Job,
    graph: Graph,
    variables: PyTree,
    budget: Budget,
    progress: Progress,
    number: int,
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """The cost-complexity path down to the budget, and the step that is chosen."""
    prune, dense = job.config.prune, cost(graph)
    file = points.file(job.workdir, number)
    whose = "the" if prune.rounds == 1 else "this round's"
    if file.exists():
        done = len(path.Path.load(file).steps)
        progress.note(f"prune: going on behind {done} steps of the path")

    def told(step: path.Step) -> None:
        progress.alive("prune", number)
        known = math.isfinite(step.stderr)  # not of one image
        margin = f" ± {step.stderr:.3f}" if known else ""
        progress.note(
            f"prune: {step.cost.flops / dense.flops:6.1%} of {whose} FLOPs, "
            f"risk {step.risk:.3f}{margin}, mIoU {points.miou(step):.3f}"
        )

    walked = path.prune_path(
        graph,
        variables,
        _loss(job),
        estimates(job, prune.batches),
        risk=_risk(job),
        validation=_validation(job),
        block=prune.block,
        until=budget,
        kind=budget.kind,
        multiple_of=prune.multiple_of,
        min_channels=prune.min_channels,
        criterion=_ESTIMATES[prune.estimate](),
        measured=prune.estimate == "measured",
        key=jax.random.key(job.config.seed),
        file=file,
        on_step=told,
    )
    # The first step that meets the budget is the last of the walk.
    rule = budget if prune.choose == "budget" else prune.choose
    chosen = walked.select(rule, kind=budget.kind)
    return chosen.keep, points.rows(walked, chosen, budget.kind)


# What estimates the rise of the loss along a path; 'measured' only ranks by it.
_ESTIMATES: dict[str, Callable[[], Criterion]] = {
    "taylor": measures.taylor,
    "taylor1": functools.partial(measures.taylor, 1),
    "fisher": measures.fisher,
    "reconstruction": features.reconstruction_error,
    "measured": measures.taylor,
}
