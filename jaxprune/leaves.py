# SPDX-License-Identifier: Apache-2.0
"""Any pytree as a flat list of JSON records and arrays, and back.

A record is {path, number, kind, shape, dtype, ...}. path: a dict's keys as they are,
'index' and 'attr' objects for other containers. kind: 'jax' or 'numpy' arrays, 'key'
(typed PRNG keys, kept as their data), 'scalar' (of NumPy); 'python' numbers, 'none' and
'empty' dicts need no array. Arrays are called by number: no name of a leaf ever becomes
a file's name, and no code is stored.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import CheckpointError, PyTree

Record = dict[str, Any]
_WITHOUT_ARRAY = ("python", "none", "empty")
SCALARS = ("python", "scalar")
_AXES = 32  # more than any array of NumPy or JAX has


def describe(tree: PyTree) -> tuple[list[Record], dict[str, Any]]:
    """The records of the tree's leaves, and the arrays to be stored, by number.

    Raises CheckpointError for a leaf or a key that can't be kept, by its path.
    """
    records: list[Record] = []
    arrays: dict[str, Any] = {}
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_hollow)[0]
    for number, (keys, x) in enumerate(flat):
        record, array = _describe(x, keys)
        if array is not None and array.size:
            arrays[f"{number:06d}"] = array
        path = [_plain(key, keys) for key in keys]
        records.append({"path": path, "number": number, **record})
    return records, arrays


def check(records: Any) -> None:
    """Raise CheckpointError unless `records`, as read, are what `describe` returns."""
    if not isinstance(records, list):
        raise CheckpointError("leaves is no list")
    paths, numbers = set(), set()
    for i, record in enumerate(records):
        if not _is_record(record):
            raise CheckpointError(f"leaves[{i}] = {str(record)[:100]} is malformed")
        path, number = path_of(record), record["number"]
        if path in paths or number in numbers:
            raise CheckpointError(f"leaves[{i}]: {path} or its number is there twice")
        paths.add(path)
        numbers.add(number)


def _is_record(record: Any) -> bool:
    match record:
        case {"path": list(path), "number": int(number)} if (
            all(map(_is_name, path)) and 0 <= number < 2**31
        ):
            pass
        case _:
            return False
    match record:
        case {"kind": "none" | "empty"}:
            return True
        case {"kind": "python", "value": bool() | int() | float()}:
            return True
        case {"kind": "key", "impl": impl} if not (
            isinstance(impl, str) and _is_impl(impl)
        ):
            return False
        case {
            "kind": "jax" | "numpy" | "scalar" | "key",
            "shape": list(shape),
            "dtype": str(dtype),
        }:
            sizes = all(type(n) is int and 0 <= n < 2**62 for n in shape)
            return sizes and len(shape) <= _AXES and _known(dtype)
    return False


def _is_name(name: Any) -> bool:
    if isinstance(name, dict):
        return set(name) in ({"attr"}, {"index"})
    return type(name) in (str, int)


def _is_impl(name: str) -> bool:
    """Whether a PRNG is known by this name."""
    try:
        jax.eval_shape(lambda: jax.random.key(0, impl=name))
    except (TypeError, ValueError):
        return False
    return True


def targets(records: Sequence[Record], places: Sequence[Any]) -> dict[str, Any]:
    """What to ask of the stored arrays, by number.

    places: for each record a sharding, or None for NumPy, which reads 64 bits in any
    case, since Orbax's threads do not see `jax.enable_x64`.
    """
    wanted: dict[str, Any] = {}
    for record, place in zip(records, places, strict=True):
        if record["kind"] in _WITHOUT_ARRAY or 0 in record["shape"]:
            continue
        shape, dtype = tuple(record["shape"]), jnp.dtype(record["dtype"])
        struct = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        numpy = place is None or dtype.itemsize > 4
        # Of no memory of its own: Orbax asks for its shape and dtype alone.
        template = np.broadcast_to(np.zeros((), dtype), shape)
        wanted[name_of(record)] = template if numpy else struct
    return wanted


def revive(
    records: Sequence[Record], arrays: Mapping[str, Any], places: Sequence[Any]
) -> list[Any]:
    """The leaves as they were, from what `targets` asked for."""
    values = []
    for record, place in zip(records, places, strict=True):
        kind = record["kind"]
        if kind in _WITHOUT_ARRAY:
            values.append({} if kind == "empty" else record.get("value"))
            continue
        array: Any = arrays.get(name_of(record))
        if array is None:
            array = np.zeros(record["shape"], jnp.dtype(record["dtype"]))
        if place is not None and not isinstance(array, jax.Array):
            array = jax.device_put(array, place)
        if kind == "key":
            array = jax.random.wrap_key_data(array, impl=record["impl"])
        values.append(array[()] if kind == "scalar" and place is None else array)
    return values


def struct(record: Record) -> Any:
    """A leaf as its shape and dtype; what needs no array as it is."""
    if record["kind"] in _WITHOUT_ARRAY:
        return {} if record["kind"] == "empty" else record.get("value")
    found = jax.ShapeDtypeStruct(tuple(record["shape"]), jnp.dtype(record["dtype"]))
    if record["kind"] != "key":
        return found
    wrap = functools.partial(jax.random.wrap_key_data, impl=record["impl"])
    try:
        return jax.eval_shape(wrap, found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path_of(record)} is no key: {error}") from error


def nest(records: Sequence[Record], values: Sequence[Any]) -> Any:
    """The leaves in nested dicts; an nnx variable's wrapper is left out.

    Raises CheckpointError where there were other containers.
    """
    root: dict[str, Any] = {"": {}}
    for record, value in zip(records, values, strict=True):
        path = ["", *record["path"]]
        if path[-1] in ({"attr": "value"}, {"attr": "raw_value"}):
            path.pop()
        if not all(isinstance(name, (str, int)) for name in path):
            raise CheckpointError(
                f"{path_of(record)} lies in a container that is no dict; pass like=, a "
                "tree of the same structure"
            )
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise CheckpointError(f"{path_of(record)} lies below another leaf")
        if isinstance(node.get(path[-1]), dict) and path[1:]:
            raise CheckpointError(f"{path_of(record)} has other leaves below it")
        node[path[-1]] = value
    return root[""]


def arrange(
    records: Sequence[Record], like: PyTree, *, shapes: bool = True
) -> tuple[list[Record], list[Any], Any]:
    """The records in the order of `like`'s leaves, those leaves, and the treedef.

    Raises CheckpointError that names the first leaf which is missing, left over or,
    with `shapes`, of another shape or dtype.
    """
    by_path = {path_of(r): r for r in records if r["kind"] not in ("none", "empty")}
    flat, treedef = jax.tree_util.tree_flatten_with_path(like)
    ordered = []
    for keys, x in flat:
        path = path_of({"path": [_plain(key, keys) for key in keys]})
        if path not in by_path:
            raise CheckpointError(f"{path} of the template is not in the checkpoint")
        if shapes:
            _check_like(path, by_path[path], x)
        ordered.append(by_path.pop(path))
    if by_path:
        path = next(iter(by_path))
        raise CheckpointError(f"{path} of the checkpoint is not in the template")
    return ordered, [x for _, x in flat], treedef


def as_like(record: Record, value: Any, like: Any, place: Any) -> Any:
    """A number in the form that the template shows; everything else as it is.

    Raises CheckpointError where the template's type cannot hold the number.
    """
    if type(like) not in (bool, int, float) and record["kind"] not in SCALARS:
        return value
    number = np.asarray(value).item()
    try:
        if type(like) in (bool, int, float):
            cast = type(like)(number)
        else:
            cast = np.asarray(number, like.dtype)[()]
    except (OverflowError, ValueError):
        cast = None
    rounded = isinstance(number, float) and isinstance(cast, (float, np.inexact))
    if cast != number and not rounded:
        raise CheckpointError(f"{path_of(record)}: saved is {number}, no {like!r}")
    if place is not None:
        return jax.device_put(cast, place)
    return np.asarray(cast) if isinstance(like, np.ndarray) else cast


def name_of(record: Record) -> str:
    """The name under which Orbax keeps the record's array, made of digits only."""
    return f"{record['number']:06d}"


def path_of(record: Record) -> str:
    """A record's path as text: `opt/[0]/mu/params/conv/kernel`."""
    names = []
    for name in record["path"]:
        if isinstance(name, Mapping):
            name = name.get("attr", f"[{name.get('index')}]")
        names.append(str(name))
    return "/".join(names)


def _hollow(x: Any) -> bool:
    return x is None or (isinstance(x, Mapping) and not x)


def _plain(key: Any, keys: Sequence[Any]) -> Any:
    if hasattr(key, "name"):
        return {"attr": key.name}
    if hasattr(key, "idx"):
        return {"index": key.idx}
    name = getattr(key, "key", None)
    if type(name) not in (str, int):
        raise CheckpointError(
            f"{jax.tree_util.keystr(tuple(keys))}: a checkpoint's keys are strings or "
            f"integers, not {type(name).__name__}"
        )
    return {"index": name} if isinstance(key, jax.tree_util.FlattenedIndexKey) else name


def _describe(x: Any, keys: Sequence[Any]) -> tuple[Record, Any]:
    if x is None or isinstance(x, Mapping):
        return {"kind": "none" if x is None else "empty"}, None
    if type(x) in (bool, int, float):
        return {"kind": "python", "value": x}, None
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        impl, data = str(jax.random.key_impl(x)), jax.random.key_data(x)
        return {"kind": "key", "impl": impl, "type": str(x.dtype), **_shape(data)}, data
    if isinstance(x, jax.Array):
        return {"kind": "jax", **_shape(x)}, x
    if isinstance(x, (np.ndarray, np.generic)) and _numeric(x.dtype):
        kind = "scalar" if isinstance(x, np.generic) else "numpy"
        return {"kind": kind, **_shape(x)}, np.asarray(x)
    raise CheckpointError(
        f"{jax.tree_util.keystr(tuple(keys))}: a {type(x).__name__} can't be kept in a "
        "checkpoint; leaves are arrays and numbers"
    )


def _shape(x: Any) -> Record:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _known(dtype: str) -> bool:
    try:
        return _numeric(jnp.dtype(dtype))
    except TypeError:
        return False


def _numeric(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, np.number) or dtype.kind == "b"


def _check_like(path: str, record: Record, like: Any) -> None:
    kind = record.get("type", "")  # of PRNG keys
    if record["kind"] in SCALARS or type(like) in (bool, int, float):
        saved, wanted = str(record.get("shape", [])), str(list(np.shape(like)))
    elif jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, like)
        saved = f"{record['dtype']}{record['shape']} {kind}".rstrip()
        wanted = f"{data.dtype}{list(data.shape)} {like.dtype}"
    else:
        saved = f"{record['dtype']}{record['shape']} {kind}".rstrip()
        wanted = f"{like.dtype}{list(like.shape)}"
    if saved != wanted:
        raise CheckpointError(f"{path}: saved is {saved}, the template has {wanted}")
