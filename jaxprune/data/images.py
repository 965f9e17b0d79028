# SPDX-License-Identifier: Apache-2.0
"""One image and its mask: looked at, decoded, resized, each fault named by its file."""

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.base import DataError
from jaxprune.data.types import Classes, Size

_ORIENTATION = 0x0112  # of EXIF; above 4, width and height are swapped
_LOSSY = ("JPEG", "MPO")
_IMAGE_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "1", "CMYK", "YCbCr")


class Pair(NamedTuple):
    """An image file, its mask file, and the stem that both share."""

    stem: str
    image: Path
    mask: Path


def header(pair: Pair) -> Size:
    """Height and width of a pair, upright, from the files' headers alone.

    Raises DataError for a file that is no image, an image of high bit depth, a mask
    that is not one label a pixel or of a format that changes them, or two sizes.
    """
    (size, mode, _), (mask_size, mask_mode, kind) = map(_peek, (pair.image, pair.mask))
    if mode not in _IMAGE_MODES:
        raise DataError(
            f"{pair.image}: mode {mode} is no 8-bit image; convert it to RGB"
        )
    check_mask(str(pair.mask), mask_mode, kind)
    if size != mask_size:
        raise DataError(
            f"{pair.image} is {size[0]}x{size[1]} but its mask {pair.mask} is"
            f" {mask_size[0]}x{mask_size[1]}; give both one size"
        )
    return size[1], size[0]


def check_mask(name: str, mode: str, kind: str) -> None:
    """Raise DataError, naming the mask, for a PIL mode or file format of no labels."""
    if mode not in ("L", "P"):
        raise DataError(
            f"{name}: a mask of mode {mode}; it must be a PNG of one 8-bit label a"
            " pixel (mode L or P): convert colours to class numbers first"
        )
    if kind.startswith(_LOSSY):
        raise DataError(
            f"{name}: a mask as {kind}, which mixes neighbouring labels; write it"
            " anew, as PNG, from what it was made of"
        )


def read(pair: Pair, size: Size, classes: Classes) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8[H, W, 3] and label uint8[H, W] of a pair, resized to `size`.

    Images shrink by area-weighted interpolation, labels take the nearest pixel. Raises
    DataError for a damaged file or a label beyond the classes.
    """
    return fit(decode(pair.image), decode(pair.mask), size, classes, str(pair.mask))


def fit(
    image: Any, mask: Any, size: Size, classes: Classes, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """A PIL image and mask as `read` gives them; `name` is the mask's, for errors."""
    from PIL import Image

    # Checked before resizing, which could drop the only wrong pixel.
    classes.check(np.asarray(mask), name)
    image = opaque(image)
    width_height = size[1], size[0]
    if image.size != width_height:
        # PIL's bilinear filter widens with the reduction, so it averages areas.
        image = image.resize(width_height, Image.Resampling.BILINEAR)
        mask = mask.resize(width_height, Image.Resampling.NEAREST)
    return np.asarray(image), np.asarray(mask)


def opaque(image: Any) -> Any:
    """A PIL image as RGB; what is transparent is shown on white."""
    from PIL import Image

    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def decode(path: Path, data: bytes | None = None) -> Any:
    """The decoded PIL image of a file, or of `data` where `path` is only its name.

    Upright, as its EXIF orientation says.

    Raises DataError, naming `path`, if it is damaged.
    """
    from PIL import Image, ImageOps

    try:
        if path.suffix.lower() == ".png":
            with Image.open(_file(path, data)) as image:
                image.verify()  # checksums, which load() skips
        with Image.open(_file(path, data)) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return image
    except Exception as error:  # PIL raises half a dozen kinds for damaged data
        raise _damaged(path, error) from error


def decode_mask(path: Path, data: bytes | None = None) -> Any:
    """`decode` of a mask; DataError, too, for what is none."""
    mask = decode(path, data)
    check_mask(str(path), mask.mode, mask.format or "")
    return mask


def _file(path: Path, data: bytes | None) -> Any:
    return path if data is None else io.BytesIO(data)


def _peek(path: Path) -> tuple[tuple[int, int], str, str]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            # Of a PNG only the chunk before the pixels: to look behind is to decode.
            named = image.format != "PNG" or "exif" in image.info
            turned = named and image.getexif().get(_ORIENTATION, 1) > 4
            size = (height, width) if turned else (width, height)
            return size, image.mode, image.format or ""
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        what = "damaged, or no image at all"
    elif "truncated" in str(error).lower():
        what = "damaged, it ends too early"
    elif isinstance(error, OSError) and error.strerror:
        what = f"cannot be read ({error.strerror})"
    else:
        what = f"damaged ({error})"
    return DataError(
        f"{path}: {what}; fetch it anew or leave it out, in a data set together with"
        " its partner"
    )
