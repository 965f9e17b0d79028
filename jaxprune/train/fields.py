# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: the fields of its config, as frozen dataclasses."""

import dataclasses
from typing import Literal, get_args

from jaxprune.base import Role
from jaxprune.data import Augment
from jaxprune.lowrank import Method as LowRank
from jaxprune.train.layout import Shard


@dataclasses.dataclass(frozen=True)
class Network:
    """A shipped network. widths: () for its own, else as `jaxprune.models` takes them.

    dropout: SegNet's and FCN's (0.5: Bayesian SegNet). encoder: a file of torchvision's
    weights that training starts from, see `models.import_encoder`; "": He's. dtype: of
    the computation; parameters, batch statistics and logits stay float32. stride: of
    the finest features that FCN scores, 32, 16 or 8; None: its own. depths: the blocks
    of DeepLab's and RefineNet's four stages, (3, 4, 23, 3) for ResNet-101; (): 50's.
    pixel_scale: of SegNet-Basic's input normalisation, 255 for its authors'; None: 1.
    """

    name: Literal["segnet", "segnet_basic", "unet", "fcn", "deeplab", "refinenet"] = (
        "segnet"
    )
    widths: tuple[int, ...] = ()
    dropout: float = 0.0
    encoder: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    stride: int | None = None
    depths: tuple[int, ...] = ()
    pixel_scale: float | None = None


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


Method = Literal[
    "criterion",
    "path",
    "layerwise",
    "lasso",
    "lasso_then_path",
    "gates",
    "random_masks",
    "particles",
    "weights",
]
Criterion = Literal[
    "magnitude",
    "l2",
    "group_l2",
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
    of the cost at a time, and takes the step that `choose` says (`Path.select`), of
    those down to the ratio; 'layerwise' cuts every group alike, by the LASSO, one
    behind the other, refitting what reads them to `reconstruct` batches
    (`jaxprune.lasso_select`);
    'lasso' first trains on for `lasso_epochs` with proximal steps of `strength` times
    the learning rate (with sgd, over 1 - momentum), and cuts what is 0 then, or the
    least where that is over the budget; 'lasso_then_path' does so, and walks the path
    from there; 'gates' does the same as 'lasso' to one trained number per channel, and
    folds those that stay into the weights; 'random_masks' takes the best of `trials`
    random masks by the loss on the validation split; 'particles' cuts, weighs and
    resamples trials / stages of them in `stages`; 'weights' cuts no channel but
    single weights, and holds them at 0 in retraining: the budget then counts what a
    machine that skips zeros would be spared. Low rank instead of fewer channels, of
    FLOPs or parameters: a method of `jaxprune.factorize`, 'svd' or 'asymmetric' for
    example, over `batches`; ranks are multiples of multiple_of.
    estimate: of what the loss gains, for 'path', over `batches`: 'taylor' squared,
    'taylor1' first order, 'fisher' second; 'reconstruction': the relative error of what
    reads; 'measured': the loss itself without each group's next unit, which 'taylor'
    ranks.
    Of methods that train under a penalty alone, weights: of the penalty, sqrt of a
    channel's number of weights ('size'), or 1 where it is on gates, times the FLOPs or
    the measured milliseconds that the channel carries; repriced: of what is live at
    each step, not of the dense network. roles: of a channel's weights those that make
    it ('out', filter-wise), those that read it ('in', channel-wise), or 'both'. ramp:
    the epochs in which the strength rises from 0, where nothing steers it. adaptive:
    the power of the scores of `criterion`, not normalised, that divides the weights
    (`jaxprune.adaptive`), estimated anew at each of cuts_in_training; 0: the
    weights are of the size and the cost alone. metric: 'optimizer' takes the
    proximal step in Adam's own metric. accelerated: 'gates' learn by accelerated
    proximal gradients, at rates up to `gates_lr`, not by the optimiser. target: the
    strength, from `strength` on (0: from one that gets there at an even pace, of
    plain steps), is steered to leave this fraction of the budget's kind of cost,
    along a line that ends at 0.7 of those epochs; 0: it is not. cuts_in_training:
    what is 0 is cut at so many ends of epochs on the way already, evenly spread.
    criterion: for 'criterion', over `batches` training batches; 'magnitude' and 'l2':
    norms of the filter, and of it 'lamp' and 'geometric_median', too; 'group_l2': of
    all weights of the channel; 'fisher' sees one image at a time, so that batch norms
    have the statistics of that one. normalize: scores divided by their group's mean,
    max, sum or l2, but for LAMP's, which are relative already. per_cost: divided by
    what a channel costs. multiple_of, min_channels: of a
    group such a number of channels stays, or all of it, with every method that cuts
    channels; where fewer are not 0, zeros fill it up; 'auto': what the device likes,
    see `jaxprune.select.alignment`. rounds: the cut in so many equal factors,
    `recovery_epochs` of retraining behind each but the last. carry_optimizer:
    retraining goes on with the cut state of the optimiser. reconstruct: training
    batches to refit kernels that read what is cut by least squares; 0: they stay.
    statistics: batches that re-estimate batch statistics after a cut.
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
    roles: Literal["both", "out", "in"] = "both"
    ramp: float = 0.0
    adaptive: float = 0.0
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
        return self.method in ("lasso", "lasso_then_path", "gates")

    @property
    def gated(self) -> bool:
        """Whether that penalty is on gates, not on weights."""
        return self.method == "gates"

    @property
    def sides(self) -> tuple[Role, ...]:
        """The roles of the weights that the penalty is on."""
        if self.roles == "both":
            return ("out", "in")
        return (self.roles,)

    @property
    def walked(self) -> bool:
        """Whether what stays is a step of a cost-complexity path."""
        return self.method in ("path", "lasso_then_path")

    @property
    def scaled(self) -> bool:
        """Whether no plain step tells what strength a steered penalty begins with."""
        return self.metric == "optimizer" or self.accelerated

    @property
    def irregular(self) -> bool:
        """Whether single weights are cut; all arrays stay as large as before."""
        return self.method == "weights"

    @property
    def channelwise(self) -> bool:
        """Whether whole channels go, so that a narrower network is left."""
        return not self.irregular and not self.low_rank


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
