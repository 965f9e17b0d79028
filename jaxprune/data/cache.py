# SPDX-License-Identifier: Apache-2.0
"""Decoded splits as memory-mapped .npy files, written once and checked when opened."""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jaxprune.base import DataError
from jaxprune.data.types import Source, Split

_FORMAT = 3  # counts up when the same files would be decoded or resized otherwise
_WINDOW = 64  # samples that are decoded ahead of the writer


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/jaxprune`, or `~/.cache/jaxprune`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "jaxprune"


def find_folder(cache: str | os.PathLike | bool | None) -> Path:
    """The folder that an argument `cache` means."""
    return default_folder() if cache is None or isinstance(cache, bool) else Path(cache)


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that stand for `parts`, which must be JSON values."""
    text = json.dumps([_FORMAT, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def store(source: Source, cache: str | os.PathLike | bool | None = None) -> Split:
    """The decoded split, from the `cache` folder if it lies there whole and current.

    `cache`: a folder, None for `default_folder()`, or False to decode into memory and
    write nothing. An entry is stale when the fingerprint differs, damaged when a
    checksum does; either is written anew. Files appear under their names when complete.
    Raises DataError for samples that cannot be read or a folder that cannot be written.
    """
    if cache is False:
        samples = list(_decode(source))
        images, labels = (np.stack(arrays) for arrays in zip(*samples, strict=True))
    else:
        folder = find_folder(cache)
        entry = f"{source.name}-{source.split}-{digest(source.identity, source.size)}"
        opened = _open(folder, entry, source.fingerprint)
        if opened is None:
            _write(source, folder, entry)
            opened = _open(folder, entry, source.fingerprint)
        if opened is None:
            raise DataError(
                f"{folder / entry}: what was just written reads back otherwise; another"
                " process may be writing other data there: try again, or change cache"
            )
        images, labels = opened
    return Split(source.split, images, labels, source.stems, source.classes)


def check_whole(array: np.ndarray) -> None:
    """Raise DataError where the file behind a memory map was cut short meanwhile.

    Reading it would end the process (SIGBUS). A file that was deleted, or replaced,
    stays mapped, and is no harm.
    """
    file = getattr(array, "filename", None)
    if file is None:
        return
    try:
        size = os.stat(file).st_size
    except OSError:
        return
    if size < array.offset + array.nbytes:  # type: ignore[attr-defined]
        raise DataError(
            f"{file}: cut short while it was used; repeat the command: it is decoded"
            " anew"
        )


def _paths(folder: Path, entry: str) -> list[Path]:
    return [folder / f"{entry}.{s}" for s in ("images.npy", "labels.npy", "json")]


def _open(folder: Path, entry: str, fingerprint: str) -> tuple | None:
    *arrays, meta = _paths(folder, entry)
    try:
        state = json.loads(meta.read_text())
        if state["fingerprint"] != fingerprint:
            return None
        opened = tuple(np.load(path, mmap_mode="r") for path in arrays)
        sums = [zlib.crc32(array) for array in opened]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    return opened if sums == state["crc32"] else None


def _write(source: Source, folder: Path, entry: str) -> None:
    paths = _paths(folder, entry)
    partial = [path.with_name(f".{path.name}.{os.getpid()}") for path in paths]
    shape = (len(source.stems), *source.size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sums = _write_arrays(source, partial, [(*shape, 3), shape])
        state = {"fingerprint": source.fingerprint, "crc32": sums}
        partial[2].write_text(json.dumps(state))
        for old, new in zip(partial, paths, strict=True):
            os.replace(old, new)
    except OSError as error:
        raise DataError(
            f"{folder}: the cache cannot be written ({error.strerror or error}); pass"
            " another folder as cache, or cache=False to decode into memory"
        ) from error
    finally:
        for path in partial:
            with contextlib.suppress(OSError):
                path.unlink()


def _write_arrays(source: Source, paths: list[Path], shapes: list[tuple]) -> list[int]:
    # Plain writes, not a writable memory map: a full disk is then an error, not SIGBUS.
    sums = [0, 0]
    with open(paths[0], "wb") as images, open(paths[1], "wb") as labels:
        files = (images, labels)
        for file, shape in zip(files, shapes, strict=True):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        for sample in _decode(source):
            for k, (file, array) in enumerate(zip(files, sample, strict=True)):
                sums[k] = zlib.crc32(array.data, sums[k])
                file.write(array.data)
    return sums


def _decode(source: Source) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source.stems), _WINDOW):
            window = range(start, min(start + _WINDOW, len(source.stems)))
            for image, label in pool.map(source.read, window):
                yield np.ascontiguousarray(image), np.ascontiguousarray(label)
