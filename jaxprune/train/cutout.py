# SPDX-License-Identifier: Apache-2.0
"""Any point of a run's pruning path, cut out of the run's own weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from jaxprune import checkpoint, formats, models, path_io
from jaxprune.base import CheckpointError, ConfigError, Graph
from jaxprune.budget import Budget, Kind
from jaxprune.cost import cost
from jaxprune.graph_io import graph_from_json, keep_from_text
from jaxprune.keeps import check_keep
from jaxprune.pruned import Pruned
from jaxprune.slim import slim
from jaxprune.steps import Path as Walked
from jaxprune.steps import Rule, Step
from jaxprune.train import cut, folder, points, stages
from jaxprune.train import layout as layouts
from jaxprune.train.config import Config
from jaxprune.train.loop import Job, Splits, finished
from jaxprune.train.sparsify import sparsified
from jaxprune.trees import shrink

Point = int | Rule | Budget


def cut_out(
    workdir: str | Path, at: Point, out: str | Path, number: int | None = None
) -> tuple[int, Step]:
    """Write the network at a point of a run's path into `out`; (its number, the step).

    at: the step's number, a rule of `Path.select`, or a budget, of the dense network's
    cost. number: of the round, by default the last. The weights are those that the walk
    began with, shrunk, with what reads them refitted (`prune.reconstruct`) and batch
    statistics estimated anew (`prune.statistics`) as in the run: not retrained.
    `jaxprune.load(out)` opens it.

    Raises CheckpointError where the run has no such path, its weights are not there, or
    `out` exists; ConfigError, BudgetError or DataError where nothing is at that point.
    """
    workdir, out = Path(workdir), Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another")
    config = folder.read_config(workdir)
    number, walked = points.load(workdir, number)
    splits = Splits(*(stages.load_split(config, n) for n in stages.SPLITS))
    args = stages.network_args(config, len(splits.train.classes))
    net = models.build(config.network.name, args)
    graph = stages.read_graph(net, config, workdir)
    place = find(walked, at, graph, _kind(config))
    step = walked.steps[place]
    job = Job("train", net.apply, config.train, config, splits, workdir)
    before = _before(job, graph, net, number)
    _check_walked(workdir, number, before)
    job = dataclasses.replace(job, stage="retrain", fit=config.retrain)
    small = cut.apply_cut(job, graph, before, step.keep)
    pruned = Pruned(
        slim(net.apply, graph, small.keep), small.variables, graph, small.keep
    )
    origin = {"round": number, "step": place, "risk": step.risk, "retrained": False}
    stages.save_network(config, args, splits, out, pruned, point=origin)
    return place, step


def find(walked: Walked, at: Point, graph: Graph, kind: Kind) -> int:
    """The number of the step at a point; budgets are of the cost of `graph`.

    kind: of the cost, for 'knee'.
    """
    if isinstance(at, int):
        if not 0 <= at < len(walked.steps):
            raise ConfigError(
                f"step={at}: the path has the steps 0 to {len(walked.steps) - 1}"
            )
        return at
    whole = walked
    if isinstance(at, Budget):
        # In front, what the budget is a fraction of: a later round begins below it.
        dense = Step(0.0, graph.full(), cost(graph), math.inf, math.nan)
        whole = Walked((dense, *walked.steps))
    step = whole.select(at, kind=kind)
    return next(i for i, one in enumerate(walked.steps) if one is step)


def _before(job: Job, graph: Graph, net: Any, number: int) -> cut.Cut:
    """What the walk of round `number` began with."""
    config = job.config
    start = models.init(net, jax.random.key(config.seed), config.data.size)
    if number == 1:
        dense = finished(job, start)
        variables = dense.average
        if config.prune.sparse:
            job = dataclasses.replace(job, stage="retrain", fit=config.retrain)
            variables, _ = sparsified(job, graph, dense)
        return cut.Cut(graph.full(), variables)
    store = checkpoint.open_store(job.workdir / "checkpoints" / "prune", keep_last=None)
    keep = keep_from_text(store.meta(number - 1)["keep"])
    keep = check_keep(graph, keep, concrete=True)
    small = shrink(graph, keep, start)
    recovery = cut.recovery(job, number - 1)
    if recovery.end:
        return cut.Cut(keep, finished(recovery, small).average)
    tree, _ = store.restore(number - 1, {"variables": small})  # not trained on
    return cut.Cut(keep, layouts.settled(tree["variables"]))


def _check_walked(workdir: Path, number: int, before: cut.Cut) -> None:
    """Raise CheckpointError unless the path was walked from these weights."""
    file = points.file(workdir, number)
    walk = path_io.read(file).walk or {}
    if walk.get("variables") != path_io.checksum(before.variables):
        raise CheckpointError(
            f"{file} was walked from other weights than the checkpoints of {workdir} "
            "hold now; delete it, and prune.json, and run again to walk anew"
        )


def describe(workdir: str | Path, number: int | None = None) -> str:
    """The table of a run's path as far as it is walked: what each rule chooses, and the
    run itself has chosen. Raises as `cut_out` does.
    """
    workdir = Path(workdir)
    config = folder.read_config(workdir)
    number, walked = points.load(workdir, number)
    chosen = _chosen(workdir, number)
    if chosen is not None and chosen >= len(walked.steps):
        raise CheckpointError(
            f"{workdir / 'prune.json'}: chosen is step {chosen} of round {number}, "
            f"whose path has {len(walked.steps)}; one of the files is of another run"
        )
    step = None if chosen is None else walked.steps[chosen]
    table = points.rows(walked, step, _kind(config))
    try:
        graph = graph_from_json(formats.read_text(workdir / "graph.json"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{workdir / 'graph.json'}: {error}") from error
    rounds = f", round {number} of {config.prune.rounds}"
    state = "" if chosen is not None else "; the prune stage has not ended"
    return (
        f"the pruning path of {workdir}{rounds if config.prune.rounds > 1 else ''}: "
        f"{len(table)} steps, not retrained{state}\n"
        f"{points.as_text(table, cost(graph)._asdict())}"
    )


def _chosen(workdir: Path, number: int) -> int | None:
    """The number of the step that the run chose, as prune.json has it."""
    file = workdir / "prune.json"
    try:
        rows = formats.parse(formats.read_text(file))["path"] or []
        mine = [row for row in rows if row.get("round", 1) == number]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return next((i for i, row in enumerate(mine) if row.get("chosen")), None)


def _kind(config: Config) -> Kind:
    """The cost that 'knee' sees; milliseconds are not kept with the path."""
    kind = config.prune.budget
    return "flops" if kind == "latency" else kind
