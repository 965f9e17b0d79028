# SPDX-License-Identifier: Apache-2.0
"""The prune stage: from a trained network to a smaller one, in one cut or several."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import checkpoint, graph_io
from jaxprune.base import EDGES, CheckpointError, Graph, Keep, PyTree, path_str
from jaxprune.budget import Budget, Kind, measure, sizes
from jaxprune.cost import cost
from jaxprune.keeps import check_keep, compose
from jaxprune.reconstruct import reconstruct
from jaxprune.slim import slim
from jaxprune.train import choose
from jaxprune.train import step as steps
from jaxprune.train.folder import write_json
from jaxprune.train.loop import Job, confusion_of, train
from jaxprune.train.metrics import measures
from jaxprune.train.progress import Progress
from jaxprune.train.sparsify import sparsify
from jaxprune.trees import shrink, shrink_graph

_FILE = "prune.json"


class Cut(NamedTuple):
    """What stays: keep of the dense network, shrunk variables, the optimiser's state.

    The last is shrunk too; None unless it is carried on.
    """

    keep: Mapping[str, np.ndarray]
    variables: PyTree
    carried: PyTree = None


def prune_stage(job: Job, graph: Graph, dense: steps.State, progress: Progress) -> Cut:
    """Cut the dense network, `job.apply`, to the budget; resumed where it was left.

    job: of the retraining, but for its apply. Each round's result is a checkpoint of
    the stage 'prune', with its keep and its path; prune.json tells of them all.
    """
    prune = job.config.prune
    store = checkpoint.open_store(
        job.workdir / "checkpoints" / "prune", keep_last=prune.rounds
    )
    variables, opt_state = dense.average, dense.opt_state
    if prune.sparse:
        variables, opt_state = sparsify(job, graph, dense, progress)
    cut = Cut(graph.full(), variables, _carried(job, opt_state))
    kind = choose.kind_of(job, graph, variables, prune.budget)
    rows: list[dict[str, Any]] = []
    for number in range(1, prune.rounds + 1):
        last = number == prune.rounds
        known = number in store.steps() and (not last or (job.workdir / _FILE).exists())
        if known:
            progress.note(f"prune: done already, cut {number} of {prune.rounds}")
            cut = _restore(store, number, graph, cut)
            rows += store.meta(number).get("path", [])
        else:
            cut, more = _round(job, graph, cut, number, kind, progress)
            rows += more
            if last and not (job.workdir / _FILE).exists():
                _write(job, graph, cut.keep, rows)
            meta = {"keep": _text(cut.keep), "path": more}
            store.save(number, {"variables": cut.variables}, meta, force=True)
        if not last:
            cut = _recover(job, graph, cut, number, progress)
    _card(graph, cut.keep, progress)
    return cut


def _carried(job: Job, opt_state: PyTree) -> PyTree:
    return opt_state if job.config.prune.carry_optimizer else None


def _text(keep: Keep) -> dict[str, str]:
    return {n: "".join("01"[int(c)] for c in k) for n, k in keep.items()}


def _round(
    job: Job, graph: Graph, cut: Cut, number: int, kind: Kind, progress: Progress
) -> tuple[Cut, list[dict[str, Any]]]:
    """One cut of what the rounds before have left, its validation row, and its path."""
    prune = job.config.prune
    smaller = shrink_graph(graph, cut.keep)
    here = dataclasses.replace(job, apply=slim(job.apply, graph, cut.keep))
    keep = _decided(job, cut.keep) if number == prune.rounds else None
    rows: list[dict[str, Any]] | None = None
    if keep is None:
        # Equal factors: each round leaves the same fraction of the one before.
        whole = measure(graph, kind, sizes(graph))
        now = measure(smaller, kind, sizes(smaller))
        ratio = min(prune.ratio ** (number / prune.rounds) * float(whole / now), 1.0)
        budget = Budget(kind, ratio)
        keep, rows = choose.choose(here, smaller, cut.variables, budget, progress)
    refitted = _refitted(here, smaller, keep, cut.variables)
    variables, carried = shrink(smaller, keep, (refitted, cut.carried))
    keep = compose(cut.keep, keep)
    slimmed = dataclasses.replace(job, apply=slim(job.apply, graph, keep))
    variables = _restated(slimmed, variables)
    evaluate = jax.jit(
        steps.make_evaluate(slimmed.apply, job.splits.val.classes.ignore)
    )
    found = measures(
        confusion_of(evaluate, variables, job.splits.val, job.config.evaluate.batch)
    )
    progress.rewind("prune", number - 1)
    progress.append({"stage": "prune", "step": number, "split": "val", **found})
    progress.note(f"prune: mIoU {found['miou']:.3f} on val before retraining")
    cut = Cut(keep, variables, carried)
    return cut, [{**row, "round": number} for row in rows or []]


def _decided(job: Job, before: Keep) -> dict[str, np.ndarray] | None:
    """The last round's keep, where prune.json has it already, of what `before` left."""
    file = job.workdir / _FILE
    if not file.exists():
        return None
    try:
        text = json.loads(file.read_text("utf-8"))["keep"]
        keep = {n: np.array([c == "1" for c in line]) for n, line in text.items()}
        return {n: keep[n][before[n]] for n in before}
    except (ValueError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); delete it to prune again"
        ) from error


def _refitted(job: Job, graph: Graph, keep: Keep, variables: PyTree) -> PyTree:
    """The variables before the cut, what reads the removed channels refitted."""
    count = job.config.prune.reconstruct
    if not count or all(k.all() for k in keep.values()):
        return variables
    images = [steps.scaled(b["image"]) for b in choose.estimates(job, count)]
    return reconstruct(job.apply, graph, keep, variables, images, train=False)


def _restated(job: Job, variables: PyTree) -> PyTree:
    """The variables with batch statistics of the network as it is now."""

    @jax.jit
    def see(variables: PyTree, batch: Any) -> PyTree:
        images = steps.scaled(batch["image"])
        rngs = {"dropout": jax.random.key(job.config.seed)}
        _, updated = job.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return {**variables, **updated}

    for batch in choose.estimates(job, job.config.prune.statistics):
        variables = see(variables, batch)
    return jax.tree.map(np.asarray, variables)


def _recover(job: Job, graph: Graph, cut: Cut, number: int, progress: Progress) -> Cut:
    """Retrain for a while between two cuts."""
    fit = job.config.retrain
    epochs = job.config.prune.recovery_epochs
    fit = dataclasses.replace(fit, epochs=epochs, warmup=min(fit.warmup, epochs))
    job = dataclasses.replace(
        job,
        stage=f"recover{number}",
        apply=slim(job.apply, graph, cut.keep),
        fit=fit,
        carried=cut.carried,
    )
    state = train(job, cut.variables, progress)
    return Cut(cut.keep, state.average, _carried(job, state.opt_state))


def _restore(store: checkpoint.Store, number: int, graph: Graph, before: Cut) -> Cut:
    meta = store.meta(number)
    keep = {n: np.array(list(text)) == "1" for n, text in meta["keep"].items()}
    keep = check_keep(graph, keep, concrete=True)
    smaller = shrink_graph(graph, before.keep)
    more = {n: keep[n][before.keep[n]] for n in keep}
    small = shrink(smaller, more, (before.variables, before.carried))
    tree, _ = store.restore(number, {"variables": small[0]})
    return Cut(keep, jax.tree.map(np.asarray, tree["variables"]), small[1])


def _write(job: Job, graph: Graph, keep: Keep, rows: list[dict[str, Any]]) -> None:
    """prune.json: the keep, widths before and after, what is frozen, rounds' paths."""
    full, dense = graph.full(), cost(graph).flops
    groups = []
    for name, group in graph.groups.items():
        alone = cost(graph, {**full, name: keep[name]}).flops
        groups.append(
            {
                "name": name,
                "before": group.size,
                "after": int(np.sum(keep[name])),
                "exact": group.exact,
                "flops_share_removed": 1 - alone / dense if dense else 0.0,
            }
        )
    document = {
        "method": _described(job),
        "keep": _text(keep),
        "groups": groups,
        "frozen": [
            {**dataclasses.asdict(f), "path": path_str(f.path)} for f in graph.frozen
        ],
        "path": rows or None,
    }
    write_json(job.workdir / _FILE, document)


def _described(job: Job) -> str:
    prune = job.config.prune
    method = prune.criterion if prune.method == "criterion" else prune.method
    rounds = f", {prune.rounds} rounds" if prune.rounds > 1 else ""
    return f"{method}, {prune.budget} to {prune.ratio:.0%}{rounds}"


def _card(graph: Graph, keep: Keep, progress: Progress) -> None:
    """By group, the width before and after, and its share of the FLOPs removed."""
    dense, small, full = cost(graph), cost(graph, keep), graph.full()
    rows = []
    for name, group in graph.groups.items():
        after = int(np.sum(keep[name]))
        cells = graph_io.bar(after / group.size)
        alone = 1 - cost(graph, {**full, name: keep[name]}).flops / max(dense.flops, 1)
        exact = "" if group.exact else "not exact"
        gone = f"-{alone:.1%}" if after < group.size else ""
        rows.append((name, str(group.size), str(after), cells, gone, exact))
    for title, field in (("FLOPs", "flops"), ("parameters", "params")):
        before, after = getattr(dense, field), getattr(small, field)
        stays = f"{after / max(before, 1):.1%}"
        rows.append((title, f"{before:,}", f"{after:,}", "", stays, "stay"))
    progress.card("pruned", rows, ("group", "before", "after", "", "FLOPs", ""))
    causes: dict[str, list[str]] = {}
    for frozen in graph.frozen:
        where = f"{path_str(frozen.path)} axis {frozen.axis}"
        if frozen.cause not in EDGES:
            causes.setdefault(frozen.cause, []).append(where)
    for cause, places in causes.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        progress.note(f"not cut, because of {cause}: {places[0]}{more}")
