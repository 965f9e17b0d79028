# SPDX-License-Identifier: Apache-2.0
"""Configs of runs, read from files and checked whole before any work.

A config is a Python file whose `get_config()` returns a `Config`; see `configs/`.
"""

import dataclasses
import json
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxprune import formats
from jaxprune.base import ConfigError
from jaxprune.data import Augment
from jaxprune.train import settings
from jaxprune.train.fields import (
    Config,
    Data,
    Distill,
    Evaluate,
    Fit,
    Network,
    Prune,
    Scale,
)

__all__ = [
    "Config",
    "Data",
    "Distill",
    "Evaluate",
    "Fit",
    "Network",
    "Prune",
    "Scale",
    "check",
    "differences",
    "from_json",
    "load_config",
    "to_json",
]


# Beyond these a number is a slip of the finger.
_MOST_PIXELS, _MOST_CHANNELS, _MOST_IMAGES = 1 << 15, 1 << 20, 1 << 20


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a Python file, with `a.b=value` overrides applied, checked.

    Raises ConfigError for a file that is none, an unknown field (naming the nearest), a
    value of the wrong type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; see configs/ for some")
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config() if callable(get_config) else get_config
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ConfigError(f"{path}{_line(path, error)}: {_explain(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path}: it must define get_config() that returns a jaxprune.train.Config"
        )
    try:
        settings.check_types(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for override in overrides:
        config = settings.override(config, override)
    return check(config)


def check(config: Config) -> Config:
    """The config itself; ConfigError that names the first field which is wrong."""
    settings.check_types(config)
    for where in ("train", "retrain"):
        _check_fit(where, getattr(config, where))
    _check_prune(config.prune)
    for name, valid, need in _rules(config):
        if not valid:
            value = settings.get(config, name)
            raise ConfigError(f"{name} = {value!r}: must be {need}")
    return config


def to_json(config: Config) -> str:
    """The config as JSON text, tuples as lists."""
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote; fields that it lacks have their defaults."""
    try:
        config = settings.from_dict(Config, formats.parse(text))
        settings.check_types(config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"this is no config of a run: {error}") from error
    return config


def differences(config: Config, default: Config | None = None) -> dict[str, Any]:
    """{'prune.ratio': value, ...} of what differs from the default config."""
    mine = settings.flatten(dataclasses.asdict(config))
    other = settings.flatten(dataclasses.asdict(default or Config()))
    return {name: value for name, value in mine.items() if value != other[name]}


def _rules(config: Config) -> list[tuple[str, bool, str]]:
    """(field, whether it is valid, what it must be)."""
    data, evaluate, distill = config.data, config.evaluate, config.distill
    prune = config.prune
    stored = data.stored or data.size
    sizes = all(0 < n <= _MOST_PIXELS for n in (*data.size, *stored))
    sizes = sizes and all(n > 0 for n in data.counts or ())
    widths = all(0 < n <= _MOST_CHANNELS for n in config.network.widths)
    same = config.train.optimizer == config.retrain.optimizer
    fcn = config.network.name == "fcn"
    resnet = config.network.name in ("deeplab", "refinenet")
    depths = config.network.depths
    return [
        ("name", re.fullmatch(r"[\w.-]+", config.name) is not None, "a file's name"),
        ("seed", 0 <= config.seed < 2**31, "a whole number from 0 to 2^31 - 1"),
        ("network.widths", widths, f"from 1 to {_MOST_CHANNELS} each"),
        ("network.dropout", 0 <= config.network.dropout < 1, "in [0, 1)"),
        (
            "network.stride",
            config.network.stride in ((None, 8, 16, 32) if fcn else (None,)),
            "8, 16 or 32, or none" if fcn else "none where network.name is not 'fcn'",
        ),
        (
            "network.depths",
            not depths
            or (resnet and len(depths) == 4 and all(0 < n <= 100 for n in depths)),
            "four numbers from 1 to 100, or none"
            if resnet
            else "none where network.name is not 'deeplab' or 'refinenet'",
        ),
        (
            "data.size",
            sizes,
            f"from 1 to {_MOST_PIXELS}, as must be data.stored; data.counts: positive",
        ),
        ("data.augment.crop", data.augment.crop is None, "none: data.size decides"),
        ("distill.weight", 0 <= distill.weight <= 1, "in [0, 1]"),
        ("distill.temperature", distill.temperature > 0, "positive"),
        ("evaluate.every", evaluate.every > 0, "positive"),
        (
            "evaluate.batch",
            0 < evaluate.batch <= _MOST_IMAGES,
            f"from 1 to {_MOST_IMAGES}",
        ),
        ("evaluate.repeats", evaluate.repeats >= 0, "0 or more"),
        ("evaluate.samples", evaluate.samples > 0, "positive"),
        ("save_every", config.save_every > 0, "positive"),
        (
            "scratch",
            not config.scratch or prune.channelwise,
            f"false where the method is {prune.method!r}: no widths change",
        ),
        *(
            (
                f"{where}.augment",
                data.augment.colour * getattr(config, where).augment <= 1,
                "1 / data.augment.colour at most",
            )
            for where in ("train", "retrain")
        ),
        *_scale_rules(config),
        # Another optimiser has no use for the moments of the one before.
        (
            "prune.carry_optimizer",
            not prune.carry_optimizer or same,
            "false where train.optimizer and retrain.optimizer differ",
        ),
        (
            "prune.metric",
            prune.metric == "plain" or config.train.optimizer == "adam",
            "'plain' where train.optimizer is not 'adam'",
        ),
    ]


def _scale_rules(config: Config) -> list[tuple[str, bool, str]]:
    scale, prune = config.scale, config.prune
    on_host = not prune.channelwise or prune.reconstruct > 0
    batches = [getattr(config, where).batch for where in ("train", "retrain")]
    even = scale.accumulate > 0 and all(b % scale.accumulate == 0 for b in batches)
    return [
        ("scale.accumulate", even, "positive, and divide train.batch, retrain.batch"),
        (
            "scale.shard",
            scale.shard == "none" or not on_host,
            f"'none' where the method is {prune.method!r} or prune.reconstruct is not "
            "0: those work on whole kernels",
        ),
    ]


def _check_fit(where: str, fit: Fit) -> None:
    rules = [
        ("epochs", fit.epochs >= 0, "0 or more"),
        ("batch", 0 < fit.batch <= _MOST_IMAGES, f"from 1 to {_MOST_IMAGES}"),
        ("lr", fit.lr > 0, "positive"),
        ("warmup", 0 <= fit.warmup <= fit.epochs, "from 0 to epochs"),
        ("weight_decay", fit.weight_decay >= 0, "0 or more"),
        ("momentum", 0 <= fit.momentum < 1, "in [0, 1)"),
        ("class_weights", fit.class_weights >= 0, "0 or more"),
        ("label_smoothing", 0 <= fit.label_smoothing < 1, "in [0, 1)"),
        ("jaccard", fit.jaccard >= 0, "0 or more"),
        ("ema", 0 <= fit.ema < 1, "in [0, 1)"),
        ("clip", fit.clip >= 0, "0 or more"),
        ("augment", fit.augment >= 0, "0 or more"),
        ("rollbacks", fit.rollbacks > 0, "positive"),
    ]
    _apply(where, fit, rules)


def _check_prune(prune: Prune) -> None:
    # The moments of a weight are not those of its product with a gate.
    carried = prune.carry_optimizer and prune.gated
    counted = not prune.irregular or prune.budget in ("flops", "params")
    rules = [
        ("ratio", 0 < prune.ratio <= 1, "the fraction that stays, in (0, 1]"),
        ("budget", counted, "flops or params where the method is 'weights'"),
        (
            "multiple_of",
            prune.multiple_of == "auto" or prune.multiple_of > 0,
            "positive, or 'auto'",
        ),
        ("min_channels", prune.min_channels > 0, "positive"),
        ("batches", prune.batches > 0, "positive"),
        ("rounds", prune.rounds > 0, "positive"),
        ("recovery_epochs", prune.recovery_epochs >= 0, "0 or more"),
        ("lasso_epochs", prune.lasso_epochs >= 0, "0 or more"),
        ("strength", prune.strength >= 0, "0 or more"),
        (
            "strength",
            prune.strength > 0 or not (prune.target and prune.scaled),
            "positive with a target where metric is 'optimizer', or accelerated",
        ),
        ("gates_lr", prune.gates_lr > 0, "positive"),
        ("target", 0 <= prune.target <= 1, "in [0, 1]; 0: none"),
        ("cuts_in_training", prune.cuts_in_training >= 0, "0 or more"),
        ("block", 0 <= prune.block < 1, "in [0, 1)"),
        ("trials", prune.trials > 0, "positive"),
        ("stages", prune.stages > 0, "positive"),
        (
            "stages",
            prune.method != "particles" or prune.stages <= prune.trials,
            "at most prune.trials where the method is 'particles'",
        ),
        ("reconstruct", prune.reconstruct >= 0, "0 or more"),
        (
            "reconstruct",
            not (prune.irregular and prune.reconstruct),
            "0 where the method is 'weights'",
        ),
        (
            "reconstruct",
            prune.method != "layerwise" or prune.reconstruct > 0,
            "the number of batches to refit to, where the method is 'layerwise'",
        ),
        ("statistics", prune.statistics >= 0, "0 or more"),
        ("carry_optimizer", not carried, "false where the method is 'gates'"),
    ]
    rules += _penalty_rules(prune)
    rules += _low_rank_rules(prune) if prune.low_rank else []
    _apply("prune", prune, rules)


def _penalty_rules(prune: Prune) -> list[tuple[str, bool, str]]:
    """What other methods would pass over is refused."""
    walk = "where the method walks no path"
    off = "where the method is not"
    own = "where the method trains under no penalty"
    return [
        (
            "metric",
            prune.sparse or prune.metric == "plain",
            f"'plain' {own}",
        ),
        (
            "metric",
            not prune.accelerated or prune.metric == "plain",
            "'plain' where gates are accelerated: no Adam moves them",
        ),
        ("choose", prune.walked or prune.choose == "budget", f"'budget' {walk}"),
        ("estimate", prune.walked or prune.estimate == "taylor", f"'taylor' {walk}"),
        (
            "scope",
            not prune.walked or prune.scope == "global",
            "'global' where the method walks a path: it orders all groups by cost",
        ),
        (
            "per_cost",
            not (prune.walked and prune.per_cost),
            "false where the method walks a path: it is by cost",
        ),
        ("accelerated", prune.gated or not prune.accelerated, f"false {off} 'gates'"),
        ("repriced", prune.sparse or not prune.repriced, f"false {own}"),
        (
            "roles",
            prune.roles == "both" or (prune.sparse and not prune.gated),
            "'both' where the method penalises no weights",
        ),
        (
            "ramp",
            0 <= prune.ramp <= (prune.lasso_epochs if prune.sparse else 0),
            "from 0 to prune.lasso_epochs, and 0 where the method trains under no "
            "penalty",
        ),
        (
            "ramp",
            not (prune.ramp and prune.target),
            "0 where prune.target steers the strength",
        ),
        ("adaptive", 0 <= prune.adaptive <= 4, "in [0, 4]"),
        ("adaptive", prune.sparse or not prune.adaptive, f"0 {own}"),
        ("target", prune.sparse or not prune.target, f"0 {own}"),
        ("cuts_in_training", prune.sparse or not prune.cuts_in_training, f"0 {own}"),
    ]


def _low_rank_rules(prune: Prune) -> list[tuple[str, bool, str]]:
    where = f"where the method is {prune.method!r}"
    kinds = prune.budget in ("flops", "params")
    return [
        ("budget", kinds, f"flops or params {where}"),
        ("rounds", prune.rounds == 1, f"1 {where}"),
        ("reconstruct", prune.reconstruct == 0, f"0 {where}"),
        ("carry_optimizer", not prune.carry_optimizer, f"false {where}"),
    ]


def _apply(where: str, of: Any, rules: Sequence[tuple[str, bool, str]]) -> None:
    for name, valid, need in rules:
        if not valid:
            value = getattr(of, name)
            raise ConfigError(f"{where}.{name} = {value!r}: must be {need}")


def _line(path: Path, error: BaseException) -> str:
    """`:12`, the line of the config that an error came out of, or nothing."""
    trace = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in trace if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""


def _explain(error: BaseException) -> str:
    """The error's text; for a misspelt keyword, the nearest right one."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", str(error))
    kinds: dict[str, Callable[..., Any]] = {
        kind.__name__: kind
        for kind in (
            Config,
            Network,
            Data,
            Augment,
            Fit,
            Prune,
            Distill,
            Scale,
            Evaluate,
        )
    }
    if match and match[1] in kinds:
        return settings.unknown(match[2], kinds[match[1]], match[1])
    return f"{type(error).__name__}: {error}"
