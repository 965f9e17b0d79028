# SPDX-License-Identifier: Apache-2.0
"""Street scenes drawn by program: CamVid's classes and imbalance, without its data.

Sample i of a split is a pure function of (split, i, size): it needs no download, and
any number of samples can be drawn. Validation draws other scenes of training's kind;
test draws wider streets with another horizon, to show how a network generalises.
"""

import functools

import numpy as np

from jaxprune.data import cache, camvid, paint, street, things
from jaxprune.data.types import Size, Source

_SPLITS = {"train": (0, 400, 0.0), "val": (1, 80, 0.0), "test": (2, 80, 0.4)}
_STATE = 2  # counts up when the same seed draws other pictures
_FINER = 2  # scenes are drawn so much larger, then reduced, which smooths edges


def source(split: str, size: Size | None = None, count: int | None = None) -> Source:
    """`count` scenes (default: train 400, val 80, test 80) of `size` (96 x 128)."""
    _, default, _ = _SPLITS[split]
    size, count = size or (96, 128), count or default
    return Source(
        name="synthetic",
        split=split,
        size=size,
        stems=tuple(f"{split}_{k:05d}" for k in range(count)),
        classes=camvid.CLASSES,
        identity=f"synthetic {count}",
        fingerprint=cache.digest("synthetic", _STATE, split, size, count),
        read=functools.partial(scene, split, size),
    )


def scene(split: str, size: Size, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `index` of a split: image uint8[H, W, 3] and labels uint8[H, W]."""
    from PIL import Image, ImageDraw

    stream, _, shift = _SPLITS[split]
    rng = np.random.default_rng((stream, index))
    height, width = size[0] * _FINER, size[1] * _FINER
    layout = street.lay_out(rng, height, width, shift)
    flat = Image.new("RGB", (width, height))
    label = Image.new("L", (width, height), street.SKY)
    drawing = ImageDraw.Draw(flat), ImageDraw.Draw(label)
    things.draw(street.Canvas(*drawing, layout, rng))
    labels = np.asarray(label)
    fine = paint.paint(rng, layout, np.asarray(flat), labels)
    image = np.asarray(Image.fromarray(fine).reduce(_FINER), np.float32)
    noise = rng.standard_normal(image.shape, np.float32)
    image = np.clip(image + rng.uniform(1, 5) * noise, 0, 255).astype(np.uint8)
    return image, labels[_FINER // 2 :: _FINER, _FINER // 2 :: _FINER]
