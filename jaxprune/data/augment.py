# SPDX-License-Identifier: Apache-2.0
"""Random views of one sample: a pure function of the sample and a generator."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxprune.base import DataError
from jaxprune.data.types import Size

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class Augment:
    """How a training sample is varied. The default only flips.

    flip: mirror left to right, half of the time.
    scale: (low, high), the zoom, drawn log-uniformly. At 1 the view is the largest part
        of the image that has the crop's shape (the whole image, if shapes agree); at 2
        a part half as wide and high; below 1 a border is added, labelled `ignore` and
        filled with the image's mean colour. Where the view lies is uniform.
    crop: (height, width) of what comes out; None = the stored size.
    stretch: s widens the view by a factor between 1 / (1 + s) and 1 + s.
    colour: s changes brightness, contrast and saturation each by a factor between 1 - s
        and 1 + s, and turns the hue by up to s / 5 of a turn.
    gamma: s raises intensities to a power between 1 / (1 + s) and 1 + s.
    Raises DataError for values out of range.
    """

    flip: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    crop: Size | None = None
    stretch: float = 0.0
    colour: float = 0.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise DataError(f"augment: scale {self.scale!r} must be 0 < low <= high")
        if self.crop is not None and (len(self.crop) != 2 or min(self.crop) < 1):
            raise DataError(f"augment: crop {self.crop!r} must be (height, width)")
        if not 0 <= self.colour <= 1:
            raise DataError(f"augment: colour {self.colour!r} must lie in [0, 1]")
        for name in ("stretch", "gamma"):
            if getattr(self, name) < 0:
                raise DataError(f"augment: {name} {getattr(self, name)!r} is negative")

    def times(self, factor: float) -> Augment:
        """The same with its strengths times a factor; of the zoom, its logarithm."""
        low, high = self.scale
        return dataclasses.replace(
            self,
            scale=(low**factor, high**factor),
            stretch=self.stretch * factor,
            colour=self.colour * factor,
            gamma=self.gamma * factor,
        )


def augment(
    how: Augment,
    rng: np.random.Generator,
    image: np.ndarray,
    label: np.ndarray,
    ignore: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A random view of uint8[H, W, 3] and uint8[H, W], both of `how.crop`'s size."""
    from PIL import Image

    flip = bool(how.flip and rng.random() < 0.5)
    low, high = np.log(how.scale)
    zoom = np.exp(rng.uniform(low, high))
    widen = (1 + how.stretch) ** rng.uniform(-1, 1)
    place = rng.random(2)
    matrix = _color_matrix(how.colour, rng)
    power = (1 + how.gamma) ** rng.uniform(-1, 1)

    size = how.crop or (image.shape[0], image.shape[1])
    picture, mask = Image.fromarray(image), Image.fromarray(label)
    if size != picture.size[::-1] or zoom != 1 or widen != 1:
        picture, mask = _view(picture, mask, size, zoom, widen, place, ignore)
    if how.colour or how.gamma:
        picture = _recolor(picture, matrix, power)
    image, label = np.asarray(picture), np.asarray(mask)
    return (image[:, ::-1], label[:, ::-1]) if flip else (image, label)


def _view(
    picture: Any,
    mask: Any,
    size: Size,
    zoom: float,
    widen: float,
    place: np.ndarray,
    ignore: int,
) -> tuple[Any, Any]:
    """The part of both pictures that the view shows, resized to `size`."""
    from PIL import Image

    stored, out = np.array(picture.size), np.array(size[::-1])  # x, y
    step = (
        np.min(stored / out) / zoom * np.array([widen, 1.0])
    )  # stored per shown pixel
    corner = place * (stored - step * out)
    # The shown pixels whose centres lie on the picture, and what they cover of it.
    first = np.ceil(np.maximum(-corner / step, 0) - 0.5).astype(int)
    last = np.floor(np.minimum((stored - corner) / step, out) + 0.5).astype(int)
    last = np.maximum(last, first + 1)
    box = np.concatenate([corner + first * step, corner + last * step])
    box = np.clip(box, 0, np.tile(stored, 2))
    shown = int(last[0] - first[0]), int(last[1] - first[1])
    picture_part = picture.resize(shown, Image.Resampling.BILINEAR, tuple(box))
    mask_part = mask.resize(shown, Image.Resampling.NEAREST, tuple(box))
    if shown == tuple(out):
        return picture_part, mask_part
    mean = picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    framed = Image.new("RGB", tuple(out), mean), Image.new("L", tuple(out), ignore)
    for canvas, part in zip(framed, (picture_part, mask_part), strict=True):
        canvas.paste(part, (int(first[0]), int(first[1])))
    return framed


def _color_matrix(strength: float, rng: np.random.Generator) -> np.ndarray:
    """float[3, 3] for saturation, hue and brightness, and [3] the contrast's weight."""
    bright, contrast, saturation = 1 + strength * rng.uniform(-1, 1, 3)
    turn = 2 * np.pi * strength / 5 * rng.uniform(-1, 1)
    grey = np.outer(np.ones(3), _LUMA)
    # A rotation around the grey axis (Rodrigues), which keeps greys.
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    hue = np.cos(turn) * np.eye(3) + np.sin(turn) * cross + (1 - np.cos(turn)) / 3
    saturate = saturation * np.eye(3) + (1 - saturation) * grey
    turned = bright * saturate @ hue
    return np.concatenate([turned, [[contrast] * 3]])


def _recolor(picture: Any, matrix: np.ndarray, power: float) -> Any:
    turned, contrast = matrix[:3], matrix[3, 0]
    mean = _LUMA @ np.asarray(picture.resize((1, 1), 4))[0, 0]
    # One linear map does it all; contrast moves intensities away from the mean.
    offset = (1 - contrast) * turned.sum(1).mean() * mean
    rows = np.concatenate([contrast * turned, np.full((3, 1), offset)], axis=1)
    picture = picture.convert("RGB", tuple(rows.ravel()))
    if power != 1:
        curve = np.rint(255 * (np.arange(256) / 255) ** power).astype(int)
        picture = picture.point(list(curve) * 3)
    return picture
