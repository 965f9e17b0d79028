# SPDX-License-Identifier: Apache-2.0
"""Folders of arrays and JSON: the one file that touches Orbax, pinned below 1.0."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import disk, formats, integrity, leaves, peers
from jaxprune.base import CheckpointError, PeerError, PyTree

VERSION = 1  # of jaxprune.json and step.json
_ARRAYS = "arrays"


def write(folder: Path, arrays: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Write and seal a folder of arrays and text files; it appears when complete.

    Where that fails, nothing of it stays.
    In a multi-host run every process calls it, on a file system that all of them share.
    Raises DiskError where the disk is full or read-only, CheckpointError where Orbax
    refuses, PeerError where another process is gone.
    """
    partial = integrity.sibling(folder, "partial")
    first = jax.process_index() == 0
    try:
        if first:
            integrity.begin(folder)
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
        peers.barrier(f"jaxprune begins {folder}")
        if arrays:
            from orbax.checkpoint import v1 as ocp

            with peers.told():
                ocp.save(partial / _ARRAYS, dict(arrays))
        peers.barrier(f"jaxprune wrote {folder}")
        if first:
            integrity.commit(partial, folder)
        peers.barrier(f"jaxprune sealed {folder}")
    except Exception as error:
        if first:
            integrity.abandon(folder)
        if isinstance(error, CheckpointError | PeerError):
            raise
        if (number := disk.errno_of(error)) in disk.REFUSALS:
            raise disk.refused(folder, number) from error
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error


def to_json(record: Mapping[str, Any], free: str) -> str:
    """JSON text of a record with its version; `free` is the field that the user filled.

    NumPy's numbers and arrays and dataclasses become plain. Raises CheckpointError that
    names the entry which JSON can't hold.
    """
    for name, value in record[free].items():
        try:
            json.dumps({name: value}, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{free}[{name!r}] can't be kept as JSON: {error}"
            ) from error
    document = {"version": VERSION, "jaxprune": formats.writer_here()}
    document |= record
    return json.dumps(document, default=_plain, indent=1) + "\n"


def read_record(
    folder: Path, name: str, free: str, *, verified: bool = False
) -> dict[str, Any]:
    """What `to_json` wrote into a folder, whose checksums are compared first.

    Raises CheckpointError that names a missing or damaged file.
    """
    if not verified:
        integrity.verify(folder)
    if not (folder / name).is_file():
        raise CheckpointError(
            f"{folder / name}: missing; the folder holds something else"
        )
    record = integrity.read_json(folder / name)
    if not isinstance(record, dict):
        raise CheckpointError(f"{folder / name}: no JSON object")
    version, writer = record.get("version"), record.get("jaxprune")
    read = formats.reader(
        _READERS, version, str(folder / name), CheckpointError, writer
    )
    try:
        return read(record, free)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / name}: {error}") from error


def _read_1(record: dict[str, Any], free: str) -> dict[str, Any]:
    """A record of version 1, checked."""
    if not isinstance(record.get(free), dict):
        raise CheckpointError(f"{free} is no JSON object")
    leaves.check(record.get("leaves"))
    return record


_READERS = {1: _read_1}


def read_like(folder: Path, records: Sequence[leaves.Record], like: PyTree) -> PyTree:
    """The tree in the containers, types and shardings of `like`."""
    try:
        ordered, templates, treedef = leaves.arrange(records, like)
        places = [_place_of(x) for x in templates]
        # Numbers are read by NumPy, which does not narrow 64 bits, and cast afterwards.
        reading = [
            None if r["kind"] in leaves.SCALARS else p for r, p in zip(ordered, places)
        ]
        values = _read(folder, ordered, reading)
        tree = map(leaves.as_like, ordered, values, templates, places)
        return jax.tree.unflatten(treedef, list(tree))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def read_as_saved(
    folder: Path, records: Sequence[leaves.Record], sharding: Any, like: PyTree | None
) -> PyTree:
    """The tree as it was, in nested dicts or the containers of `like`.

    sharding: a Sharding, a Mesh to replicate over, or None: the default device.
    """
    place = _sharding(sharding)
    try:
        treedef = None
        if like is not None:
            records, _, treedef = leaves.arrange(records, like, shapes=False)
        places = [None if r["kind"] in ("numpy", "scalar") else place for r in records]
        values = _read(folder, records, places)
        if treedef is None:
            return leaves.nest(records, values)
        return jax.tree.unflatten(treedef, values)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def shapes_as_saved(records: Sequence[leaves.Record], like: PyTree | None) -> PyTree:
    """What `read_as_saved` would return, as shapes and dtypes; reads nothing."""
    treedef = None
    if like is not None:
        records, _, treedef = leaves.arrange(records, like, shapes=False)
    values = [leaves.struct(record) for record in records]
    if treedef is None:
        return leaves.nest(records, values)
    return jax.tree.unflatten(treedef, values)


def _read(
    folder: Path, records: Sequence[leaves.Record], places: Sequence[Any]
) -> list[Any]:
    for record, place in zip(records, places, strict=True):
        dtype = jnp.dtype(record.get("dtype", bool))
        if place is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise CheckpointError(
                f"{leaves.path_of(record)} is {record['dtype']}, which this process "
                "would narrow: call jax.config.update('jax_enable_x64', True) first"
            )
    _check_size(records, places)
    wanted = leaves.targets(records, places)
    arrays: Mapping[str, Any] = {}
    if wanted:
        from orbax.checkpoint import v1 as ocp

        try:
            arrays = ocp.load(folder / _ARRAYS, wanted)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{_ARRAYS}: Orbax cannot read it: {reason}"
            ) from error
    try:
        return leaves.revive(records, arrays, places)
    except (MemoryError, TypeError, ValueError) as error:
        raise CheckpointError(f"{_ARRAYS}: cannot be read: {error}") from error


def _check_size(records: Sequence[leaves.Record], places: Sequence[Any]) -> None:
    """Raise CheckpointError where this process would read more than there is memory.

    What a record claims is not trusted: nothing is allocated before. An array that is
    spread over devices counts with its shards that lie on this process's.
    """
    total, worst, largest = 0, "", -1
    for record, place in zip(records, places, strict=True):
        shape = tuple(record.get("shape", ()))
        size = math.prod(shape) * jnp.dtype(record.get("dtype", bool)).itemsize
        if size and place is not None:
            shards = len(place.addressable_devices)
            try:
                size = size // math.prod(shape) * math.prod(place.shard_shape(shape))
            except ValueError as error:
                raise CheckpointError(
                    f"{leaves.path_of(record)}: {shape} does not fit {place}: {error}"
                ) from error
            size *= shards
        total += size
        if size > largest:
            worst, largest = f"{leaves.path_of(record)} {shape}", size
    most = formats.memory() + _device_memory()
    if total > most:
        raise CheckpointError(
            f"{_ARRAYS}: its arrays claim {total:,} bytes, the largest is {worst}; "
            f"there is memory for {most:,}. If this is so, load it with sharding= over "
            "more machines"
        )


def _device_memory() -> int:
    """Bytes of this process's accelerators; CPUs tell none: they use the machine's."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return sum(int(found.get("bytes_limit", 0)) for found in stats)


def _place_of(x: Any) -> Any:
    """Where a template's leaf lies; None for NumPy's arrays and Python's numbers."""
    if isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        return x.sharding if x.sharding is not None else _sharding(None)
    return None


def _sharding(given: Any) -> Any:
    if given is None:
        return jnp.zeros(()).sharding
    if isinstance(given, jax.sharding.Mesh):
        return jax.sharding.NamedSharding(given, jax.sharding.PartitionSpec())
    if isinstance(given, jax.sharding.Sharding):
        return given
    raise CheckpointError(
        f"sharding = {given!r} is neither a jax.sharding.Sharding nor a Mesh"
    )


def _plain(x: Any) -> Any:
    if isinstance(x, (np.generic, np.ndarray, jax.Array)):
        return np.asarray(x).tolist()
    if isinstance(x, Mapping):
        return dict(x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.asdict(x)
    raise TypeError(f"a {type(x).__name__} is neither a number, text, list nor dict")
