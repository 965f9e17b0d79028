# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: frozen dataclasses, checked whole before any work.

A config is a Python file whose `get_config()` returns a `Config`; see `configs/`.
"""

import dataclasses
import json
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jaxprune import formats
from jaxprune.base import ConfigError
from jaxprune.data import Augment
from jaxprune.lowrank import Method as LowRank
from jaxprune.train import settings
from jaxprune.train.layout import Shard


@dataclasses.dataclass(frozen=True)
class Network:
    """A shipped network. widths: () for its own, else as `jaxprune.models` takes them.

    dropout: SegNet's and FCN's (0.5: Bayesian SegNet). encoder: a file of torchvision's
    weights that training starts from, see `models.import_encoder`; "": He's. dtype: of
    the computation; parameters, batch statistics and logits stay float32.
    """

    name: Literal["segnet", "segnet_basic", "unet", "fcn", "deeplab", "refinenet"] = (
        "segnet"
    )
    widths: tuple[int, ...] = ()
    dropout: float = 0.0
    encoder: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set, as `jaxprune.data.load` finds it.

    size: (H, W) of training and evaluation. stored: of the training frames that
    `augment` cuts its views from; None: `size`. counts: the first so many samples of
    train, val and test (synthetic scenes: how many are drawn); None: all.
    """

    source: str = "camvid"
    root: str | None = None
    size: tuple[int, int] = (360, 480)
    stored: tuple[int, int] | None = None
    counts: tuple[int, int, int] | None = None
    cache: str | None = None
    augment: Augment = Augment()


@dataclasses.dataclass(frozen=True)
class Fit:
    """One training. lr: the highest rate, after `warmup` epochs of linear increase.

    optimizer: 'muon' orthogonalises the updates of kernels, at Adam's rates; it learns
    in fewer epochs. schedule: 'cosine' falls to 0. weight_decay: of kernels alone; part
    of the gradient with sgd, else decoupled. momentum: of sgd. class_weights: the power
    of the median-frequency weights; 0: none. jaccard: the weight of the soft Jaccard
    loss, one minus the mean IoU of a batch's probabilities, added to the cross entropy.
    ema: the decay of the moving average of the weights that is evaluated and kept; 0:
    the last weights. clip: the largest norm of a gradient; 0: none. augment: a factor
    of `data.augment`'s strengths; a network that is trained already bears more of it.
    on_nan: where the loss is not finite, 'stop', or 'skip': go back to the last save,
    and pass over the batches since; at most `rollbacks` times a training.
    """

    epochs: float = 80.0
    batch: int = 8
    optimizer: Literal["adam", "sgd", "muon"] = "adam"
    lr: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    class_weights: float = 0.5
    label_smoothing: float = 0.0
    jaccard: float = 0.0
    ema: float = 0.0
    clip: float = 0.0
    augment: float = 1.0
    on_nan: Literal["stop", "skip"] = "stop"
    rollbacks: int = 3


# Beyond these a number is a slip of the finger.
_MOST_PIXELS, _MOST_CHANNELS, _MOST_IMAGES = 1 << 15, 1 << 20, 1 << 20

Method = Literal[
    "criterion", "path", "lasso", "gates", "random_masks", "particles", "weights"
]
Criterion = Literal[
    "magnitude",
    "taylor",
    "fisher",
    "bn_scale",
    "geometric_median",
    "activation",
    "apoz",
    "reconstruction",
    "lamp",
    "random",
]


@dataclasses.dataclass(frozen=True)
class Prune:
    """Which channels go. budget, ratio: at most `ratio` of the dense cost stays.

    'latency': the milliseconds of the convolutions, measured on the device at hand for
    `evaluate.batch` images and kept in the work folder's timings.json.

    method: 'criterion' scores and selects; 'path' cuts back by cost complexity, `block`
    of the cost at a time, and takes the step that `choose` says (`Path.select`);
    'lasso' first trains on for `lasso_epochs` with proximal steps of `strength` times
    the learning rate, and cuts what is 0 then, or the least where that is over the
    budget; 'gates' does the same to one trained number per channel, and folds those
    that stay into the weights; 'random_masks' takes the best of `trials` random masks
    by the loss on the validation split; 'particles' cuts, weighs and resamples trials /
    stages of them in `stages`; 'weights' cuts no channel but single weights, and holds
    them at 0 in retraining: the budget then counts what a machine that skips zeros
    would be spared. Low rank instead of fewer channels, of FLOPs or parameters: a
    method of `jaxprune.factorize`, 'svd' or 'asymmetric' for example, over `batches`;
    ranks are multiples of multiple_of.
    estimate: of what the loss gains, for 'path', over `batches`: 'taylor' squared,
    'taylor1' first order, 'fisher' second; 'reconstruction': the relative error of what
    reads; 'measured': the loss itself without each group's next unit, which 'taylor'
    ranks.
    Of 'lasso' and 'gates' alone, weights: of the penalty, sqrt of a channel's number of
    weights ('size'), times the FLOPs or the measured milliseconds that it carries;
    repriced: of what is live at each step, not of the dense network. metric:
    'optimizer' takes the proximal step of 'lasso' in Adam's own metric. accelerated:
    'gates' learn by accelerated proximal gradients, at rates up to `gates_lr`, not by
    the optimiser. target: the strength,
    from `strength` on, is steered to leave this fraction of the budget's kind of cost,
    along a line that ends at 0.7 of those epochs; 0: it is not. cuts_in_training: what
    is 0 is cut at so many ends of epochs on the way already, evenly spread.
    criterion: for 'criterion', over `batches` training batches; normalize: scores
    divided by their group's mean, max, sum or l2. per_cost: divided by what a channel
    costs. multiple_of, min_channels: of a group such a number of channels stays, or all
    of it, with every method that cuts channels; where fewer are not 0, zeros fill it
    up; 'auto': what the device likes, see `jaxprune.select.alignment`. rounds: the cut
    in so many equal factors, `recovery_epochs` of retraining behind each but the last.
    carry_optimizer: retraining goes on with the cut state of the optimiser.
    reconstruct: training batches to refit kernels that read what is cut by least
    squares; 0: they stay. statistics: batches that re-estimate batch statistics after a
    cut.
    """

    method: Literal[Method, LowRank] = "criterion"
    criterion: Criterion = "taylor"
    normalize: Literal["none", "mean", "max", "sum", "l2"] = "mean"
    per_cost: bool = False
    budget: Literal["flops", "params", "channels", "bytes", "latency"] = "flops"
    ratio: float = 0.25
    scope: Literal["global", "local"] = "global"
    multiple_of: int | Literal["auto"] = 8
    min_channels: int = 8
    batches: int = 16
    rounds: int = 1
    recovery_epochs: float = 0.0
    lasso_epochs: float = 20.0
    strength: float = 0.01
    weights: Literal["size", "flops", "latency"] = "flops"
    repriced: bool = False
    metric: Literal["plain", "optimizer"] = "plain"
    accelerated: bool = False
    gates_lr: float = 0.1
    target: float = 0.0
    cuts_in_training: int = 0
    block: float = 0.05
    choose: Literal["budget", "1se", "min", "knee"] = "budget"
    estimate: Literal["taylor", "taylor1", "fisher", "measured", "reconstruction"] = (
        "taylor"
    )
    trials: int = 128
    stages: int = 8
    carry_optimizer: bool = False
    reconstruct: int = 0
    statistics: int = 40

    @property
    def low_rank(self) -> bool:
        """Whether kernels become chains, and no channel goes."""
        return self.method in get_args(LowRank)

    @property
    def sparse(self) -> bool:
        """Whether the network is trained on under a penalty before it is cut."""
        return self.method in ("lasso", "gates")

    @property
    def irregular(self) -> bool:
        """Whether single weights are cut; all arrays stay as large as before."""
        return self.method == "weights"


@dataclasses.dataclass(frozen=True)
class Distill:
    """Retraining taught by the dense network (Hinton et al., 2015).

    weight: the share of the teacher's loss; 0: no teacher.
    """

    weight: float = 0.0
    temperature: float = 2.0


@dataclasses.dataclass(frozen=True)
class Scale:
    """How a training lies over the devices; batches are split over them in any case.

    shard: 'fsdp' splits parameters, their average and the optimiser's state as well,
    each leaf along its largest axis that the number of devices divides. accumulate: a
    step's batch in so many parts, one after the other, for the memory of one of them;
    losses and gradients are those of the whole batch, but that batch statistics are of
    each part, and updated by one after the other, and so is the Jaccard loss of each,
    whose mean counts.
    """

    shard: Shard = "none"
    accumulate: int = 1


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """every: epochs between two looks at the validation split.

    batch: images a step, also the N of the measured latency. repeats: of a latency's
    measurement, whose median counts; 0: none. samples: test frames kept for pictures.
    """

    every: float = 5.0
    batch: int = 8
    repeats: int = 10
    samples: int = 6


@dataclasses.dataclass(frozen=True)
class Config:
    """A run. scratch: also train a network of the pruned widths from scratch.

    It gets as many epochs as the pruned one had in all, with the recipe of `retrain`.
    save_every: epochs between checkpoints.
    """

    name: str = "run"
    seed: int = 0
    network: Network = Network()
    data: Data = Data()
    train: Fit = Fit()
    prune: Prune = Prune()
    retrain: Fit = Fit()
    distill: Distill = Distill()
    scale: Scale = Scale()
    scratch: bool = False
    evaluate: Evaluate = Evaluate()
    save_every: float = 2.0


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
    return [
        ("name", re.fullmatch(r"[\w.-]+", config.name) is not None, "a file's name"),
        ("seed", 0 <= config.seed < 2**31, "a whole number from 0 to 2^31 - 1"),
        ("network.widths", widths, f"from 1 to {_MOST_CHANNELS} each"),
        ("network.dropout", 0 <= config.network.dropout < 1, "in [0, 1)"),
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
            not config.scratch or not (prune.low_rank or prune.irregular),
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
    on_host = prune.low_rank or prune.irregular or prune.reconstruct > 0
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
    carried = prune.carry_optimizer and prune.method == "gates"
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
        ("strength", prune.strength > 0 or not prune.target, "positive with a target"),
        ("gates_lr", prune.gates_lr > 0, "positive"),
        ("target", 0 <= prune.target <= 1, "in [0, 1]; 0: none"),
        ("cuts_in_training", prune.cuts_in_training >= 0, "0 or more"),
        ("block", 0 <= prune.block < 1, "in [0, 1)"),
        ("trials", prune.trials > 0, "positive"),
        ("stages", 0 < prune.stages <= prune.trials, "from 1 to prune.trials"),
        ("reconstruct", prune.reconstruct >= 0, "0 or more"),
        (
            "reconstruct",
            not (prune.irregular and prune.reconstruct),
            "0 where the method is 'weights'",
        ),
        ("statistics", prune.statistics >= 0, "0 or more"),
        ("carry_optimizer", not carried, "false where the method is 'gates'"),
    ]
    rules += _penalty_rules(prune)
    rules += _low_rank_rules(prune) if prune.low_rank else []
    _apply("prune", prune, rules)


def _penalty_rules(prune: Prune) -> list[tuple[str, bool, str]]:
    """What other methods would pass over is refused."""
    off = "where the method is not"
    own = "where the method is neither 'lasso' nor 'gates'"
    lasso, gates = prune.method == "lasso", prune.method == "gates"
    return [
        ("metric", lasso or prune.metric == "plain", f"'plain' {off} 'lasso'"),
        ("accelerated", gates or not prune.accelerated, f"false {off} 'gates'"),
        ("repriced", prune.sparse or not prune.repriced, f"false {own}"),
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
