# SPDX-License-Identifier: Apache-2.0
"""Training: configs, the jitted step, the loop, and the stages of a run."""

from jaxprune.data import Augment
from jaxprune.train.config import (
    Config,
    Data,
    Distill,
    Evaluate,
    Fit,
    Network,
    Prune,
    Scale,
    load_config,
)
from jaxprune.train.stages import evaluate, run

__all__ = [
    "Augment",
    "Config",
    "Data",
    "Distill",
    "Evaluate",
    "Fit",
    "Network",
    "Prune",
    "Scale",
    "evaluate",
    "load_config",
    "run",
]
