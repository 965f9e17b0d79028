# SPDX-License-Identifier: Apache-2.0
"""Folders that are complete and undamaged, or an error that names the file.

A folder is written under a hidden name beside its own (`.NAME.partial`), sealed with a
manifest of the size and SHA-256 of every file, and renamed: it exists only once it is
complete. Where it replaces another, that one lies at `.NAME.old` between two renames,
and is read from there if the process dies just then.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from jaxprune.base import CheckpointError

MANIFEST = "manifest.sha256.json"
_VERSION = 1
_CHUNK = 1 << 20


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
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


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
    another size, changed, or not in the manifest.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    listed = _read_manifest(folder / MANIFEST)
    for name, (size, digest) in listed.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: damaged, the file is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: damaged, {file.stat().st_size} bytes instead of {size}"
            )
        if _digest(file) != digest:
            raise CheckpointError(f"{file}: damaged, its SHA-256 is not the manifest's")
    for name in _files(folder):
        if name not in listed:
            raise CheckpointError(
                f"{folder / name}: not in the manifest; move the file elsewhere"
            )


def read_json(file: Path) -> Any:
    """A JSON file's value. Raises CheckpointError that names the file."""
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{file}: cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged, not JSON: {error}") from error


def _seal(folder: Path) -> None:
    files = {
        name: [(folder / name).stat().st_size, _digest(folder / name, sync=True)]
        for name in _files(folder)
    }
    with open(folder / MANIFEST, "wb") as stream:
        stream.write(_manifest(files))
        stream.flush()
        os.fsync(stream.fileno())
    for nested in (path for path in folder.rglob("*") if path.is_dir()):
        _sync(nested)
    _sync(folder)


def _manifest(files: dict[str, Any]) -> bytes:
    """The manifest's one valid spelling, which holds its own digest."""
    document: dict[str, Any] = {"version": _VERSION, "files": files}
    body = json.dumps(document, sort_keys=True).encode()
    document["sha256"] = hashlib.sha256(body).hexdigest()
    return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"


def _read_manifest(file: Path) -> dict[str, tuple[int, str]]:
    if not file.is_file():
        raise CheckpointError(
            f"{file}: missing; the folder is damaged, or no checkpoint of jaxprune"
        )
    document = read_json(file)
    version = document.get("version") if isinstance(document, dict) else None
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict) or _manifest(files) != file.read_bytes():
        if isinstance(version, int) and version > _VERSION:
            raise CheckpointError(
                f"{file}: of version {version}, where this jaxprune reads {_VERSION}, "
                "or damaged"
            )
        raise CheckpointError(f"{file}: damaged, its own SHA-256 does not match")
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"{file}: {name!r} leads out of the folder")
    return files


def _files(folder: Path) -> list[str]:
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in names if name != MANIFEST)


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


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
