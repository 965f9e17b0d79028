# SPDX-License-Identifier: Apache-2.0
"""The prune stage: from a trained network to a smaller one, in one cut or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxprune import checkpoint, formats, graph_io, peers, steering, weights
from jaxprune.base import (
    EDGES,
    Apply,
    CheckpointError,
    Cost,
    Graph,
    GraphError,
    Keep,
    PyTree,
    path_str,
)
from jaxprune.budget import Budget, Kind, measure, sizes
from jaxprune.cost import cost
from jaxprune.keeps import check_keep, compose
from jaxprune.reconstruct import reconstruct
from jaxprune.select import check_budget
from jaxprune.slim import slim
from jaxprune.train import choose
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps
from jaxprune.train.config import Config, Prune
from jaxprune.train.folder import write_json
from jaxprune.train.loop import Job, counts_of, train
from jaxprune.train.metrics import measures
from jaxprune.train.progress import Progress
from jaxprune.train.sparsify import sparsify
from jaxprune.trees import shrink, shrink_graph
from jaxprune.weights import keep_zeros, nonzero_cost, prune_weights

_FILE = "prune.json"


class Cut(NamedTuple):
    """What stays: keep of the dense network, shrunk variables, the optimiser's state.

    The last is shrunk too; None unless it is carried on.
    """

    keep: Mapping[str, np.ndarray]
    variables: PyTree
    carried: PyTree = None


def check_reachable(prune: Prune, graph: Graph) -> None:
    """Raise BudgetError, telling the least, where no keep of the dense graph meets it.

    Nor the target of the training under a penalty. Of milliseconds, `check_latency`
    tells.
    """
    if prune.budget != "latency":
        _check_kind(prune, graph, prune.budget)


def check_weights(
    config: Config, apply: Apply, graph: Graph, variables: PyTree
) -> None:
    """Raise BudgetError, telling the least, where no zeros among weights meet it."""
    budget = Budget(config.prune.budget, config.prune.ratio)  # type: ignore[arg-type]
    images = images_of(config)
    weights.check_reachable(apply, graph, variables, images, budget=budget, train=False)


def check_latency(job: Job, graph: Graph, variables: PyTree) -> None:
    """Measure milliseconds before any training, where the config asks for them.

    Raise BudgetError, telling the least, where no keep of the dense graph meets them.
    variables: of the dense network, `job.apply`; their shapes count.
    """
    prune = job.config.prune
    if prune.budget == "latency":
        kind = choose.kind_of(job, graph, variables, "latency")
        _check_kind(prune, graph, kind)


def _check_kind(prune: Prune, graph: Graph, kind: Kind) -> None:
    budget = Budget(kind, prune.ratio)
    check_budget(graph, budget, prune.multiple_of, prune.min_channels)
    if prune.target:
        steering.check_target(graph, prune.target, kind)


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
            meta = {"keep": graph_io.keep_to_text(cut.keep), "path": more}
            store.save(number, {"variables": cut.variables}, meta, force=True)
        if not last:
            cut = _recover(job, graph, cut, number, progress)
    _card(graph, cut.keep, progress)
    return cut


def _carried(job: Job, opt_state: PyTree) -> PyTree:
    return opt_state if job.config.prune.carry_optimizer else None


def _round(
    job: Job, graph: Graph, cut: Cut, number: int, kind: Kind, progress: Progress
) -> tuple[Cut, list[dict[str, Any]]]:
    """One cut of what the rounds before have left, its validation row, and its path."""
    prune = job.config.prune
    if prune.irregular:
        variables = restated(job, _thinned(job, cut.variables, number, kind, progress))
        variables = peers.first_says(variables)
        judge(job, variables, number, progress)
        return cut._replace(variables=variables), []
    keep = _decided(job, cut.keep) if number == prune.rounds else None
    rows: list[dict[str, Any]] | None = None
    if keep is None:
        smaller = shrink_graph(graph, cut.keep)
        here = dataclasses.replace(job, apply=slim(job.apply, graph, cut.keep))
        # Equal factors: each round leaves the same fraction of the one before.
        whole = measure(graph, kind, sizes(graph))
        now = measure(smaller, kind, sizes(smaller))
        ratio = min(prune.ratio ** (number / prune.rounds) * float(whole / now), 1.0)
        budget = Budget(kind, ratio)
        keep, rows = choose.choose(
            here, smaller, cut.variables, budget, progress, number
        )
    # Processes round differently, and must cut and train alike.
    cut = apply_cut(job, graph, cut, peers.first_says(keep))
    cut = cut._replace(variables=peers.first_says(cut.variables))
    slimmed = dataclasses.replace(job, apply=slim(job.apply, graph, cut.keep))
    judge(slimmed, cut.variables, number, progress)
    return cut, [{**row, "round": number} for row in rows or []]


def held(prune: Prune) -> steps.Around | None:
    """What retraining has around its optimiser, so that cut weights stay 0."""
    return (lambda tx: optax.chain(tx, keep_zeros())) if prune.irregular else None


def nonzero(job: Job, variables: PyTree) -> Cost | None:
    """The cost without zeros among the weights; None where channels are cut."""
    if not job.config.prune.irregular:
        return None
    return nonzero_cost(job.apply, variables, images_of(job.config), train=False)


def images_of(config: Config) -> jax.ShapeDtypeStruct:
    """The shape of one image of a run, float32[1, H, W, 3]."""
    return jax.ShapeDtypeStruct((1, *config.data.size, 3), np.float32)


def _thinned(
    job: Job, variables: PyTree, number: int, kind: Kind, progress: Progress
) -> PyTree:
    """The variables with as many zeros as the budget of this round asks for."""
    prune = job.config.prune
    thin = prune_weights(
        job.apply,
        variables,
        images_of(job.config),
        budget=Budget(kind, prune.ratio ** (number / prune.rounds)),
        scope=prune.scope,
        train=False,
    )
    if (left := nonzero(job, thin)) is not None:
        progress.note(
            f"prune: {left.flops:,} FLOPs and {left.params:,} parameters are not of "
            "zeros; on hardware for dense products this saves no time"
        )
    return jax.tree.map(np.asarray, thin)


def judge(job: Job, variables: PyTree, number: int, progress: Progress) -> None:
    """A row of how the cut network `job.apply` does on the validation split."""
    layout, ignore = steps.layout_of(job.config.scale), job.splits.val.classes.ignore
    evaluate = jax.jit(steps.make_evaluate(job.apply, ignore, layout))
    val, batch = job.splits.val, job.config.evaluate.batch
    found = measures(counts_of(evaluate, variables, val, batch).confusion)
    progress.rewind("prune", number - 1)
    progress.append({"stage": "prune", "step": number, "split": "val", **found})
    progress.note(f"prune: mIoU {found['miou']:.3f} on val before retraining")


def apply_cut(job: Job, graph: Graph, before: Cut, keep: Keep) -> Cut:
    """`keep` of what `before` left, cut out: refitted and restated as the config says.

    job: of the retraining, with the dense network's apply.
    """
    smaller = shrink_graph(graph, before.keep)
    here = dataclasses.replace(job, apply=slim(job.apply, graph, before.keep))
    refitted = _refitted(here, smaller, keep, before.variables)
    variables, carried = shrink(smaller, keep, (refitted, before.carried))
    keep = compose(before.keep, keep)
    slimmed = dataclasses.replace(job, apply=slim(job.apply, graph, keep))
    return Cut(keep, restated(slimmed, variables), carried)


def _decided(job: Job, before: Keep) -> dict[str, np.ndarray] | None:
    """The last round's keep, where prune.json has it already, of what `before` left."""
    file = job.workdir / _FILE
    if not file.exists():
        return None
    try:
        text = formats.parse(formats.read_text(file))["keep"]
        keep = graph_io.keep_from_text(text)
        return {n: keep[n][before[n]] for n in before}
    except (ValueError, KeyError, TypeError, IndexError, GraphError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); delete it to prune again"
        ) from error


def _refitted(job: Job, graph: Graph, keep: Keep, variables: PyTree) -> PyTree:
    """The variables before the cut, what reads the removed channels refitted."""
    count = job.config.prune.reconstruct
    if not count or all(k.all() for k in keep.values()):
        return variables
    images = choose.images(job, count)
    return reconstruct(job.apply, graph, keep, variables, images, train=False)


def restated(job: Job, variables: PyTree) -> PyTree:
    """The variables with batch statistics of the network as it is now."""

    layout = steps.layout_of(job.config.scale)

    @jax.jit
    def see(variables: PyTree, batch: Any) -> PyTree:
        images = steps.scaled(batch["image"])
        rngs = {"dropout": jax.random.key(job.config.seed)}
        whole = layouts.whole(layout, variables)
        _, updated = job.apply(
            whole, images, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return {**variables, **updated}

    with peers.watched(one := "batch of statistics") as beat:
        for batch in choose.estimates(job, job.config.prune.statistics):
            variables = jax.block_until_ready(see(variables, batch))
            beat(one)
    return layouts.settled(variables)


def recovery(job: Job, number: int) -> Job:
    """The job of the retraining behind round `number`; its apply is still the job's."""
    fit = job.config.retrain
    epochs = job.config.prune.recovery_epochs
    # At least half of it on the way down: what is cut next is judged at its end.
    warmup = min(fit.warmup, epochs / 2)
    fit = dataclasses.replace(fit, epochs=epochs, warmup=warmup)
    around, stage = held(job.config.prune), f"recover{number}"
    return dataclasses.replace(job, stage=stage, fit=fit, around=around)


def _recover(job: Job, graph: Graph, cut: Cut, number: int, progress: Progress) -> Cut:
    """Retrain for a while between two cuts."""
    small = slim(job.apply, graph, cut.keep)
    job = dataclasses.replace(recovery(job, number), apply=small, carried=cut.carried)
    state = train(job, cut.variables, progress)
    return Cut(cut.keep, state.average, _carried(job, state.opt_state))


def _restore(store: checkpoint.Store, number: int, graph: Graph, before: Cut) -> Cut:
    meta = store.meta(number)
    keep = check_keep(graph, graph_io.keep_from_text(meta["keep"]), concrete=True)
    smaller = shrink_graph(graph, before.keep)
    more = {n: keep[n][before.keep[n]] for n in keep}
    small = shrink(smaller, more, (before.variables, before.carried))
    tree, _ = store.restore(number, {"variables": small[0]})
    return Cut(keep, layouts.settled(tree["variables"]), small[1])


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
        "method": described(job),
        "keep": graph_io.keep_to_text(keep),
        "groups": groups,
        "frozen": [
            {**dataclasses.asdict(f), "path": path_str(f.path)} for f in graph.frozen
        ],
        "path": rows or None,
    }
    write_json(job.workdir / _FILE, document)


def described(job: Job) -> str:
    """The method and the budget in words."""
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
