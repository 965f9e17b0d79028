# SPDX-License-Identifier: Apache-2.0
"""Graphs as JSON text and as a table: names and integers, no pickle, no code.

JSON, version 1: `jaxprune` (the version that wrote it), `leaves` [{path, shape, dtype,
trained}], `groups` [{name, size, exact, slots: [{path, axis, role, indices}]}],
`frozen` [{path, axis, count, cause}], `terms` [{kind, coefficient, name, extents:
[[fixed, [[group, times], ...]], ...]}]. Indices [C, n] are {start, steps: [a, b], n},
index (c, j) = start + a * c + b * j, where they can be, else nested lists. The groups'
order is kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune import formats
from jaxprune.base import (
    EDGES,
    Extent,
    Frozen,
    Graph,
    GraphError,
    Group,
    Keep,
    Leaf,
    Path,
    Slot,
    Term,
    path_str,
)

VERSION = 1
_MOST_INDICES = 1 << 27  # of all slots together, 1 GiB of them
_Shapes = Mapping[Path, tuple[int, ...]]


def graph_to_json(graph: Graph) -> str:
    """The graph as JSON text, one group, leaf or term a line."""
    head = [f'"version": {VERSION}', f'"jaxprune": "{formats.writer_here()}"']
    return "{\n" + ",\n".join([*head, graph_body(graph)]) + "\n}\n"


def graph_body(graph: Graph) -> str:
    """What of that JSON is the graph's, the same whichever jaxprune writes it."""
    parts: dict[str, list[Any]] = {
        "leaves": [dataclasses.asdict(leaf) for leaf in graph.leaves],
        "groups": [_group_record(group) for group in graph.groups.values()],
        "frozen": [dataclasses.asdict(frozen) for frozen in graph.frozen],
        "terms": [term._asdict() for term in graph.terms],
    }
    blocks = []
    for name, records in parts.items():
        lines = ",\n".join("  " + json.dumps(r, default=_integer) for r in records)
        blocks.append(f'"{name}": [\n{lines}\n]' if records else f'"{name}": []')
    return ",\n".join(blocks)


def graph_from_json(text: str) -> Graph:
    """The graph that `graph_to_json` wrote.

    Raises GraphError that names what is wrong: text that is not JSON, another version,
    a missing or mistyped field, a path without a leaf, an index outside its leaf.
    """
    try:
        record = formats.parse(text)
    except (TypeError, ValueError) as error:
        raise GraphError(f"the graph is not JSON: {error}") from error
    version = _field(record, "version", int, "graph")
    writer = record.get("jaxprune")
    return formats.reader(_READERS, version, "graph", GraphError, writer)(record)


def _read_1(record: Any) -> Graph:
    """A graph of version 1."""
    _check_size(record)
    leaves = tuple(_leaf(r, w) for r, w in _records(record, "leaves"))
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    groups: dict[str, Group] = {}
    for r, where in _records(record, "groups"):
        group = _group(r, where, shapes)
        if group.name in groups:
            raise GraphError(f"graph: two groups are called {group.name!r}")
        groups[group.name] = group
    frozen = tuple(_frozen(r, w, shapes) for r, w in _records(record, "frozen"))
    terms = tuple(_term(r, w, groups) for r, w in _records(record, "terms"))
    return Graph(groups, frozen, leaves, terms)


_READERS = {1: _read_1}


def keep_to_text(keep: Keep) -> dict[str, str]:
    """A concrete keep {group: bool[C]} as {group: text of 0 and 1, one a channel}."""
    return {n: "".join("01"[bool(c)] for c in np.asarray(k)) for n, k in keep.items()}


def keep_from_text(texts: Any) -> dict[str, np.ndarray]:
    """The inverse of `keep_to_text`; GraphError for anything but its 0 and 1."""
    if not isinstance(texts, Mapping):
        raise GraphError("keep is not {group: text of 0 and 1}")
    for name, text in texts.items():
        if not isinstance(text, str) or set(text) - {"0", "1"}:
            raise GraphError(
                f"keep: group {name!r} is {_short(text)}, not a text of 0 and 1"
            )
    return {n: np.array([c == "1" for c in t], bool) for n, t in texts.items()}


def graph_table(graph: Graph, keep: Keep | None = None) -> str:
    """The groups with their channels (and those kept), then what is frozen, as text.

    Left out are the image's channels, the classes and the windows of convolutions.
    """
    head = ["group", "channels", *([] if keep is None else ["kept"]), "slots", "exact"]
    rows = []
    for name, group in graph.groups.items():
        kept = [] if keep is None else [str(int(np.sum(keep[name])))]
        exact = "yes" if group.exact else "no"
        rows.append([name, str(group.size), *kept, str(len(group.slots)), exact])
    total = [str(sum(int(row[i]) for row in rows)) for i in range(1, len(head) - 1)]
    lines = aligned([head, *rows, [f"{len(rows)} groups", *total, ""]])
    lines += sets(graph)
    if frozen := _merged(graph):
        head = ["frozen, the first such", "modules", "indices", "cause"]
        lines += ["", *aligned([head, *frozen])]
    return "\n".join(lines)


def sets(graph: Graph) -> list[str]:
    """A line on the groups whose channels are sets, as in grouped convolutions."""
    counts = {n: g.slots[0].indices.shape[1] for n, g in graph.groups.items()}
    several = [f"{n} ({counts[n]})" for n in counts if counts[n] > 1]
    if not several:
        return []
    shown = ", ".join(several[:6]) + f" and {len(several) - 6} more" * (
        len(several) > 6
    )
    return ["", f"A channel is a set of several that only go together in: {shown}"]


def _merged(graph: Graph) -> list[list[str]]:
    """One row for what has count and cause in common: axes, then modules."""
    modules: dict[tuple[Path, int, str], list[str]] = {}
    for f in graph.frozen:
        if f.cause in EDGES:
            continue
        key = (f.path[:-1], f.count, f.cause)
        modules.setdefault(key, []).append(f"{f.path[-1]}[{f.axis}]")
    alike: dict[tuple[str, int, str], list[Path]] = {}
    for (parent, count, cause), axes in modules.items():
        alike.setdefault((", ".join(axes), count, cause), []).append(parent)
    return [
        ["/".join([*parents[0], axes]), str(len(parents)), str(count), cause]
        for (axes, count, cause), parents in alike.items()
    ]


def bar(share: float, cells: int = 10) -> str:
    """`███░░░░░░░`: a share, from 0 to 1, of so many cells."""
    full = round(share * cells)
    return "█" * full + "░" * (cells - full)


def aligned(
    rows: Sequence[Sequence[str]], text: Sequence[int] | None = None
) -> list[str]:
    """Rows of cells as lines, columns two blanks apart: words left, numbers right.

    The columns in `text` hold words; if None, those in which a row but the first has
    more than digits.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if text is None:
        text = [
            i
            for i, column in enumerate(columns)
            if not all(c.isdigit() or not c for c in column[1:])
        ]
    return [
        "  ".join(
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def _integer(x: Any) -> int:
    return int(x)  # NumPy's integers


def _group_record(group: Group) -> dict[str, Any]:
    record = {"name": group.name, "size": group.size, "exact": bool(group.exact)}
    slots = [
        {"path": s.path, "axis": s.axis, "role": s.role, "indices": _compact(s.indices)}
        for s in group.slots
    ]
    return {**record, "slots": slots}


def _compact(indices: np.ndarray) -> Any:
    """Start and steps where `indices` [C, n] is affine in both axes, else lists."""
    channels, n = indices.shape
    if channels and n:
        start = int(indices[0, 0])
        a = int(indices[1, 0]) - start if channels > 1 else 1
        b = int(indices[0, 1]) - start if n > 1 else 1
        if a and b and np.array_equal(indices, _affine(start, a, b, channels, n)):
            return {"start": start, "steps": [a, b], "n": n}
    return indices.tolist()


def _affine(start: int, a: int, b: int, channels: int, n: int) -> np.ndarray:
    return start + a * np.arange(channels)[:, None] + b * np.arange(n)


# Reading: every value is checked before it is used.


def _records(record: Any, name: str) -> list[tuple[Any, str]]:
    return [
        (r, f"{name}[{i}]") for i, r in enumerate(_field(record, name, list, "graph"))
    ]


def _field(record: Any, name: str, kind: type[Any], where: str) -> Any:
    if not isinstance(record, dict):
        raise GraphError(f"{where} is a {type(record).__name__}, not a JSON object")
    if name not in record:
        raise GraphError(f"{where} lacks the field {name!r}")
    value = record[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise GraphError(f"{where}: {name} = {_short(value)} is no {kind.__name__}")
    if kind is int and value < 0:
        raise GraphError(f"{where}: {name} = {value} is negative")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**62


def _check_size(record: Any) -> None:
    """Raise GraphError where steps claim more indices than a graph's slots hold.

    They are the one place where a few digits would make many numbers. A slot that alone
    claims as many is left to `_stepped`, what is malformed to the other checks.
    """
    total = 0
    for r, where in _records(record, "groups"):
        match r:
            case {"size": int(size), "slots": list(slots)}:
                for slot in slots:
                    match slot:
                        case {"indices": {"n": int(n)}} if 0 < n * size < _MOST_INDICES:
                            total += n * size
        if total > _MOST_INDICES:
            raise GraphError(
                f"{where}: the slots up to here have {total} indices, more than "
                f"{_MOST_INDICES}"
            )


def _path(record: Any, where: str) -> Path:
    path = _field(record, "path", list, where)
    if not path or not all(isinstance(name, str) for name in path):
        raise GraphError(f"{where}: path = {_short(path)} is no list of names")
    return tuple(path)


def _leaf(record: Any, where: str) -> Leaf:
    shape = _field(record, "shape", list, where)
    if not all(_is_int(n) and n >= 0 for n in shape):
        raise GraphError(f"{where}: shape = {_short(shape)} is no list of lengths")
    dtype = _field(record, "dtype", str, where)
    trained = _field(record, "trained", bool, where)
    return Leaf(_path(record, where), tuple(shape), dtype, trained)


def _axis(record: Any, where: str, shapes: _Shapes) -> tuple[Path, int, int]:
    """The path, the axis and its length."""
    path, axis = _path(record, where), _field(record, "axis", int, where)
    if path not in shapes:
        raise GraphError(f"{where}: no leaf has the path {path_str(path)}")
    if axis >= len(shapes[path]):
        raise GraphError(
            f"{where}: {path_str(path)} of shape {shapes[path]} has no axis {axis}"
        )
    return path, axis, shapes[path][axis]


def _group(record: Any, where: str, shapes: _Shapes) -> Group:
    name, size = _field(record, "name", str, where), _field(record, "size", int, where)
    where = f"group {name!r}"
    exact = _field(record, "exact", bool, where)
    slots = []
    for i, r in enumerate(_field(record, "slots", list, where)):
        at = f"{where}, slots[{i}]"
        path, axis, length = _axis(r, at, shapes)
        role = _field(r, "role", str, at)
        if role not in ("out", "in"):
            raise GraphError(f"{at}: role = {role!r} is neither 'out' nor 'in'")
        indices = _indices(r, at, size, f"{path_str(path)} axis {axis}", length)
        slots.append(Slot(path, axis, indices, role))  # type: ignore[arg-type]
    return Group(name, size, tuple(slots), exact)


def _indices(record: Any, where: str, size: int, axis: str, length: int) -> np.ndarray:
    """Indices [size, n] in [0, length), from {start, steps, n} or nested lists."""
    if isinstance(record.get("indices"), list):
        array = _listed(record["indices"], where)
    else:
        array = _stepped(_field(record, "indices", dict, where), where, size, length)
    if len(array) != size:
        raise GraphError(
            f"{where}: indices of {len(array)} channels, the group has {size}"
        )
    if array.size and (array.min() < 0 or array.max() >= length):
        raise GraphError(
            f"{where}: indices {array.min()} to {array.max()} leave {axis}, of length "
            f"{length}"
        )
    return array


def _listed(rows: list[Any], where: str) -> np.ndarray:
    n = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    for row in rows:
        if not (isinstance(row, list) and len(row) == n and all(map(_is_int, row))):
            raise GraphError(f"{where}: indices are not rows of {n} integers")
    return np.array(rows, np.int64).reshape(len(rows), n)


def _stepped(record: Any, where: str, size: int, length: int) -> np.ndarray:
    start, n = (_field(record, name, int, where) for name in ("start", "n"))
    steps = _field(record, "steps", list, where)
    two = len(steps) == 2 and all(_is_int(s) and 0 < abs(s) <= length for s in steps)
    # Bounded first: what is written there must not decide how much is allocated.
    if not two or max(start, size, n) > length or size * n > _MOST_INDICES:
        raise GraphError(
            f"{where}: indices = {_short(record)} do not fit an axis of length {length}"
        )
    return _affine(start, steps[0], steps[1], size, n)


def _frozen(record: Any, where: str, shapes: _Shapes) -> Frozen:
    path, axis, _ = _axis(record, where, shapes)
    count = _field(record, "count", int, where)
    return Frozen(path, axis, count, _field(record, "cause", str, where))


def _term(record: Any, where: str, groups: Mapping[str, Group]) -> Term:
    kind = _field(record, "kind", str, where)
    if kind not in ("flops", "activation_bytes"):
        raise GraphError(f"{where}: kind = {kind!r} is unknown")
    extents = []
    for extent in _field(record, "extents", list, where):
        match extent:
            case [fixed, list(pairs)] if _is_int(fixed) and all(
                isinstance(pair, list) and len(pair) == 2 and _is_int(pair[1])
                for pair in pairs
            ):
                for name, _ in pairs:
                    if not isinstance(name, str) or name not in groups:
                        raise GraphError(f"{where}: there is no group {_short(name)}")
                extents.append(Extent(fixed, tuple((n, times) for n, times in pairs)))
            case _:
                raise GraphError(
                    f"{where}: {_short(extent)} is not [fixed, [[group, times], ...]]"
                )
    coefficient = _field(record, "coefficient", int, where)
    name = _field(record, "name", str, where)
    return Term(kind, coefficient, tuple(extents), name)  # type: ignore[arg-type]
