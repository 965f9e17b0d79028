# SPDX-License-Identifier: Apache-2.0
"""A whole run: train, prune, retrain, (from scratch,) evaluate.

Each stage leaves files in the work folder and is skipped when they are there, so the
same command resumes a stopped run. Everything is a function of the config and its seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jaxprune
from jaxprune import checkpoint, data, formats, models, peers
from jaxprune.base import CheckpointError, ConfigError, DataError, Graph, PyTree
from jaxprune.cost import cost
from jaxprune.graph_io import graph_from_json, graph_to_json
from jaxprune.pruned import Pruned
from jaxprune.slim import slim
from jaxprune.trace import trace
from jaxprune.train import choose, compare, cut, folder, thin, vitals
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps
from jaxprune.train.compare import Contender
from jaxprune.train.config import Config, Scale, check, differences
from jaxprune.train.loop import Job, Splits, counts_of, ended, train
from jaxprune.train.metrics import judged
from jaxprune.train.progress import Progress

SPLITS = ("train", "val", "test")


def run(
    config: Config,
    workdir: str | Path,
    *,
    tensorboard: bool = False,
    profile: int = 0,
) -> dict[str, Any]:
    """Run a config in a work folder, from wherever it got to; the evaluation.

    Raises, before any work, ConfigError for a bad config, an encoder's file that does
    not fit, or a folder that another config made, another run is using, or that began
    with other data; BudgetError for a budget that no network meets (of milliseconds,
    once they are measured, before any training); GraphError for a method that can't
    score all of the network; DataError for data that is missing or damaged. Raises
    NonFinite for a diverged run, DiskError for a disk that is full or read-only, and
    PeerError where another process of the run is lost.
    SIGTERM saves and exits with 75; a kill loses the steps since the last save.

    tensorboard: write its events too, into `tensorboard/`. profile: trace so many steps
    of each training into `profile/`, once they are compiled.
    """
    check(config)
    if tensorboard:
        vitals.check_tensorboard()
    _check_devices(config)
    workdir = Path(os.path.abspath(workdir))
    folder.check_free(config, workdir)
    sources = [find_split(config, n) for n in SPLITS]
    if not (workdir / "graph.json").exists():
        check_methods([config], len(sources[0].classes))
    splits = Splits(*(load_split(config, s.split, source=s) for s in sources))
    _check_choice(config, splits.val)
    args = network_args(config, len(splits.train.classes))
    net = models.build(config.network.name, args)
    with peers.told(), folder.claim(config, workdir):
        folder.check_data((splits.train, splits.val, splits.test), workdir)
        first = jax.process_index() == 0
        shown = Progress(
            workdir, speaks=first, tensorboard=tensorboard, profile=profile
        )
        with contextlib.closing(shown) as progress:
            evaluation = _stages(config, net, args, splits, workdir, progress)
            progress.alive("done", 0)
            return evaluation


def _stages(
    config: Config,
    net: Any,
    args: dict[str, Any],
    splits: Splits,
    workdir: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The run in its folder; the evaluation."""
    graph = read_graph(net, config, workdir)
    _opening_card(config, graph, splits, workdir, progress)

    job = Job("train", net.apply, config.train, config, splits, workdir)
    key = jax.random.key(config.seed)
    start = models.init(net, key, config.data.size)
    cut.check_latency(job, graph, start)
    if not ended(job):  # the encoder's file is not needed for ever
        start = _encoded(net, config, start)
    dense = train(job, start, progress)
    teacher = (net.apply, dense.average) if config.distill.weight else None
    job = dataclasses.replace(job, stage="retrain", fit=config.retrain, teacher=teacher)
    if config.prune.low_rank:
        begun, carried = thin.thin_stage(job, graph, dense, progress), None
    else:
        keep, start, carried = cut.prune_stage(job, graph, dense, progress)
        begun = Pruned(slim(net.apply, graph, keep), start, graph, keep)
    small = begun.apply
    job = dataclasses.replace(
        job, apply=small, carried=carried, around=cut.held(config.prune)
    )
    pruned = train(job, begun.variables, progress).average

    costs = cost(graph), cost(begun.graph, begun.keep)
    epochs = pruned_epochs(config)
    networks = {
        "dense": Contender(net.apply, dense.average, costs[0], config.train.epochs),
        "pruned": Contender(small, pruned, costs[1], epochs, cut.nonzero(job, pruned)),
    }
    if config.scratch:
        plain = models.rebuild(net, pruned)
        fresh = _from_scratch(job, plain, epochs, progress)
        networks["scratch"] = Contender(plain.apply, fresh, costs[1], epochs)
    evaluation = compare.evaluate_stage(job, networks, progress)
    found = begun._replace(variables=pruned)
    save_network(config, args, splits, workdir / "final", found, overwrite=True)
    return evaluation


def evaluate(workdir: str | Path, split: str = "test") -> dict[str, Any]:
    """The pruned network of a finished run on one split of its data set.

    Returns miou, global_accuracy, class_accuracy, per_class_iou, miou_error (mIoU's
    standard error over images, or None) and confusion. Raises
    ConfigError for a split of another name, and ConfigError or CheckpointError for a
    folder that holds no finished run; DataError where the data set's classes are not
    the network's.
    """
    workdir = Path(workdir)
    config = folder.read_config(workdir)
    pruned = checkpoint.load(workdir / "final")
    found = load_split(config, split, evaluated=True)
    _check_classes(pruned.info, found)
    judge = jax.jit(steps.make_evaluate(pruned.apply, found.classes.ignore))
    variables = layouts.put(steps.layout_of(Scale()), pruned.variables)
    return judged(counts_of(judge, variables, found, config.evaluate.batch))


def _check_classes(info: Mapping[str, Any], split: data.Split) -> None:
    """Raise DataError where a split's classes are not those that were trained."""
    known = info.get("classes")
    names = known.get("names") if isinstance(known, Mapping) else None
    if names is not None and list(names) != list(split.classes.names):
        raise DataError(
            f"the split {split.name!r} has the classes {', '.join(split.classes.names)}"
            f", the network {', '.join(map(str, names))}; set the data set's classes "
            "back, in its classes.json or its masks"
        )


def check_methods(configs: Sequence[Config], classes: int) -> None:
    """Raise BudgetError for the first budget that not even the narrowest network meets.

    And GraphError for the first method that can't score all of its channels, and
    ConfigError for an encoder's file that does not fit. configs: of one network and one
    size of images.
    """
    first = configs[0]
    net = models.build(first.network.name, network_args(first, classes))
    graph, variables = _traced(net, first)
    _encoded(net, first, variables)
    for config in configs:
        if config.prune.low_rank:
            thin.check_budget(config, net.apply, graph, variables)
        elif config.prune.irregular:
            cut.check_weights(config, net.apply, graph, variables)
        else:
            cut.check_reachable(config.prune, graph)
            images = cut.images_of(config)
            choose.check_method(config.prune, net.apply, graph, variables, images)


def pruned_epochs(config: Config) -> float:
    """Epochs that the pruned network has seen in all."""
    prune = config.prune
    sparse = prune.lasso_epochs if prune.sparse else 0.0
    recovery = prune.recovery_epochs * (prune.rounds - 1)
    return config.train.epochs + sparse + recovery + config.retrain.epochs


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
    if net.stride is not None:
        args["stride"] = net.stride
    if net.depths:
        args["depths"] = list(net.depths)
    if net.pixel_scale is not None:
        args["pixel_scale"] = net.pixel_scale
    return args


def find_split(config: Config, name: str, *, evaluated: bool = False) -> data.Source:
    """A split's files, not read yet; 'train' as stored for it, unless it is evaluated.

    Raises ConfigError for a name that is none of 'train', 'val' and 'test', and
    DataError as `data.find`.
    """
    if name not in SPLITS:
        raise ConfigError(f"split {name!r}: must be one of {', '.join(SPLITS)}")
    where = config.data
    stored = where.stored if name == "train" and not evaluated else None
    count = where.counts and where.counts[SPLITS.index(name)]
    size = stored or where.size
    return data.find(where.source, where.root, name, size, where.cache, count=count)


def load_split(
    config: Config,
    name: str,
    *,
    evaluated: bool = False,
    source: data.Source | None = None,
) -> data.Split:
    """A split, decoded; source: what `find_split` finds.

    Raises what that does, and DataError for a split without a labelled pixel.
    """
    where = config.data
    source = source or find_split(config, name, evaluated=evaluated)
    found = data.store(source, where.cache)
    ignore = found.classes.ignore
    if not any((label != ignore).any() for label in found.labels):
        raise DataError(
            f"the split {name!r} of {where.source}: no pixel of its {len(found)} "
            f"images is labelled, all are {ignore}, which counts for nothing; take "
            "images with labels for it"
        )
    return found


def _check_choice(config: Config, val: data.Split) -> None:
    """Raise ConfigError where the 1-SE rule would find no standard error."""
    if not config.prune.walked or config.prune.choose != "1se":
        return
    counted = sum(bool((label != val.classes.ignore).any()) for label in val.labels)
    if counted < 2:
        raise ConfigError(
            "prune.choose = '1se': a standard error needs 2 labelled validation images "
            f"or more, {counted} counted; set prune.choose to min, knee or budget, or "
            "validate on more (data.counts)"
        )


def _check_devices(config: Config) -> None:
    for name in ("train", "retrain"):
        batch, devices = getattr(config, name).batch, jax.device_count()
        parts = config.scale.accumulate
        if batch % (devices * parts):
            times = f", times the {parts} parts of scale.accumulate" * (parts > 1)
            raise ConfigError(
                f"{name}.batch = {batch}: must be a multiple of the {devices} devices"
                + times
            )


def read_graph(net: Any, config: Config, workdir: Path) -> Graph:
    """The network's graph, from graph.json, or traced and written there."""
    path = workdir / "graph.json"
    if path.exists():
        try:
            return graph_from_json(formats.read_text(path))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it, and it is traced again"
            ) from error
    graph, _ = _traced(net, config)
    folder.write_text(path, graph_to_json(graph))
    return graph


def _traced(net: Any, config: Config) -> tuple[Graph, PyTree]:
    """(graph, the variables' shapes) of the dense network."""
    images = jax.ShapeDtypeStruct((1, *config.data.size, 3), jax.numpy.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    return trace(net.apply, variables, images, train=False), variables


def _encoded(net: Any, config: Config, variables: PyTree) -> PyTree:
    """The variables, or their shapes, with the weights that `network.encoder` holds.

    Raises ConfigError that names the field, the file, and what is wrong with it.
    """
    file = config.network.encoder
    if not file:
        return variables
    try:
        return models.import_encoder(net, variables, file)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"network.encoder = {file!r}: {error}") from error


def _from_scratch(job: Job, net: Any, epochs: float, progress: Progress) -> PyTree:
    """The pruned widths from new weights, for as many epochs as the pruned net had."""
    fit = dataclasses.replace(job.fit, epochs=epochs)
    job = dataclasses.replace(
        job, stage="scratch", apply=net.apply, fit=fit, teacher=None, carried=None
    )
    key = jax.random.key(job.config.seed + 1)
    variables = models.init(net, key, job.config.data.size)
    return train(job, variables, progress).average


def save_network(
    config: Config,
    args: dict[str, Any],
    splits: Splits,
    folder: Path,
    pruned: Pruned,
    *,
    overwrite: bool = False,
    **more: Any,
) -> None:
    """A folder with the pruned network, which `jaxprune.load` opens by itself."""
    checkpoint.save(
        folder,
        pruned,
        overwrite=overwrite,
        network={"name": config.network.name, "args": args},
        classes=dataclasses.asdict(splits.train.classes),
        size=list(config.data.size),
        **more,
    )


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
                f"{jax.device_count()} {jax.devices()[0].platform} in a mesh of one "
                f"axis, {jax.process_count()} process(es)"
                + ", each with its share of the state"
                * (config.scale.shard == "fsdp"),
            ),
            ("work folder", str(workdir)),
            (
                "images",
                f"{len(splits.train)} train, {len(splits.val)} val, "
                f"{len(splits.test)} test, at {height}x{width}",
            ),
            ("parameters", f"{dense.params:,}"),
            ("FLOPs", f"{dense.flops / 1e9:.3f} G an image"),
            ("groups", f"{len(graph.groups)} with {graph.channels:,} channels"),
            ("config", "\n".join(f"{k} = {v}" for k, v in changed.items())),
        ],
    )
