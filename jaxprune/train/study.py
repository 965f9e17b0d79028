# SPDX-License-Identifier: Apache-2.0
"""Methods side by side: one dense network a seed, cut and retrained alike by each.

Every method, budget and seed is a run of its own in a folder of its own, so that a
study that was stopped goes on where it was, also with other methods. The first run of a
seed trains the dense network; the others take it over. All see the same number of
epochs.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from jaxprune import checkpoint, disk, formats, peers
from jaxprune.base import CheckpointError, ConfigError
from jaxprune.bench import bench
from jaxprune.lowrank import Method as LowRank
from jaxprune.train import compare, stages, tabulate
from jaxprune.train.config import Config, Prune, check, to_json
from jaxprune.train.folder import (
    CONFIG,
    DATA,
    TIMINGS,
    check_free,
    made_by,
    read_config,
    write_json,
    write_text,
)
from jaxprune.train.loop import steps_of

# Prices that are estimated anew as channels go: fixed ones empty whole layers.
_STEERED = {"adaptive": 1.0, "criterion": "taylor", "cuts_in_training": 7}
# How a criterion ranks where its entry says nothing else: over all layers, as it is.
_RANKED = {"normalize": "none", "scope": "global", "per_cost": False}
_OVER_MEAN = {"normalize": "mean"}
# What of `Prune` makes a method, as its paper has it: over all layers or in each alike,
# as the scores are or over their group's mean. Its other fields are the config's.
METHODS: dict[str, dict[str, Any]] = {
    "path": {"method": "path", "estimate": "taylor"},
    "path_measured": {"method": "path", "estimate": "measured"},
    "l1": {**_RANKED, "criterion": "magnitude", "scope": "local"},
    "magnitude": {**_RANKED, "criterion": "magnitude", **_OVER_MEAN},
    "l2": {**_RANKED, "criterion": "l2", "scope": "local"},
    "group_l2": {**_RANKED, "criterion": "group_l2", **_OVER_MEAN},
    "taylor": {**_RANKED, "criterion": "taylor"},
    "taylor_per_cost": {**_RANKED, "criterion": "taylor", "per_cost": True},
    "fisher": {**_RANKED, "criterion": "fisher"},
    "bn_scale": {**_RANKED, "criterion": "bn_scale"},
    "geometric_median": {**_RANKED, "criterion": "geometric_median", "scope": "local"},
    "activation": {**_RANKED, "criterion": "activation", **_OVER_MEAN},
    "apoz": {**_RANKED, "criterion": "apoz", **_OVER_MEAN},
    "reconstruction": {"method": "layerwise", "reconstruct": 8},
    "lamp": {**_RANKED, "criterion": "lamp"},
    "random": {**_RANKED, "criterion": "random", **_OVER_MEAN},
    "random_masks": {"method": "random_masks"},
    "particles": {"method": "particles"},
    "weights": {"method": "weights"},
    "lasso": {"method": "lasso", **_STEERED, "roles": "both"},
    "lasso_then_path": {"method": "lasso_then_path", **_STEERED, "roles": "both"},
    "ssl_filters": {"method": "lasso", **_STEERED, "roles": "out"},
    "ssl_channels": {"method": "lasso", **_STEERED, "roles": "in"},
    "gates": {"method": "gates", **_STEERED},
    **{name: {"method": name} for name in get_args(LowRank)},
}
# What widths that are multiples of a number add to those of a penalty, about.
_ROOM = 0.95

_LATENCIES = "latencies.json"
_BUDGET = r"\d+\.?\d*(?:e-\d+)?"
_NAME = re.compile(rf"({'|'.join(METHODS)})-({_BUDGET})-seed(\d+)")  # as of `_name`


def study(
    config: Config,
    workdir: str | Path,
    methods: Sequence[str],
    budgets: Sequence[float],
    seeds: Sequence[int] = (0,),
) -> list[dict[str, Any]]:
    """Run all, time their networks, and write comparison.json and .md; the rows.

    The rows are over seeds, of these runs and of all that have ended in the folder; the
    json holds the scores of each beside them. Methods that train under a penalty are
    steered to the budget, cut once, and retrain that much shorter: they have
    `prune.lasso_epochs` of the epochs for it, half of them at most. Where the config
    asks for a network from scratch, it is of the widths of the first method that cuts
    channels, of a budget and a seed. Of 'weights', the budget is the share of FLOPs or
    parameters that are not of zeros; its rows tell the cost on hardware for dense
    products, and that share beside it.
    Raises ConfigError for an unknown method, a budget that is no fraction, a folder of
    other things, or a run that another config has begun, BudgetError for a budget that
    no network meets, before any work (of milliseconds, before the training of each
    run), and what `run` does.
    """
    workdir = Path(os.path.abspath(workdir))
    _check_own(workdir)
    plans = [
        (method, budget, seed, planned(config, method, budget, seed, scratched))
        for seed in seeds
        for budget in budgets
        for scratched in [
            _scratched(workdir, budget, seed) or _narrower(config, methods)
        ]
        for method in methods
    ]
    if not plans:
        raise ConfigError("compare: name at least one method, budget and seed")
    for method, budget, seed, plan in plans:
        check(plan)
        check_free(plan, workdir / _name(method, budget, seed))
    source, *_ = [stages.find_split(config, n) for n in stages.SPLITS]
    stages.check_methods([plan for *_, plan in plans], len(source.classes))
    train = stages.load_split(config, "train", source=source)
    for method, budget, seed, plan in plans:
        folder = workdir / _name(method, budget, seed)
        _take_over(workdir, folder, plan, len(train))
        stages.run(plan, folder)
    found = _ended(config, workdir)
    times = timed(config, workdir, [run["name"] for run in found])
    runs = tabulate.scores(found, times)
    rows = tabulate.table(runs)
    write_json(workdir / "comparison.json", {"rows": rows, "runs": runs})
    write_text(workdir / "comparison.md", tabulate.as_markdown(rows))
    return rows


def _check_own(workdir: Path) -> None:
    """Raise ConfigError for a folder that is not empty and holds no run of a study."""
    if not workdir.exists():
        return
    names = os.listdir(workdir) if workdir.is_dir() else ["no folder"]
    if names and not any(map(_NAME.fullmatch, names)):
        raise ConfigError(
            f"{workdir} is no folder of a comparison, and not empty; choose another "
            "--workdir"
        )


def _name(method: str, budget: float, seed: int) -> str:
    """The folder of a run, within the study's."""
    return f"{method}-{float(budget)!r}-seed{seed}"


def _ended(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """{method, budget, seed, name} and the networks of each run of `config` there."""
    found = []
    for folder in sorted(workdir.glob("*-seed*")):
        named = _NAME.fullmatch(folder.name)
        if named is None or not checkpoint.is_saved(folder / "final"):
            continue
        method, budget, seed = named[1], float(named[2]), int(named[3])
        scratched = [method] if read_config(folder).scratch else []
        if made_by(planned(config, method, budget, seed, scratched), folder):
            which = {"method": method, "budget": budget, "seed": seed}
            networks = compare.read(folder)["networks"]
            found.append({**which, "name": folder.name, **networks})
    return found


def _scratched(workdir: Path, budget: float, seed: int) -> list[str]:
    """The methods that have begun with a network from scratch of their widths."""
    folders = {method: workdir / _name(method, budget, seed) for method in METHODS}
    begun = [m for m, folder in folders.items() if (folder / CONFIG).exists()]
    return [m for m in begun if read_config(folders[m]).scratch]


def _narrower(config: Config, methods: Sequence[str]) -> list[str]:
    """The first of the methods that leaves widths to begin anew from, if any does."""
    for method in methods:
        prune = dataclasses.replace(config.prune, **METHODS.get(method, {}))
        if prune.channelwise:
            return [method]
    return []


def _trained(workdir: Path, plan: Config, images: int) -> Path | None:
    """A run of the study that has trained the plan's dense network, on these images."""

    def dense(config: Config) -> Any:
        data = dataclasses.replace(config.data, root="", cache=None)
        return config.network, data, config.train, config.seed, config.scale

    for folder in sorted(workdir.glob("*")):
        if (folder / CONFIG).exists() and dense(read_config(folder)) == dense(plan):
            store = checkpoint.open_store(folder / "checkpoints" / "train")
            if store.latest() == steps_of(plan.train, images)[1]:
                return folder
    return None


def timed(config: Config, workdir: Path, names: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of one image: of the runs' networks, and of 'dense'.

    All in turns, on the first process, at the end: runs end hours apart, and a machine
    is not the same then. Kept in latencies.json; of one more run, all are timed anew.
    Nothing where the config asks for no repeats.
    """
    if not config.evaluate.repeats:
        return {}
    file = workdir / _LATENCIES
    if jax.process_index() == 0 and not set(names) <= set(_known(file)):
        finals = {name: workdir / name / "final" for name in names}
        one = finals[names[0]]
        dense = checkpoint.dense_network(one, checkpoint.load(one).info)
        image = np.random.default_rng(0).random((1, *config.data.size, 3), np.float32)
        networks = {"dense": (dense.apply, dense.init(jax.random.key(0), image))}
        for name, final in finals.items():
            pruned = checkpoint.load(final)
            networks[name] = pruned.apply, pruned.variables
        print(f"timing {len(networks)} networks in turns", flush=True)
        speeds = bench(networks, image, repeats=config.evaluate.repeats, train=False)
        write_json(file, {name: s.percentile(50) for name, s in speeds.items()})
    with peers.patience(peers.MOST):  # as long as that takes
        peers.barrier("jaxprune latencies")
    return _known(file)


def _known(file: Path) -> dict[str, float]:
    try:
        found = formats.parse(formats.read_text(file)) if file.exists() else {}
        return {name: float(ms) for name, ms in found.items()}
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged ({error}); delete it to time again"
        ) from error


def planned(
    config: Config, method: str, budget: float, seed: int, scratched: Sequence[str]
) -> Config:
    """The config of one run of the study.

    scratched: the methods with a network from scratch of their widths, where the config
    asks for one.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1, 0.5)
        hint = f"is {near[0]!r} meant?" if near else f"there are {', '.join(METHODS)}"
        raise ConfigError(f"compare: no method {method!r}; {hint}")
    prune = dataclasses.replace(
        config.prune, method="criterion", ratio=budget, choose="budget"
    )
    prune = _without_others(dataclasses.replace(prune, **METHODS[method]))
    retrain = config.retrain
    if prune.sparse:
        # Steered to the budget, with room for zeros that stay, and cut once; or half of
        # the way, and the other half along the path. Half of the epochs at least are
        # behind the first cut, and of these, half behind the last one.
        total = retrain.epochs + prune.recovery_epochs * (prune.rounds - 1)
        spent = min(prune.lasso_epochs, total / 2)
        rounds = 2 if prune.walked else 1
        half = math.sqrt(max(budget, 0.0))  # below 0 it is the ratio that is refused
        recovery = min(prune.recovery_epochs, (total - spent) / 2)
        rest = total - spent - recovery * (rounds - 1)
        prune = dataclasses.replace(
            prune,
            lasso_epochs=spent,
            target=_ROOM * (half if prune.walked else budget),
            strength=prune.strength if prune.scaled else 0.0,
            ramp=0.0,
            rounds=rounds,
            recovery_epochs=recovery,
            carry_optimizer=False,
        )
        retrain = dataclasses.replace(
            retrain, epochs=rest, warmup=min(retrain.warmup, rest)
        )
    if prune.irregular and prune.rounds == 1:
        # Han et al. cut again and again: three cuts share the retraining.
        each = retrain.epochs / 3
        rest = retrain.epochs - 2 * each
        prune = dataclasses.replace(prune, rounds=3, recovery_epochs=each)
        retrain = dataclasses.replace(
            retrain, epochs=rest, warmup=min(retrain.warmup, each, rest)
        )
    if prune.low_rank:
        more = prune.recovery_epochs * (prune.rounds - 1)
        retrain = dataclasses.replace(retrain, epochs=retrain.epochs + more)
        prune = dataclasses.replace(prune, rounds=1, carry_optimizer=False)
    return dataclasses.replace(
        config,
        name=f"{config.name}_{method}",
        seed=config.seed + seed,
        prune=prune,
        retrain=retrain,
        scratch=config.scratch and method in scratched and prune.channelwise,
    )


def _without_others(prune: Prune) -> Prune:
    """Without what the config says of another method of the study."""
    off: dict[str, Any] = {}
    if not prune.sparse:
        off |= {
            "repriced": False,
            "target": 0.0,
            "cuts_in_training": 0,
            "adaptive": 0.0,
            "ramp": 0.0,
        }
    if prune.gated and prune.accelerated or not prune.sparse:
        off["metric"] = "plain"
    if prune.gated or not prune.sparse:
        off["roles"] = "both"
    if not prune.gated:
        off["accelerated"] = False
    if not prune.channelwise:
        off["reconstruct"] = 0
    if prune.walked:
        off |= {"scope": "global", "per_cost": False}
    else:
        off["estimate"] = "taylor"
    return dataclasses.replace(prune, **off)


def _take_over(workdir: Path, folder: Path, plan: Config, images: int) -> None:
    """Begin a run with the dense network that another one has trained, if any has.

    And with the milliseconds that another one has measured: clocks differ from hour to
    hour, and all methods are to cut by the same. The first process copies, the others
    wait.
    """
    trained, timings = folder / "checkpoints" / "train", folder / TIMINGS
    if jax.process_index() == 0:
        first = None if trained.exists() else _trained(workdir, plan, images)
        if first is not None:
            with disk.writing(folder):
                _copy(first, folder, plan)
        known = [] if timings.exists() else sorted(workdir.glob(f"*/{TIMINGS}"))
        if known:
            text = known[0].read_text("utf-8")
            with disk.writing(folder):
                _begin(folder, plan)
                write_text(timings, text)
    peers.barrier(f"jaxprune began {folder}")


def _begin(folder: Path, plan: Config) -> None:
    """As `run` would begin, which then finds its own config."""
    if not (folder / CONFIG).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, to_json(plan))


def _stage(row: str) -> str | None:
    """The stage of a row of metrics; None for one that was cut off, as for `rewind`."""
    try:
        found = formats.parse(row)
    except ValueError:
        return None
    return found.get("stage") if isinstance(found, dict) else None


def _copy(first: Path, folder: Path, plan: Config) -> None:
    """The other run's checkpoints and rows of its dense network; the plan's config."""
    partial = folder / "checkpoints" / ".train.taken"
    shutil.rmtree(partial, ignore_errors=True)
    _begin(folder, plan)
    if (first / DATA).exists():  # so that the run tells other data than it trained on
        write_text(folder / DATA, (first / DATA).read_text("utf-8"))
    rows = (first / "metrics.jsonl").read_text("utf-8").splitlines()
    mine = [row for row in rows if _stage(row) == "train"]
    write_text(folder / "metrics.jsonl", "".join(f"{row}\n" for row in mine))
    shutil.copytree(first / "checkpoints" / "train", partial)
    partial.rename(folder / "checkpoints" / "train")
