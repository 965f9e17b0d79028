# SPDX-License-Identifier: Apache-2.0
"""Paths as files that grow by a line a step, so that a walk can go on after a kill.

Each line is the CRC-32 of its JSON, a blank, the JSON. The first tells the version and
what walk it is of ({name: number or text}, or null), and which jaxprune wrote it; the
others are steps. A last line without its end was cut short by a kill, and does not
count. Beside the file lie, where the walk retrains, the shrunk variables of step n as
FILE.n.npz: each leaf's bytes.
"""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import disk, formats
from jaxprune.base import DataError, Graph, PyTree
from jaxprune.placement import placed_like
from jaxprune.sharded import fetched
from jaxprune.steps import Step, from_plain, to_plain
from jaxprune.trees import expand, shrink

VERSION = 1
File = str | os.PathLike[str]


class Kept(NamedTuple):
    """What a file holds: which walk it is of (None: unknown), and its steps so far."""

    walk: dict[str, Any] | None
    steps: tuple[Step, ...]


def write(
    file: File, steps: Iterable[Step], walk: Mapping[str, Any] | None = None
) -> None:
    """Write a whole file all at once, from the first process."""
    if jax.process_index() == 0:
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        head = {"path": VERSION, "jaxprune": formats.writer_here()}
        head |= {"walk": None if walk is None else dict(walk)}
        text = _line(head) + "".join(_line(to_plain(step)) for step in steps)
        disk.write(file, text.encode())


def append(file: File, step: Step) -> None:
    """Add a step to a file, from the first process; on the disk when it returns."""
    if jax.process_index() == 0:
        with disk.writing(Path(file)), open(file, "ab") as stream:
            stream.write(_line(to_plain(step)).encode())
            stream.flush()
            os.fsync(stream.fileno())


def read(file: File) -> Kept:
    """What `write` and `append` have put into a file.

    Raises DataError naming a file that is missing, none of these, or damaged, and the
    line.
    """
    file = Path(file)
    try:
        lines = formats.read_text(file).splitlines(keepends=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: no pruning path can be read: {reason}") from error
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    records = [_parsed(file, number, line) for number, line in enumerate(lines, 1)]
    if not records or "path" not in records[0]:
        raise DataError(f"{file} is no pruning path; delete it to walk anew")
    head = records[0]
    find = formats.reader(
        _READERS, head["path"], str(file), DataError, head.get("jaxprune")
    )
    return find(file, records)


def _read_1(file: Path, records: list[dict[str, Any]]) -> Kept:
    """A path of version 1."""
    walk, steps = records[0].get("walk"), []
    if walk is not None and not isinstance(walk, dict):
        raise DataError(f"{file}: line 1: walk is neither an object nor null")
    for number, record in enumerate(records[1:], 2):
        try:
            steps.append(from_plain(record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}: line {number} is no step of a pruning path: {error!r}"
            ) from error
    return Kept(walk, tuple(steps))


_READERS = {1: _read_1}


def resume(file: File, walk: Mapping[str, Any]) -> tuple[Step, ...]:
    """The steps that a file holds of this walk; begins the file where there is none.

    Raises DataError where it is another walk's: what differs is named.
    """
    walk = json.loads(json.dumps(dict(walk)))
    if not Path(file).exists():
        write(file, (), walk)
        return ()
    kept = read(file)
    if kept.walk != walk:
        raise DataError(
            f"{file} is of another walk: {_difference(kept.walk or {}, walk)}; set "
            "this back, or walk into another file"
        )
    write(file, kept.steps, walk)  # without a line that was cut short
    return kept.steps


def save_variables(
    graph: Graph, file: File, number: int, step: Step, variables: PyTree
) -> None:
    """Write the variables of step `number`, shrunk, beside a path's file.

    Every process calls it, as each may hold a share of them; the first one writes.
    """
    leaves = jax.tree.leaves(shrink(graph, step.keep, variables))
    arrays = {
        f"leaf{i}": np.frombuffer(_plain(jnp.asarray(x)).tobytes(), np.uint8)
        for i, x in enumerate(leaves)
    }
    if jax.process_index() != 0:
        return
    archive = io.BytesIO()
    np.savez(archive, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    disk.write(_beside(file, number), archive.getvalue())


def load_variables(
    graph: Graph, file: File, number: int, step: Step, like: PyTree
) -> PyTree:
    """The shrunk variables of step `number` of a walk that retrains.

    like: the dense variables, whose containers and dtypes they have. Raises DataError
    naming a file that is missing, damaged or of another network.
    """
    name = _beside(file, number)
    shapes = jax.eval_shape(lambda tree: shrink(graph, step.keep, tree), like)
    leaves, treedef = jax.tree.flatten(shapes)
    try:
        archive = formats.read_npz(name)
        found = [archive[f"leaf{i}"].tobytes() for i in range(len(leaves))]
        return jax.tree.unflatten(
            treedef, [*map(_revived, found, leaves, jax.tree.leaves(like))]
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{name}: the variables of step {number} cannot be read: {error}"
        ) from error


def masked_variables(
    graph: Graph, file: File, number: int, step: Step, like: PyTree
) -> PyTree:
    """The same at their dense shapes, zero where removed; on the mesh of `like`."""
    small = load_variables(graph, file, number, step, like)
    dense = expand(graph, step.keep, small)
    return jax.tree.map(placed_like, like, dense)


def checksum(tree: PyTree) -> int:
    """A CRC-32 of a tree's arrays: values, dtypes and shapes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        array = _plain(leaf)
        total = zlib.crc32(f"{array.dtype}{array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).tobytes(), total)
    return total


def _difference(before: Mapping[str, Any], walk: Mapping[str, Any]) -> str:
    """What of two walks differs, also where only one of them has it."""

    def of(record: Mapping[str, Any], name: str) -> str:
        return repr(record[name]) if name in record else "not given"

    changed = [
        f"{name} (there {of(before, name)}, now {of(walk, name)})"
        for name in {**walk, **before}
        if of(before, name) != of(walk, name)
    ]
    return ", ".join(changed) or "it does not tell of which"


def _beside(file: File, number: int) -> Path:
    file = Path(file)
    return file.with_name(f"{file.name}.{number}.npz")


def _is_key(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> np.ndarray:
    return fetched(jax.random.key_data(x) if _is_key(x) else x)


def _revived(raw: bytes, like: Any, dense: Any) -> Any:
    """The array that these bytes are, of the shape and dtype of `like`."""
    if not _is_key(like):
        return jnp.asarray(np.frombuffer(raw, like.dtype).reshape(like.shape))
    plain = jax.eval_shape(jax.random.key_data, like)
    data = jnp.asarray(np.frombuffer(raw, plain.dtype).reshape(plain.shape))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(dense))


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _parsed(file: Path, number: int, line: str) -> dict[str, Any]:
    crc, _, text = line.rstrip("\n").partition(" ")
    if crc != f"{zlib.crc32(text.encode()):08x}":
        raise DataError(
            f"{file}: damaged, or no pruning path: the checksum of line {number} is "
            "another; delete the file to walk anew, or that line and all behind it to "
            "go on from there"
        )
    try:
        record = formats.parse(text)
    except ValueError as error:
        raise DataError(f"{file}: line {number} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{file}: line {number} is no JSON object")
    return record
