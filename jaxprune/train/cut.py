# SPDX-License-Identifier: Apache-2.0
"""The prune stage: from trained variables to a keep, by the config's method."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, measures, path, sparsity
from jaxprune.base import CheckpointError, Graph, Keep, PyTree, path_str
from jaxprune.budget import Budget
from jaxprune.cost import cost
from jaxprune.criteria import Criterion, chain, normalize, per_cost, score
from jaxprune.select import select
from jaxprune.train import step as steps
from jaxprune.train.loop import Job, train
from jaxprune.train.progress import Progress
from jaxprune.trees import check_keep

_FILE = "prune.json"


def prune_stage(
    job: Job, graph: Graph, variables: PyTree, progress: Progress
) -> tuple[dict[str, np.ndarray], PyTree]:
    """(keep, dense variables to cut), read from prune.json where it is there."""
    config, rows = job.config.prune, None
    if config.method == "lasso":
        variables = _sparsify(job, graph, variables, progress)
    found = _read(job.workdir / _FILE, graph)
    if found is None:
        budget = Budget(config.budget, config.ratio)
        if config.method == "path":
            keep, rows = _walk(job, graph, variables, budget, progress)
        else:
            scores = _scores(job, graph, variables)
            keep = select(
                graph,
                scores,
                budget,
                multiple_of=config.multiple_of,
                min_channels=config.min_channels,
                scope=config.scope,
            )
        _write(job, graph, keep, rows)
        found = keep
    _card(graph, found, progress)
    return found, variables


def _sparsify(job: Job, graph: Graph, variables: PyTree, progress: Progress) -> PyTree:
    """Train on with the proximal group lasso (METHOD.md, equation 1)."""
    config = job.config
    fit = dataclasses.replace(
        config.train, epochs=config.prune.lasso_epochs, lr=config.train.lr / 4
    )
    job = dataclasses.replace(job, stage="lasso", fit=fit)
    _, rate = steps.optimizer(fit, job.total)
    strength = config.prune.strength
    weights = sparsity.flops_weights(graph)
    proximal = sparsity.proximal(graph, lambda count: strength * rate(count), weights)
    return train(dataclasses.replace(job, proximal=proximal), variables, progress)


def _logits(job: Job, variables: PyTree, batch: Any) -> Any:
    """Logits under each batch's own statistics: masked channels spoil running ones."""
    images = steps.scaled(batch["image"])
    # A generator for dropout, where there is any; what it draws hardly matters here.
    rngs = {"dropout": jax.random.key(job.config.seed)}
    return job.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[
        0
    ]


def _validation(job: Job) -> list[Any]:
    """The validation split; its last batch is filled with frames that do not count."""
    batches = list(data.eval_batches(job.splits.val, job.fit.batch))
    over = len(batches) * job.fit.batch - len(job.splits.val)
    if over:
        first = batches[0]["image"] if len(batches) > 1 else batches[0]["image"][:-over]
        batches[-1]["image"][-over:] = np.resize(first, (over, *first.shape[1:]))
    return batches


def _loss(job: Job) -> Any:
    classes = job.splits.train.classes
    weights = data.class_weights(job.splits.train, job.fit.class_weights)
    target = steps.Target(classes.ignore, weights)

    def loss(variables: PyTree, batch: Any) -> Any:
        logits = _logits(job, variables, batch)
        return steps.cross_entropy(logits, batch["label"], target)

    return loss


def _risk(job: Job) -> Any:
    """Per image, the share of labelled pixels that are wrong, and whether it counts."""
    ignore = job.splits.train.classes.ignore

    def risk(variables: PyTree, batch: Any) -> Any:
        logits = _logits(job, variables, batch)
        counted = batch["label"] != ignore
        wrong = counted & (jnp.argmax(logits, -1) != batch["label"])
        pixels = counted.sum((1, 2))
        return wrong.sum((1, 2)) / jnp.maximum(pixels, 1), pixels > 0

    return risk


def _estimates(job: Job) -> list[Any]:
    """The training batches that estimates see: whole images, in a seeded order."""
    how = data.Augment(crop=job.config.data.size, flip=False)
    batches = data.batches(
        job.splits.train, batch=job.fit.batch, seed=job.config.seed, augment=how
    )
    return list(itertools.islice(batches, job.config.prune.batches))


def _scores(job: Job, graph: Graph, variables: PyTree) -> dict[str, np.ndarray]:
    prune = job.config.prune
    name = "magnitude" if prune.method == "lasso" else prune.criterion
    criteria: dict[str, Callable[[], Criterion]] = {
        "taylor": measures.taylor,
        "magnitude": measures.magnitude,
        "bn_scale": measures.bn_scale,
        "random": measures.random,
    }
    criterion = criteria[name]()
    if prune.normalize != "none":
        criterion = chain(criterion, normalize(prune.normalize))
    if prune.per_cost:
        criterion = chain(criterion, per_cost())
    taylor = name == "taylor"
    return score(
        criterion,
        graph,
        variables,
        loss=_loss(job) if taylor else None,
        batches=_estimates(job) if taylor else None,
        key=jax.random.key(job.config.seed),
    )


def _walk(
    job: Job, graph: Graph, variables: PyTree, budget: Budget, progress: Progress
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    config = job.config.prune

    def said(step: path.Step) -> None:
        share = step.cost.flops / cost(graph).flops
        risk = f"{step.risk:.4f} ± {step.stderr:.4f}"
        progress.note(f"prune: {share:6.1%} of the FLOPs, risk {risk}")

    walked = path.prune_path(
        graph,
        variables,
        _loss(job),
        _estimates(job),
        risk=_risk(job),
        validation=_validation(job),
        block=config.block,
        until=budget if config.choose == "budget" else None,
        kind=config.budget if config.budget != "channels" else "flops",
        multiple_of=config.multiple_of,
        min_channels=config.min_channels,
        on_step=said,
    )
    rule: Any = budget if config.choose == "budget" else config.choose
    chosen = walked.select(rule)
    rows = [
        {
            "alpha": float(s.alpha),
            "flops": int(s.cost.flops),
            "params": int(s.cost.params),
            "risk": float(s.risk),
            "stderr": float(s.stderr),
            "chosen": s is chosen,
        }
        for s in walked.steps
    ]
    return chosen.keep, rows


def _write(job: Job, graph: Graph, keep: Keep, rows: Any) -> None:
    """prune.json: the keep, widths before and after, what is frozen, the path."""
    groups = []
    for name, group in graph.groups.items():
        alone = {n: keep[n] if n == name else k for n, k in graph.full().items()}
        removed = 1 - cost(graph, alone).flops / cost(graph).flops
        groups.append(
            {
                "name": name,
                "before": group.size,
                "after": int(np.sum(keep[name])),
                "exact": group.exact,
                "flops_share_removed": removed,
            }
        )
    frozen = [{**dataclasses.asdict(f), "path": path_str(f.path)} for f in graph.frozen]
    text = json.dumps(
        {
            "method": job.config.prune.method,
            "keep": {n: "".join("01"[int(c)] for c in k) for n, k in keep.items()},
            "groups": groups,
            "frozen": frozen,
            "path": rows,
        },
        indent=1,
    )
    if jax.process_index() == 0:
        partial = job.workdir / (_FILE + ".partial")
        partial.write_text(text, "utf-8")
        os.replace(partial, job.workdir / _FILE)


def _read(file: Path, graph: Graph) -> dict[str, np.ndarray] | None:
    if not file.exists():
        return None
    try:
        text = json.loads(file.read_text("utf-8"))["keep"]
        keep = {n: np.array([c == "1" for c in line]) for n, line in text.items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); delete it to prune again"
        ) from error
    return check_keep(graph, keep)


def _card(graph: Graph, keep: Keep, progress: Progress) -> None:
    rows = []
    for name, group in graph.groups.items():
        after = int(np.sum(keep[name]))
        bar = "█" * round(10 * after / group.size)
        exact = "" if group.exact else "not exact"
        rows.append((name, f"{group.size}", f"{after}", f"{bar:10}", exact))
    dense, small = cost(graph), cost(graph, keep)
    rows.append(
        (
            "FLOPs",
            f"{dense.flops / 1e9:.3f} G",
            f"{small.flops / 1e9:.3f} G",
            f"{small.flops / dense.flops:.1%}",
            "",
        )
    )
    rows.append(
        (
            "parameters",
            f"{dense.params:,}",
            f"{small.params:,}",
            f"{small.params / dense.params:.1%}",
            "",
        )
    )
    progress.card("pruned", rows, ("group", "before", "after", "", ""))
