# SPDX-License-Identifier: Apache-2.0
"""What a data set is: its classes, and one split of it as two arrays."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxprune.base import DataError

Size = tuple[int, int]  # height, width, in pixels
Color = tuple[int, int, int]  # red, green, blue, 0 to 255


@dataclasses.dataclass(frozen=True)
class Classes:
    """The K classes of a data set: `names`, `colors` (RGB, 0 to 255), `ignore` label.

    Label k < K is class k; pixels labelled `ignore` count neither in a loss nor in a
    measure. Raises DataError where the three do not fit one another.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore: int = 255

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= 255:
            raise DataError(f"classes: 1 to 255 names are needed, not {len(self)}")
        if len(self.colors) != len(self):
            raise DataError(
                f"classes: {len(self)} names but {len(self.colors)} colors; give one"
                " [red, green, blue] for each name"
            )
        for name, color in zip(self.names, self.colors, strict=True):
            if len(color) != 3 or not all(0 <= part <= 255 for part in color):
                raise DataError(
                    f"classes: the color of {name!r} is {list(color)}; it is [red, "
                    "green, blue], each from 0 to 255"
                )
        if not len(self) <= self.ignore <= 255:
            raise DataError(
                f"classes: ignore = {self.ignore} must lie between {len(self)}, the"
                " number of classes, and 255"
            )

    def __len__(self) -> int:
        return len(self.names)

    def check(self, label: np.ndarray, name: str) -> None:
        """Raise DataError, naming `name`, if uint8[H, W] `label` has another value."""
        seen = np.flatnonzero(np.bincount(label.ravel(), minlength=1))
        wrong = seen[(seen >= len(self)) & (seen != self.ignore)]
        if wrong.size:
            raise DataError(
                f"{name}: label {wrong[0]} lies beyond the {len(self)} classes (0 to"
                f" {len(self) - 1}; {self.ignore} = ignored); mend the mask, or list"
                " the class in classes.json"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split in memory or memory-mapped, N samples of one size.

    `images`: uint8[N, H, W, 3]; `labels`: uint8[N, H, W]; `stems`: N names.
    Raises DataError where shapes or dtypes do not fit.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    stems: tuple[str, ...]
    classes: Classes

    def __post_init__(self) -> None:
        shape, dtypes = self.labels.shape, {self.images.dtype, self.labels.dtype}
        if self.images.shape != (*shape, 3) or len(shape) != 3 or len(self) == 0:
            raise DataError(
                f"split {self.name!r}: images {self.images.shape} and labels {shape}"
                " must be [N, H, W, 3] and [N, H, W], N at least 1"
            )
        if dtypes != {np.dtype(np.uint8)} or len(self.stems) != len(self):
            raise DataError(
                f"split {self.name!r}: images and labels must be uint8, with a stem"
                f" for each of the {len(self)} samples"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> Size:
        """Height and width of the stored images."""
        return self.labels.shape[1], self.labels.shape[2]


class Source(NamedTuple):
    """A split before decoding.

    `read(i)` gives sample i: uint8[H, W, 3] and uint8[H, W], of `size`. `identity` says
    which data these are, `fingerprint` in which state they are: see `cache.store`.
    """

    name: str
    split: str
    size: Size
    stems: tuple[str, ...]
    classes: Classes
    identity: str
    fingerprint: str
    read: Callable[[int], tuple[np.ndarray, np.ndarray]]
