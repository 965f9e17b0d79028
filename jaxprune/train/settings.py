# SPDX-License-Identifier: Apache-2.0
"""Overrides of nested frozen dataclasses, typed by their fields' annotations."""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from jaxprune.base import ConfigError, JaxpruneError

_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def override(config: Any, text: str) -> Any:
    """The config with one field changed by `a.b=value`; ConfigError where it can't be.

    Numbers and words are written as they are, tuples as 120,160 or 120x160, None as
    none.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r}: write FIELD=VALUE, such as prune.ratio=0.3")
    return _replace(config, name.strip().split("."), value.strip(), "")


def get(config: Any, name: str) -> Any:
    """The value of a field, 'a.b'."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def check_types(config: Any, where: str = "") -> None:
    """Raise ConfigError that names the first field whose value is not of its type."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, full = getattr(config, name), f"{where}{name}"
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):  # type: ignore[arg-type]
                raise ConfigError(f"{full} = {value!r}: must be a {_words(hint)}")
            check_types(value, f"{full}.")
        elif not _fits(value, hint):
            raise ConfigError(f"{full} = {value!r}: must be {_words(hint)}")


def from_dict(kind: Any, record: Any) -> Any:
    """A nested dataclass of what `dataclasses.asdict` and JSON made of it.

    Raises ConfigError for what is no such record, or has a field that `kind` lacks.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(record, Mapping):
        raise ConfigError(f"{record!r} is no {kind.__name__}")
    values = {}
    for name, value in record.items():
        if name not in hints:
            raise ConfigError(unknown(name, kind, kind.__name__))
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def flatten(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested dicts as one, {'a.b': value}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{where}{name}."))
        else:
            flat[f"{where}{name}"] = value
    return flat


def unknown(name: str, kind: Any, where: str) -> str:
    """The message for a field that `kind` lacks, with the nearest that it has."""
    names = [f.name for f in dataclasses.fields(kind)]
    near = difflib.get_close_matches(name, names, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
    return f"{where or 'the config'} has no field {name!r}; {hint}"


def _replace(config: Any, path: list[str], text: str, where: str) -> Any:
    name, rest = path[0], path[1:]
    full = f"{where}{name}"
    hints = typing.get_type_hints(type(config))
    if name not in hints:
        raise ConfigError(unknown(name, type(config), where.rstrip(".")))
    hint = hints[name]
    if dataclasses.is_dataclass(hint):
        if not rest:
            fields = ", ".join(f.name for f in dataclasses.fields(hint))
            raise ConfigError(f"{full} has fields of its own: {full}.({fields})")
        value = _replace(getattr(config, name), rest, text, f"{full}.")
    elif rest:
        raise ConfigError(f"{full} has no field {rest[0]!r}; it is {_words(hint)}")
    else:
        value = _read(text, hint, full)
    try:
        return dataclasses.replace(config, **{name: value})
    except JaxpruneError as error:
        raise ConfigError(f"{full} = {text}: {error}") from error


def _read(text: str, hint: Any, name: str) -> Any:
    try:
        return _parse(text, hint)
    except ValueError:
        raise ConfigError(f"{name} = {text}: must be {_words(hint)}") from None


def _parse(text: str, hint: Any) -> Any:
    """`text` as a value of the annotated type; ValueError where it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() in ("none", ""):
            return None
        return _parse_any(text, [a for a in args if a is not type(None)])
    if origin is typing.Literal:
        if text not in args:
            raise ValueError
        return text
    if origin is tuple:
        return _parse_tuple(text, args)
    if hint is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError
        return text.lower() in _TRUE
    return hint(text)


def _parse_any(text: str, hints: list[Any]) -> Any:
    """As the first of these types that it is a value of."""
    for hint in hints[:-1]:
        with contextlib.suppress(ValueError):
            return _parse(text, hint)
    return _parse(text, hints[-1])


def _parse_tuple(text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    bare = text.strip("()[] ")
    parts = [p for p in bare.split("," if "," in bare else "x") if p.strip()]
    kinds = args[:1] * len(parts) if args[-1] is Ellipsis else args
    if len(kinds) != len(parts):
        raise ValueError
    return tuple(_parse(p.strip(), k) for p, k in zip(parts, kinds, strict=True))


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _words(hint: Any) -> str:
    """An annotation in words, for messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(a) for a in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return "numbers, as 16,32"
        return f"{len(args)} numbers, as {'x'.join('120' for _ in args)}"
    known = {int: "a whole number", float: "a finite number", bool: "true or false"}
    known |= {str: "a text", type(None): "none"}
    return known.get(hint, getattr(hint, "__name__", str(hint)))
