# SPDX-License-Identifier: Apache-2.0
"""What is read from files that nobody vouches for: JSON, .npz archives, versions.

Nothing here runs code, and nothing is allocated because a header says so: what a file
claims is first held against what it holds.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

import jaxprune
from jaxprune.base import JaxpruneError

MOST_TEXT = 1 << 30  # bytes of a JSON document
MOST_DEPTH = 100  # of lists and objects in one another
_HEADER = 1 << 16  # bytes in front of an array of a .npz
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # the ways in which NumPy writes
_Reader = TypeVar("_Reader", bound=Callable[..., Any])


def parse(text: str | bytes) -> Any:
    """The value of JSON text.

    Raises ValueError, also for what Python's reader lets pass or trips over: text that
    is no UTF-8, is larger than `MOST_TEXT` or deeper than `MOST_DEPTH`, names a field
    twice, or holds a number that no float can. NaN and Infinity are read: states hold
    them.
    """
    if len(text) > MOST_TEXT:
        raise ValueError(f"{len(text)} bytes are more than a document may have")
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("lists and objects lie too deep in one another") from None
    if _deeper(value, MOST_DEPTH):
        raise ValueError(f"lists and objects lie more than {MOST_DEPTH} deep")
    return value


def read_text(file: Path) -> str:
    """A text file's content, UTF-8; ValueError for other bytes or for too many."""
    size = file.stat().st_size
    if size > MOST_TEXT:
        raise ValueError(f"{size} bytes are more than a document may have")
    return file.read_text("utf-8")


def writer_here() -> str:
    """The version of this jaxprune, which what it writes names."""
    return jaxprune.__version__


def reader(
    readers: Mapping[int, _Reader],
    version: Any,
    where: str,
    error: type[JaxpruneError],
    writer: Any = None,
) -> _Reader:
    """The one of `readers`, by version, that reads a record of this version.

    writer: the version of jaxprune that wrote it, as far as the record says so. Raises
    `error`, naming `where`, for another version.
    """
    if type(version) is int and version in readers:
        return readers[version]
    here = f"this jaxprune, {writer_here()}, reads {', '.join(map(str, readers))}"
    if type(version) is int and version > max(readers):
        by = (
            f"jaxprune {writer[:40]}" if isinstance(writer, str) else "a newer jaxprune"
        )
        raise error(
            f"{where}: version {version} is written by {by}; {here}: install {by}"
        )
    raise error(f"{where}: version {str(version)[:40]} is unknown; {here}")


def read_npz(file: Path, most: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz archive by name; none of objects, so nothing is unpickled.

    most: bytes of all arrays together, by default this machine's memory. Raises OSError
    where the file cannot be read, ValueError for all else: a damaged archive, an array
    that claims another size than its bytes have, more bytes than `most`.
    """
    most = memory() if most is None else most
    try:
        with open(file, "rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            total = sum(entry.file_size for entry in entries)
            if len(set(names)) < len(names):
                raise ValueError("an array is there twice")
            if any(entry.compress_type not in _PACKED for entry in entries):
                raise ValueError("an array is packed as NumPy does not pack any")
            if total > most:
                raise ValueError(f"its arrays claim {total} bytes, {most} are allowed")
            return {
                entry.filename.removesuffix(".npy"): _array(archive, entry)
                for entry in entries
            }
    except (
        EOFError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"no archive of arrays, or damaged: {error}") from error


def memory() -> int:
    """This machine's memory in bytes; 2**62 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 62


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose header is compared with the entry's size before it is made."""
    name = entry.filename
    with archive.open(entry) as stream:
        shape, order, dtype, start = _header(stream, name)  # type: ignore[arg-type]
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or start + size != entry.file_size:
            raise ValueError(
                f"{name} claims {dtype}{list(shape)}, {size} bytes, and has "
                f"{entry.file_size - start}"
            )
        content = stream.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{name} has {len(content)} bytes, not {size}")
    if not size:
        return np.empty(shape, dtype)
    array = np.frombuffer(content, dtype).copy()
    return array.reshape(shape, order="F" if order else "C")


def _header(stream: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, Any, int]:
    """(shape, whether in Fortran's order, dtype, bytes of the header)."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, order, dtype = read(stream, max_header_size=_HEADER)
    except (
        KeyError,
        MemoryError,
        RecursionError,
        SyntaxError,
        TypeError,
        ValueError,
        tokenize.TokenError,
    ) as error:
        raise ValueError(f"{name} is no array: {str(error)[:100]}") from error
    if any(n < 0 for n in shape) or len(shape) > 32:
        raise ValueError(f"{name} claims the shape {shape}")
    return shape, order, dtype, stream.tell()


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is larger than any float")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:40]!r} is there twice")
    return record


def _deeper(value: Any, most: int) -> bool:
    """Whether containers lie more than `most` deep, one level after the other."""
    level = [value]
    for _ in range(most + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
