# SPDX-License-Identifier: Apache-2.0
"""Data sets as uint8 arrays, augmentation, and batches that resume exactly."""

from jaxprune.data.augment import Augment
from jaxprune.data.cache import store
from jaxprune.data.pipeline import batches, eval_batches
from jaxprune.data.sources import find, load
from jaxprune.data.types import Classes, Source, Split
from jaxprune.data.weights import class_pixels, class_weights

__all__ = [
    "Augment",
    "Classes",
    "Source",
    "Split",
    "batches",
    "class_pixels",
    "class_weights",
    "eval_batches",
    "find",
    "load",
    "store",
]
