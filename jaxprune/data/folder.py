# SPDX-License-Identifier: Apache-2.0
"""Any folder of images and masks, as a `Source`.

Two layouts are read: `root/train/images` with `root/train/masks`, and `root/train` with
`root/trainannot` (that of CamVid's SegNet edition); so for `val` and `test`. An image
and its mask share their stem. Masks are PNGs of one label a pixel, mode L or P.
`root/classes.json` may list the classes:

    {"names": ["road", "car"], "colors": [[128, 64, 128], [64, 0, 128]], "ignore": 255}

Without it they are 0 to the highest label found but 255, which is ignored.
"""

import colorsys
import functools
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune import formats
from jaxprune.base import DataError
from jaxprune.data import cache, images
from jaxprune.data.types import Classes, Color, Size, Source

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
SPLITS = ("train", "val", "test")


def source(
    root: Path,
    split: str,
    size: Size | None,
    *,
    classes: Classes | None = None,
    name: str = "folder",
) -> Source:
    """The images and masks of `root`'s `split`, checked by name and header only.

    `size`: what they are resized to; None = as they are, all of one size.
    Raises DataError: a folder missing or empty, an image without mask or the reverse, a
    pair of two sizes, a mask of colours, a file that is no image, a bad classes.json.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; it should hold {split}/ with images")
    pairs = find_pairs(*find_folders(root, split))
    sizes = [images.header(pair) for pair in pairs]
    size = size or _one_size(pairs, sizes)
    classes = classes or listed_classes(root) or infer_classes(root)
    state = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for pair in pairs
        for path in (pair.image, pair.mask)
    ]
    return Source(
        name=name,
        split=split,
        size=size,
        stems=tuple(pair.stem for pair in pairs),
        classes=classes,
        identity=str(root.resolve()),
        fingerprint=cache.digest(state, size, len(classes), classes.ignore),
        read=functools.partial(_read, pairs, size, classes),
    )


def find_pairs(image_folder: Path, mask_folder: Path) -> list[images.Pair]:
    """Images and masks that share their stem, in the order of the stems.

    Raises DataError: no images, or one without its partner, or two of one stem.
    """
    found, masks = _by_stem(image_folder), _by_stem(mask_folder)
    if not found:
        raise DataError(
            f"{image_folder}: holds no images ({', '.join(_SUFFIXES)}); is this the "
            "folder that you meant? docs/data.md tells the layout"
        )
    for stem in sorted(found.keys() ^ masks.keys()):
        if stem in found:
            raise DataError(
                f"{found[stem]}: has no mask; add {mask_folder / stem}.png or remove it"
            )
        raise DataError(
            f"{masks[stem]}: a mask without image; add {image_folder / stem}.png or"
            " .jpg, or remove it"
        )
    return [images.Pair(stem, found[stem], masks[stem]) for stem in sorted(found)]


def infer_classes(root: Path) -> Classes:
    """Classes 0 to the highest label in any split's masks; 255 is ignored.

    Colours are those of the first mask's palette, if it has one. Raises DataError for
    labels that no one means so, see `classes_of_labels`.
    """
    masks = [
        pair.mask
        for split in SPLITS
        if (root / split).is_dir()
        for pair in find_pairs(*find_folders(root, split))
    ]
    return classes_of_labels(map(images.decode_mask, masks), str(root))


def classes_of_labels(masks: Iterable[Any], name: str) -> Classes:
    """Classes 0 to the highest label but 255 of PIL `masks`; the first's palette.

    Raises DataError, naming the data set `name`, for masks of 0 and 255 alone, and
    where most of the classes occur nowhere.
    """
    counts, palette = np.zeros(256, np.int64), None
    for mask in masks:
        counts += np.bincount(np.asarray(mask).ravel(), minlength=256)
        palette = (mask.getpalette() or []) if palette is None else palette
    found = np.flatnonzero(counts[:255])
    highest = int(found.max(initial=0))
    alone = highest == 0 and counts[255] > 0
    if alone or 2 * len(found) < highest + 1:
        shown = ", ".join(map(str, np.flatnonzero(counts)[:8]))
        raise DataError(
            f"{name}: the masks hold the labels {shown}{' ...' * (len(found) > 8)}, of "
            f"which 255 is ignored, so there would be {highest + 1} classes, "
            f"{highest + 1 - len(found)} of them nowhere; number them 0, 1, 2, ..., or "
            "list the classes in classes.json"
        )
    palette = palette or []
    colors = [tuple(palette[3 * k : 3 * k + 3]) for k in range(highest + 1)]
    if len(palette) < 3 * len(colors):
        colors = [_color(k) for k in range(len(colors))]
    names = tuple(f"class {k}" for k in range(len(colors)))
    return Classes(names, tuple(colors))


def _read(
    pairs: list[images.Pair], size: Size, classes: Classes, index: int
) -> tuple[np.ndarray, np.ndarray]:
    return images.read(pairs[index], size, classes)


def find_folders(root: Path, split: str) -> tuple[Path, Path]:
    """The folders of a split's images and masks; DataError if one is missing."""
    nested = root / split / "images", root / split / "masks"
    flat = root / split, root / f"{split}annot"
    folders = nested if nested[0].is_dir() else flat
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; either {nested[0]} and {nested[1]}, or"
                f" {flat[0]} and {flat[1]}, must hold the images and the masks"
            )
    return folders


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise DataError(f"{path}: {found[path.stem]} has the same stem; remove one")
        found[path.stem] = path
    return found


def _one_size(pairs: list[images.Pair], sizes: list[Size]) -> Size:
    for pair, size in zip(pairs, sizes, strict=True):
        if size != sizes[0]:
            raise DataError(
                f"{pair.image} is {size[1]}x{size[0]} but {pairs[0].image} is"
                f" {sizes[0][1]}x{sizes[0][0]}; pass size=(height, width) to resize"
            )
    return sizes[0]


def listed_classes(root: Path) -> Classes | None:
    """The classes of `root`'s classes.json, None if there is none; DataError if bad."""
    path = root / "classes.json"
    if not path.exists():
        return None
    try:
        listed = formats.parse(formats.read_text(path))
        names = tuple(str(name) for name in listed["names"])
        colors = listed.get("colors") or [_color(k) for k in range(len(names))]
        return Classes(
            names,
            tuple((index(r), index(g), index(b)) for r, g, b in colors),
            _ignore(listed),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: {error!r}; it must read"
            ' {"names": [...], "colors": [[r, g, b], ...], "ignore": 255}'
        ) from error


def _ignore(listed: dict) -> int:
    ignore = listed.get("ignore")
    return 255 if ignore is None else int(ignore)


def _color(index: int) -> Color:
    # Steps of the golden angle keep the hues of neighbouring classes far apart.
    rgb = colorsys.hsv_to_rgb(index * 0.381966 % 1.0, 0.65, 0.9 - 0.3 * (index % 2))
    return int(255 * rgb[0]), int(255 * rgb[1]), int(255 * rgb[2])
