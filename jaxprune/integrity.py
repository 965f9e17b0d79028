# SPDX-License-Identifier: Apache-2.0
"""Folders that are complete and undamaged, or an error that names the file.

A folder is written under a hidden name beside its own (`.NAME.partial`), sealed with a
manifest of the size and SHA-256 of every file, and renamed: it exists only once it is
complete. Where it replaces another, that one lies at `.NAME.old` between two renames,
and is read from there if the process dies just then.

The manifest, version 2: {version, jaxprune (which wrote it), files {name: [size,
SHA-256]}, sha256 (of the rest)}, in one valid spelling. Version 1 named no jaxprune.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from jaxprune import disk, formats
from jaxprune.base import CheckpointError

MANIFEST = "manifest.sha256.json"
_VERSION = 2
_CHUNK = 1 << 20
WAY_OUT = "copy the folder anew from where it was saved, or save it again"


def sibling(folder: Path, kind: str) -> Path:
    """The hidden name beside `folder` for its 'partial', 'old' or 'trash' state."""
    return folder.with_name(f".{folder.name}.{kind}")


def resolve(folder: Path) -> Path:
    """Where the newest complete state of `folder` lies: a crash may leave `.old`."""
    old = sibling(folder, "old")
    return old if not folder.exists() and old.is_dir() else folder


def begin(folder: Path) -> Path:
    """A new, empty folder to write the next state of `folder` into."""
    partial, old = sibling(folder, "partial"), sibling(folder, "old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    return partial


def commit(partial: Path, folder: Path) -> None:
    """Seal `partial`, then make it `folder`, in place of one that is there."""
    _seal(partial)
    old = sibling(folder, "old")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    disk.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def abandon(folder: Path) -> None:
    """Delete what `begin` made beside `folder`, and so the room that it takes."""
    shutil.rmtree(sibling(folder, "partial"), ignore_errors=True)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Where to write the next state of `folder`, which is that when the block ends.

    Where the block fails nothing of it stays.
    """
    try:
        partial = begin(folder)
        yield partial
        commit(partial, folder)
    except Exception:
        abandon(folder)
        raise


def remove(folder: Path) -> None:
    """Delete `folder`; a kill meanwhile leaves no half of it under its name."""
    trash = sibling(folder, "trash")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():  # else the state that it replaced would come back
        shutil.rmtree(sibling(folder, "old"), ignore_errors=True)
    resolve(folder).rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises CheckpointError that names the first file which is missing, unreadable, of
    another size, changed, not in the manifest, or a link, which could lead anywhere.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    there = _files(folder)
    listed = _read_manifest(folder / MANIFEST)
    for name, (size, digest) in listed.items():
        file = folder / name
        if name not in there:
            raise CheckpointError(f"{file}: damaged, the file is missing; {WAY_OUT}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: damaged, {file.stat().st_size} bytes instead of {size}; "
                f"{WAY_OUT}"
            )
        if _digest(file) != digest:
            raise CheckpointError(
                f"{file}: damaged, its SHA-256 is not the manifest's; {WAY_OUT}"
            )
    for name in sorted(there):
        if name not in listed:
            raise CheckpointError(
                f"{folder / name}: not in the manifest; move the file elsewhere"
            )


def listed(folder: Path) -> dict[str, int]:
    """The files that a folder's manifest lists, by name, and their bytes.

    Raises CheckpointError for a manifest that is missing, damaged, or of another
    version; the files themselves need not be there.
    """
    return {name: size for name, (size, _) in _read_manifest(folder / MANIFEST).items()}


def check_own(folder: Path) -> None:
    """Raise CheckpointError unless all in a folder is what its manifest lists.

    For before it is replaced: what somebody else put there would go with it.
    """
    try:
        names = listed(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: missing or damaged, so whose files lie there is not "
            "known; delete the folder, or choose another"
        ) from error
    for name in sorted(_files(folder) - names.keys()):
        raise CheckpointError(
            f"{folder / name}: not jaxprune's, so nothing is overwritten; move it "
            "elsewhere, or choose another folder"
        )


def read_json(file: Path) -> Any:
    """A JSON file's value. Raises CheckpointError that names the file."""
    try:
        return formats.parse(formats.read_text(file))
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{file}: cannot be read: {reason}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged, not JSON: {error}") from error


def _seal(folder: Path) -> None:
    files = {
        name: [(folder / name).stat().st_size, _digest(folder / name, sync=True)]
        for name in sorted(_files(folder))
    }
    with open(folder / MANIFEST, "wb") as stream:
        stream.write(_manifest(files))
        stream.flush()
        os.fsync(stream.fileno())
    for nested in (path for path in folder.rglob("*") if path.is_dir()):
        disk.sync_folder(nested)
    disk.sync_folder(folder)


def _manifest(files: dict[str, Any], version: int = _VERSION) -> bytes:
    """The manifest's one valid spelling, which holds its own digest."""
    document: dict[str, Any] = {"version": version, "files": files}
    if version > 1:
        document["jaxprune"] = formats.writer_here()
    return _signed(document)


def _signed(document: dict[str, Any]) -> bytes:
    body = json.dumps(document, sort_keys=True).encode()
    signed = {**document, "sha256": hashlib.sha256(body).hexdigest()}
    return json.dumps(signed, sort_keys=True, indent=1).encode() + b"\n"


def _read_manifest(file: Path) -> dict[str, tuple[int, str]]:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: missing; the folder is damaged, or no checkpoint of jaxprune"
        )
    document = read_json(file)
    if not isinstance(document, dict):
        raise CheckpointError(f"{file}: damaged, no JSON object; {WAY_OUT}")
    unsigned = {name: x for name, x in document.items() if name != "sha256"}
    version, writer = document.get("version"), document.get("jaxprune")
    intact = _signed(unsigned) == file.read_bytes()
    # A newer one may be spelt otherwise.
    if not intact and not (isinstance(version, int) and version > _VERSION):
        raise CheckpointError(
            f"{file}: damaged, its own SHA-256 does not match; {WAY_OUT}"
        )
    where = str(file) if intact else f"{file}: damaged, or"
    read = formats.reader(_READERS, version, where, CheckpointError, writer)
    return read(file, document)


def _listed(file: Path, document: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The files of a manifest, of version 1 or 2, each name and entry checked."""
    files = document.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{file}: files is no JSON object")
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise CheckpointError(f"{file}: {name!r} leads out of the folder")
        match entry:
            case [int(size), str(digest)] if size >= 0 and re.fullmatch(_HEX, digest):
                continue
        raise CheckpointError(f"{file}: {name!r} has no [size, SHA-256]")
    return files


_READERS = {1: _listed, 2: _listed}
_HEX = "[0-9a-f]{64}"


def _files(folder: Path) -> set[str]:
    """The names of all files below a folder but the manifest, with slashes.

    Raises CheckpointError, naming it, for what is neither a file nor a folder.
    """
    found = set()
    for place, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            path = Path(place, entry)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.add(path.relative_to(folder).as_posix())
            elif not stat.S_ISDIR(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "no ordinary file"
                raise CheckpointError(
                    f"{path}: {kind}; a checkpoint holds files alone: copy what it "
                    "leads to here (cp -rL)"
                )
    return found - {MANIFEST}


def _digest(file: Path, *, sync: bool = False) -> str:
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
            if sync:
                os.fsync(stream.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{file}: cannot be read: {reason}") from error
    return digest.hexdigest()
