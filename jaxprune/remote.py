# SPDX-License-Identifier: Apache-2.0
"""Saved folders behind a URL: `s3://`, `gs://`, `memory://`, whatever fsspec knows.

A folder is read by way of a temporary copy of what its manifest lists and nothing else,
so that it is verified as a local one is. Object stores rename nothing: a folder is
none from when its marker, `jaxprune.partial`, is written until that is deleted. The
marker comes first and lists the files of the save, so that one that was cut off can be
repeated; the manifest comes last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxprune import integrity
from jaxprune.base import CheckpointError, JaxpruneError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://")
_MOST_MANIFEST = 1 << 26  # bytes
PARTIAL = "jaxprune.partial"


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL: text that begins with a protocol and `://`."""
    return isinstance(path, str) and _URL.match(path) is not None


@contextlib.contextmanager
def local(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A saved folder as one on this machine: itself, or a copy for as long as that.

    Raises CheckpointError, naming the URL, for a folder that cannot be read, is none of
    jaxprune's, is larger than the disk has room for, or holds files too many or too
    few; errors of the `with` block name the URL, too.
    """
    if not is_url(path):
        yield integrity.resolve(Path(os.path.abspath(path)))
        return
    url = str(path).rstrip("/")
    with tempfile.TemporaryDirectory(prefix="jaxprune-") as place:
        folder = Path(place) / "folder"
        folder.mkdir()
        try:
            with _named(url):
                _download(url, folder)
            yield folder
        except JaxpruneError as error:
            text = str(error).replace(str(folder), url)
            raise type(error)(text) from error


def name_of(path: str | os.PathLike[str], folder: Path) -> str:
    """What `local`'s folder is called once that has ended: the URL is still there."""
    return str(path).rstrip("/") if is_url(path) else str(folder)


@contextlib.contextmanager
def written(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Where to write what is to lie at a URL; it is sent off when the block ends.

    Raises CheckpointError for a URL that cannot be written, or is taken; with
    `overwrite`, by anything but a folder with a manifest and the files that it lists. A
    save that was cut off is no obstacle.
    """
    url = str(path).rstrip("/")
    if jax.process_count() > 1:
        raise CheckpointError(
            f"{url}: several processes write into one folder that they share; save "
            "there, and copy it to the URL from one of them"
        )
    system, root = _system(url)
    with tempfile.TemporaryDirectory(prefix="jaxprune-") as place:
        folder = Path(place) / "folder"
        with _named(url):
            ours = _replaced(url, Path(place), overwrite)
        yield folder
        with _named(url):
            files = [path for path in folder.rglob("*") if path.is_file()]
            names = {path.relative_to(folder).as_posix() for path in files}
            system.makedirs(root, exist_ok=True)
            marker = json.dumps(sorted(names | ours)).encode()
            system.pipe_file(f"{root}/{PARTIAL}", marker)
            for name in sorted(ours, key=lambda name: name != integrity.MANIFEST):
                system.rm_file(f"{root}/{name}")
            _upload(folder, system, root)
            system.rm_file(f"{root}/{PARTIAL}")


def _replaced(url: str, place: Path, overwrite: bool) -> set[str]:
    """The files that a save at a URL replaces, but for the marker.

    place: a folder for a copy of the manifest. Raises CheckpointError as `written`.
    """
    system, root = _system(url)
    there = _there(system, root)
    cut, taken = PARTIAL in there, integrity.MANIFEST in there
    if there and not (cut or (taken and overwrite)):
        way = "overwrite=True" if taken else "another, as it is no saved network"
        raise CheckpointError(f"{url} exists; pass {way}")
    ours = _marked(system.cat_file(f"{root}/{PARTIAL}")) if cut else set()
    if taken and not ours:
        try:
            ours = _listed(url, there, place).keys() | {integrity.MANIFEST}
        except CheckpointError as error:
            raise CheckpointError(
                f"{url}/{integrity.MANIFEST}: damaged, so whose files lie there is not "
                "known; delete them, or choose another"
            ) from error
    for name in sorted(there.keys() - ours - {PARTIAL}):
        raise CheckpointError(
            f"{url}/{name}: not jaxprune's, so nothing is overwritten; move it "
            "elsewhere, or choose another folder"
        )
    return ours & there.keys()


def _marked(content: bytes) -> set[str]:
    """The files that a marker lists; none where it was cut off itself."""
    try:
        return set(map(str, json.loads(content)))
    except (ValueError, TypeError):
        return set()


def _there(system: Any, root: str) -> dict[str, int]:
    """The files below a path by their names in it, and their bytes."""
    return {
        str(name).removeprefix(root).lstrip("/"): int(entry.get("size") or 0)
        for name, entry in system.find(root, detail=True).items()
    }


def _listed(url: str, there: dict[str, int], folder: Path) -> dict[str, int]:
    """The files of the manifest, which is copied into a folder, and their bytes."""
    system, root = _system(url)
    if there[integrity.MANIFEST] > _MOST_MANIFEST:
        raise CheckpointError(f"{url}/{integrity.MANIFEST}: too large to be one")
    system.get_file(f"{root}/{integrity.MANIFEST}", str(folder / integrity.MANIFEST))
    return integrity.listed(folder)


def _upload(folder: Path, system: Any, root: str) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda path: path.name == integrity.MANIFEST):
        name = f"{root}/{file.relative_to(folder).as_posix()}"
        system.makedirs(name.rpartition("/")[0], exist_ok=True)
        system.put_file(str(file), name)


def _download(url: str, folder: Path) -> None:
    system, root = _system(url)
    there = _there(system, root)
    if PARTIAL in there:
        raise CheckpointError(
            f"{url}/{PARTIAL}: the save was cut off, or is still under way; save again"
        )
    if integrity.MANIFEST not in there:
        raise CheckpointError(
            f"{url}/{integrity.MANIFEST}: missing; it is damaged, still being written, "
            "or no checkpoint of jaxprune"
        )
    listed = _listed(url, there, folder)
    for name in sorted(there.keys() - listed.keys() - {integrity.MANIFEST}):
        raise CheckpointError(f"{url}/{name}: not in the manifest; move it elsewhere")
    room = shutil.disk_usage(folder).free
    if sum(listed.values()) > room:
        raise CheckpointError(
            f"{url}: {sum(listed.values()):,} bytes, {folder.parent} has room for "
            f"{room:,}; set TMPDIR to a larger disk"
        )
    for name, size in listed.items():
        if there.get(name) != size:
            seen = "missing" if name not in there else f"{there[name]} bytes"
            raise CheckpointError(f"{url}/{name}: damaged, {seen} instead of {size}")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        system.get_file(f"{root}/{name}", str(folder / name))


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path within it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise CheckpointError(
            f'{url}: URLs need fsspec: pip install "jaxprune[remote]"'
        ) from error
    with _named(url):
        system, root = url_to_fs(url)
        return system, str(root).rstrip("/")


@contextlib.contextmanager
def _named(url: str) -> Iterator[None]:
    """What a file system raises, of which there are many kinds, names the URL."""
    try:
        yield
    except JaxpruneError:
        raise
    except Exception as error:
        raise CheckpointError(f"{url}: {error or type(error).__name__}") from error
