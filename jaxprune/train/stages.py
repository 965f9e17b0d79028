# SPDX-License-Identifier: Apache-2.0
"""A whole run: train, prune, retrain, (from scratch,) evaluate, report.

Each stage leaves files in the work folder and is skipped when they are there, so the
same command resumes a stopped run. Everything is a function of the config and its seed.
"""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

import jax

import jaxprune
from jaxprune import checkpoint, data, models
from jaxprune.base import Graph, Keep, PyTree
from jaxprune.cost import cost
from jaxprune.graph_io import graph_from_json, graph_to_json
from jaxprune.slim import slim
from jaxprune.trace import trace
from jaxprune.train import compare, cut
from jaxprune.train import config as configs
from jaxprune.train.config import Config, Fit, check, differences, to_json
from jaxprune.train.loop import Job, Splits, train
from jaxprune.train.progress import Progress
from jaxprune.trees import shrink


def run(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Run a config in a work folder, from wherever it got to; the evaluation.

    Raises ConfigError before any work for a bad config, or a folder that another config
    made; DataError for data that is missing or damaged; NonFinite for a diverged run.
    SIGTERM saves and exits with 143; a kill loses the steps since the last save.
    """
    check(config)
    workdir = Path(os.path.abspath(workdir))
    _claim(config, workdir)
    progress = Progress(workdir, speaks=jax.process_index() == 0)
    splits = load_splits(config)
    args = network_args(config, len(splits.train.classes))
    net = models.build(config.network.name, args)
    graph = _graph(net, config, workdir)
    _opening_card(config, graph, splits, workdir, progress)

    job = Job("train", net.apply, config.train, config, splits, workdir)
    key = jax.random.key(config.seed)
    dense = train(job, models.init(net, key, config.data.size), progress)
    keep, start = cut.prune_stage(job, graph, dense, progress)
    slimmed = slim(net.apply, graph, keep)
    job = dataclasses.replace(
        job,
        stage="retrain",
        apply=slimmed,
        fit=config.retrain,
        teacher=(net.apply, dense) if config.distill.weight else None,
    )
    pruned = train(job, shrink(graph, keep, start), progress)
    networks = {
        "dense": compare.Contender(net.apply, dense, cost(graph), config.train.epochs),
        "pruned": compare.Contender(
            slimmed, pruned, cost(graph, keep), _epochs(config)
        ),
    }
    if config.scratch:
        networks["scratch"] = _scratch(job, net, pruned, graph, keep, progress)
    evaluation = compare.evaluate_stage(job, networks, progress)
    if jax.process_index() == 0:
        _finish(config, workdir, net, slimmed, pruned, graph, keep, splits)
    progress.note(f"report: {_report(workdir)}")
    return evaluation


def _epochs(config: Config) -> float:
    """Epochs that the pruned network has seen in all."""
    prune = config.prune
    sparse = prune.lasso_epochs if prune.method == "lasso" else 0.0
    return config.train.epochs + sparse + config.retrain.epochs


def network_args(config: Config, classes: int) -> dict[str, Any]:
    """The fields of the config's network that differ from its own defaults."""
    net = config.network
    args: dict[str, Any] = {"num_classes": classes}
    if net.widths:
        args["widths"] = list(net.widths)
    if net.dropout:
        args["dropout"] = net.dropout
    if net.dtype != "float32":
        args["dtype"] = net.dtype
    return args


def load_splits(config: Config) -> Splits:
    """The three splits; only the training one may be stored larger."""
    found = {}
    for i, name in enumerate(("train", "val", "test")):
        size = config.data.stored if name == "train" else None
        found[name] = data.load(
            config.data.source,
            config.data.root,
            name,
            size or config.data.size,
            config.data.cache,
            count=config.data.counts[i] if config.data.counts else None,
        )
    return Splits(**found)


def _claim(config: Config, workdir: Path) -> None:
    """Write config.json, or check that the folder is this config's."""
    path = workdir / "config.json"
    if path.exists():
        configs.compare(config, path.read_text("utf-8"), str(workdir))
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(config))


def write_text(path: Path, text: str) -> None:
    """Write a file all at once."""
    if jax.process_index() == 0:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, "utf-8")
        os.replace(partial, path)


def _graph(net: Any, config: Config, workdir: Path) -> Graph:
    path = workdir / "graph.json"
    if path.exists():
        return graph_from_json(path.read_text("utf-8"))
    images = jax.ShapeDtypeStruct((1, *config.data.size, 3), jax.numpy.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    graph = trace(net.apply, variables, images, train=False)
    write_text(path, graph_to_json(graph))
    return graph


def _scratch(
    job: Job, net: Any, pruned: PyTree, graph: Graph, keep: Keep, progress: Progress
) -> compare.Contender:
    """The pruned widths from new weights, for as many epochs as the pruned net had."""
    small = models.rebuild(net, pruned)
    epochs = _epochs(job.config)
    fit: Fit = dataclasses.replace(job.fit, epochs=epochs)
    job = dataclasses.replace(
        job, stage="scratch", apply=small.apply, fit=fit, teacher=None
    )
    key = jax.random.key(job.config.seed + 1)
    variables = train(job, models.init(small, key, job.config.data.size), progress)
    return compare.Contender(small.apply, variables, cost(graph, keep), epochs)


def _finish(
    config: Config,
    workdir: Path,
    net: Any,
    slimmed: Any,
    variables: PyTree,
    graph: Graph,
    keep: Keep,
    splits: Splits,
) -> None:
    """`final/`: the pruned network, which `jaxprune.load` opens."""
    args = network_args(config, len(splits.train.classes))
    checkpoint.save(
        workdir / "final",
        checkpoint.Pruned(slimmed, variables, graph, keep),
        overwrite=True,
        network={"name": config.network.name, "args": args},
        classes=dataclasses.asdict(splits.train.classes),
        size=list(config.data.size),
    )


def _report(workdir: Path) -> Path | str:
    from jaxprune import report

    return report.write(workdir) if jax.process_index() == 0 else ""


def _opening_card(
    config: Config, graph: Graph, splits: Splits, workdir: Path, progress: Progress
) -> None:
    changed = differences(config)
    dense = cost(graph)
    height, width = config.data.size
    progress.card(
        f"jaxprune {jaxprune.__version__}: {config.name}",
        [
            ("versions", f"python {platform.python_version()}, jax {jax.__version__}"),
            (
                "devices",
                f"{jax.device_count()} {jax.devices()[0].platform}, "
                f"{jax.process_count()} process(es)",
            ),
            ("work folder", str(workdir)),
            (
                "images",
                f"{len(splits.train)} / {len(splits.val)} / {len(splits.test)} "
                f"at {height}x{width}",
            ),
            ("parameters", f"{dense.params:,}"),
            ("FLOPs", f"{dense.flops / 1e9:.3f} G an image"),
            ("groups", f"{len(graph.groups)} with {graph.channels:,} channels"),
            ("config", "\n".join(f"{k} = {v}" for k, v in changed.items())),
        ],
    )
