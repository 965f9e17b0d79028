# SPDX-License-Identifier: Apache-2.0
"""Notation, types and errors that every other file speaks in.

Letters used in shapes throughout: `G` channel groups, `C` channels of a group, `B`
batch, `H`, `W` height and width; kernels are `[kh, kw, in, out]`, images `[B, H, W,
3]`, labels `[B, H, W]`. A *keep* is `{group name: bool[C]}`, True = stays; *scores* and
*gates* are `{group name: float[C]}`. All are plain dicts, so they are pytrees.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

PyTree = Any
Apply = Callable[..., Any]
Keep = Mapping[str, Any]
Scores = Mapping[str, Any]
Path = tuple[str, ...]
Role = Literal["out", "in"]
BOTH: tuple[Role, ...] = ("out", "in")

# Causes of freezing that any network has.
INPUT = "the network's input"
OUTPUT = "the network's output"
SINGLE = "a single channel"
WINDOW = "a convolution's window"
UNREAD = "nothing reads it"
# Those at its edges: they tell nothing of its inside, and are not shown to people.
EDGES = (INPUT, OUTPUT, WINDOW)


class JaxpruneError(Exception):
    """Base of every error that jaxprune raises on purpose."""


class GraphError(JaxpruneError, ValueError):
    """A graph, keep or tree does not fit another one."""


class BudgetError(JaxpruneError, ValueError):
    """A budget is malformed, or no selection of channels can meet it."""


class ConfigError(JaxpruneError, ValueError):
    """A field of a config is unknown, mistyped or out of range."""


class DataError(JaxpruneError, ValueError):
    """An image, a mask or a folder is missing, damaged or does not fit."""


class CheckpointError(JaxpruneError, ValueError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class DiskError(JaxpruneError, OSError):
    """The disk refuses a file: it is full, read-only or broken."""


class PeerError(JaxpruneError, RuntimeError):
    """Another process of the same run is lost."""


class NonFinite(JaxpruneError, FloatingPointError):
    """The loss or its gradient is not a number any more, at `step` of a training."""

    step = 0


def check_roles(roles: Any) -> None:
    """Raise ConfigError for anything but one or both roles, such as a bare 'in'."""
    known = isinstance(roles, tuple | list) and 0 < len(roles)
    if not known or any(role not in BOTH for role in roles):
        raise ConfigError(f"roles={roles!r}: ('out',), ('in',) or ('out', 'in')")


def check_separate(batches: Any, what: str = "batches") -> None:
    """Raise DataError for one array, dict, or (images, labels), to be taken apart."""
    name = what.split()[-1]
    if isinstance(batches, Mapping):
        raise DataError(f"{what} is one dict; of a single batch, it is [{name}]")
    if hasattr(batches, "ndim"):
        raise DataError(
            f"{what} is one array; of a single batch it is [{name}], or list({name}) "
            "of an array whose first axis is that of the batches"
        )
    if isinstance(batches, tuple | list):
        ranks = [getattr(x, "ndim", None) for x in batches]
        if len(set(ranks)) > 1 and None not in ranks:
            raise DataError(
                f"{what} are arrays of {', '.join(map(str, ranks))} axes; of a single "
                f"batch of several arrays it is [{name}]"
            )


def check_function(apply: Any) -> None:
    """Raise GraphError for a Flax module where its function is asked for."""
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    if linen is not None and isinstance(apply, linen.Module):
        raise GraphError(
            f"apply is a linen module, {type(apply).__name__}; pass .apply"
        )
    if nnx is not None and isinstance(apply, nnx.Module):
        raise GraphError(
            f"apply is an nnx module, {type(apply).__name__}; pass its state and "
            "lambda state, *inputs: nnx.merge(graphdef, state)(*inputs), of "
            "graphdef, state = nnx.split(module)"
        )


def path_str(path: Path) -> str:
    """`('params', 'conv', 'kernel')` as `params/conv/kernel`."""
    return "/".join(path)


def key_path(keys: tuple[Any, ...]) -> Path:
    """JAX's key path as plain strings; wrappers of nnx variables leave no trace."""
    names = []
    for key in keys:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
        else:
            names.append(str(key))
    while names and names[-1] in ("value", "raw_value") and len(names) > 1:
        names.pop()
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the dense variables: key path, `shape`, `dtype`, whether trained."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    trained: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """Where a group lies in one axis of one leaf.

    `indices`: int[C, n], the n indices along `axis` that belong to each channel (n > 1
    where an axis was flattened into the channels, or one weight serves twice).
    `role`: 'in' where the axis is summed over by a convolution or matrix product (a
    consumer of the channel), else 'out'.
    """

    path: Path
    axis: int
    indices: np.ndarray
    role: Role = "out"

    def __post_init__(self) -> None:
        indices = np.array(self.indices, np.int64)
        indices.flags.writeable = False
        object.__setattr__(self, "indices", indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slot):
            return NotImplemented
        same = (self.path, self.axis, self.role) == (other.path, other.axis, other.role)
        return same and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.path, self.axis, self.role, self.indices.shape))

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrays come back writable; __post_init__ makes them read-only.
        return Slot, (self.path, self.axis, self.indices, self.role)


@dataclasses.dataclass(frozen=True)
class Group:
    """`size` = C channels, each of which can only be cut from all its `slots` at once.

    `exact`: cutting a channel computes what masking it does.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Frozen:
    """`count` indices of one axis of one leaf that cannot be cut, and the `cause`."""

    path: Path
    axis: int
    count: int
    cause: str


class Extent(NamedTuple):
    """The length of an axis, `fixed` + sum over groups of times * kept channels."""

    fixed: int
    groups: tuple[tuple[str, int], ...] = ()


class Term(NamedTuple):
    """One summand of a cost: `coefficient` * the product of the axes' lengths."""

    kind: Literal["flops", "activation_bytes"]
    coefficient: int
    extents: tuple[Extent, ...]
    name: str = ""


class Cost(NamedTuple):
    """What a network costs for the traced input.

    flops: 2 x multiply-adds of convolutions and matrix products, padding taps counted.
    params: trained scalars. activation_bytes: what those operations write (Dollar et
    al., 2021, "Fast and accurate model scaling").
    """

    flops: Any
    params: Any
    activation_bytes: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The channel groups of a network, as found by `jaxprune.trace`.

    `groups` are in order of first use; `frozen` lists what cannot be cut and why;
    `leaves` are the dense variables; `terms` are the network's costs as polynomials of
    the numbers of kept channels. Immutable, equal by value (and by the groups' order),
    and made of names and integers only: see `to_json`.
    """

    groups: Mapping[str, Group]
    frozen: tuple[Frozen, ...]
    leaves: tuple[Leaf, ...]
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return self is other or self._value() == other._value()

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._value())

    def _value(self) -> tuple[Any, ...]:
        return tuple(self.groups.items()), self.frozen, self.leaves, self.terms

    def __reduce__(self) -> tuple[Any, ...]:
        # A view of a dict cannot be pickled, and hashes of text differ by process.
        return Graph, (dict(self.groups), self.frozen, self.leaves, self.terms)

    @property
    def channels(self) -> int:
        """Prunable channels of all groups together."""
        return sum(g.size for g in self.groups.values())

    def full(self) -> dict[str, np.ndarray]:
        """The keep that keeps every channel."""
        return {n: np.ones(g.size, bool) for n, g in self.groups.items()}

    def to_json(self) -> str:
        """The graph as JSON text: names and integers, no code."""
        from jaxprune import graph_io

        return graph_io.graph_to_json(self)

    @staticmethod
    def from_json(text: str) -> Graph:
        """The inverse of `to_json`. Raises GraphError that names what is wrong."""
        from jaxprune import graph_io

        return graph_io.graph_from_json(text)

    def __str__(self) -> str:
        from jaxprune import graph_io

        return graph_io.graph_table(self)
