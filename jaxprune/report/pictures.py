# SPDX-License-Identifier: Apache-2.0
"""Pictures of labels: in colours, over an image, side by side, with a legend."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune import disk

INK = (32, 32, 32)
GAP = 4  # white pixels between the pictures of a strip
NARROW = 160  # the narrowest picture, in pixels, that a legend fits below


def colorize(labels: np.ndarray, colors: Sequence[Sequence[int]]) -> np.ndarray:
    """Class colours of `labels`.

    labels: int[..., H, W]; colors: [K, 3] in 0..255. Returns uint8[..., H, W, 3]; what
    is no class (the ignored label) is black.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = np.asarray(colors, np.uint8).reshape(-1, 3)
    return table[np.clip(labels, 0, 255)]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    colors: Sequence[Sequence[int]],
    *,
    opacity: float = 0.5,
) -> np.ndarray:
    """The image (uint8[H, W, 3]) blended with the colours of `labels` (int[H, W])."""
    mixed = (1 - opacity) * image.astype(np.float32)
    mixed += opacity * colorize(labels, colors)
    return np.round(mixed).astype(np.uint8)


def strips(
    images: np.ndarray,
    truth: np.ndarray,
    dense: np.ndarray,
    pruned: np.ndarray,
    colors: Sequence[Sequence[int]],
) -> np.ndarray:
    """One row a sample: image | truth | dense | pruned, with white between them.

    images: uint8[n, H, W, 3]; truth, dense, pruned: int[n, H, W]; colors: [K, 3].
    Returns uint8[n * (H + 4) - 4, 4 * (W + 4) - 4, 3]. The ignored pixels of the truth
    are black in the truth only: the networks were never asked about them.
    """
    columns = [images, *(colorize(labels, colors) for labels in (truth, dense, pruned))]
    n, height, width, _ = images.shape
    shape = (n * (height + GAP) - GAP, 4 * (width + GAP) - GAP, 3)
    picture = np.full(shape, 255, np.uint8)
    for j, column in enumerate(columns):
        for i, cell in enumerate(column):
            y, x = i * (height + GAP), j * (width + GAP)
            picture[y : y + height, x : x + width] = cell
    return picture


def legend(
    names: Sequence[str], colors: Sequence[Sequence[int]], width: int
) -> np.ndarray:
    """A white band, uint8[h, width, 3], with a swatch and a name for each class.

    As many columns as fit the longest name; the text grows with the width.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=max(11, min(24, width // 40)))
    line = int(font.getbbox("Ag")[3] * 1.4)
    cell = max(int(font.getlength(name)) for name in names) + 2 * line
    columns = max(1, min(len(names), width // cell))
    rows = -(-len(names) // columns)
    band = Image.new("RGB", (width, rows * line + line // 2), "white")
    draw = ImageDraw.Draw(band)
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        x = (i % columns) * (width // columns) + line // 4
        y = (i // columns) * line + line // 4
        middle = y + line / 2
        box = (x, y + line // 6, x + line, y + line - line // 6)
        draw.rectangle(box, fill=tuple(int(c) for c in color), outline=(96, 96, 96))
        draw.text((x + line * 1.3, middle), name, fill=INK, font=font, anchor="lm")
    return np.asarray(band)


def headings(titles: Sequence[str], width: int) -> np.ndarray:
    """A white band, uint8[h, width, 3], each title over its share of the width."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=max(11, min(24, width // 40)))
    band = Image.new("RGB", (width, int(font.getbbox("Ag")[3] * 1.5)), "white")
    draw = ImageDraw.Draw(band)
    for i, title in enumerate(titles):
        x = (width + GAP) * i // len(titles)
        draw.text((x, band.height / 2), title, fill=INK, font=font, anchor="lm")
    return np.asarray(band)


def with_legend(
    picture: np.ndarray, names: Sequence[str], colors: Sequence[Sequence[int]]
) -> np.ndarray:
    """`picture` (uint8[H, W, 3]) with the classes' legend below it.

    A picture too narrow for a legend is given a white margin at the right.
    """
    width = max(picture.shape[1], NARROW)
    margin = ((0, 0), (0, width - picture.shape[1]), (0, 0))
    picture = np.pad(picture, margin, constant_values=255)
    return np.concatenate([picture, legend(names, colors, width)])


def as_png(picture: Any) -> bytes:
    """A picture of PIL, or uint8[H, W, 3] or [H, W], as a PNG file's content."""
    from PIL import Image

    content = io.BytesIO()
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(content, format="PNG")
    return content.getvalue()


def save_png(path: Path, picture: Any) -> None:
    """Write what `as_png` takes, whole or not at all; DiskError where it is refused."""
    disk.write(path, as_png(picture), sync=False)
