# SPDX-License-Identifier: Apache-2.0
"""Channel shuffles: a reshape, transposes and a reshape that only permute an axis.

Taken one by one the first of them splits the axis, which ties its channels. Taken as
one, each channel has one image, and is cut by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import jaxpr as jx

NAME = "shuffle"
OF = ("reshape", "transpose")


class _Primitive(NamedTuple):
    name: str


class Parts(NamedTuple):
    """How an axis is permuted: reshaped to `sizes`, transposed, flattened."""

    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def of(self, line: np.ndarray) -> np.ndarray:
        """The indices, or labels, of an axis, permuted."""
        return line.reshape(self.sizes).transpose(self.order).reshape(-1)


class Shuffle(NamedTuple):
    """Equations that are read as one, in the place of the last.

    axes: per axis of the output the one of the input that it is, -1 where new (of
    length 1). parts: by axis of the output, how that is permuted.
    """

    eqns: tuple[jx.Eqn, ...]
    axes: tuple[int, ...]
    parts: Mapping[int, Parts]

    @property
    def primitive(self) -> _Primitive:
        return _Primitive(NAME)

    @property
    def invars(self) -> Sequence[Any]:
        return self.eqns[0].invars

    @property
    def outvars(self) -> Sequence[Any]:
        return self.eqns[-1].outvars

    @property
    def params(self) -> Mapping[str, Any]:
        return {}

    @property
    def source_info(self) -> Any:
        return self.eqns[0].source_info


def with_shuffles(program: jx.Program) -> Sequence[jx.Eqn]:
    """The program's equations, those of each shuffle as one.

    Only where nothing else reads what lies between them.
    """
    makers: dict[Any, jx.Eqn] = {}
    found: dict[int, Shuffle] = {}
    for eqn in program.eqns:
        if eqn.primitive.name not in OF:
            continue
        makers[eqn.outvars[0]] = eqn
        shuffle = _ending_in(eqn, makers)
        if shuffle is not None and not any(id(e) in found for e in shuffle.eqns):
            found[id(eqn)] = shuffle
    if not found:
        return program.eqns
    uses = program.uses()
    hidden: set[int] = set()
    for last, shuffle in list(found.items()):
        inner = shuffle.eqns[:-1]
        if all(uses[eqn.outvars[0]] == 1 for eqn in inner):
            hidden.update(map(id, inner))
        else:
            del found[last]
    eqns = (eqn for eqn in program.eqns if id(eqn) not in hidden)
    return [found.get(id(eqn), eqn) for eqn in eqns]


def _ending_in(last: jx.Eqn, makers: Mapping[Any, jx.Eqn]) -> Shuffle | None:
    if not _is_plain(last):
        return None
    eqns, atom = [last], last.invars[0]
    order: Sequence[int] = range(len(atom.aval.shape))
    while not jx.is_literal(atom) and atom in makers:
        eqn = makers[atom]
        eqns.append(eqn)
        if eqn.primitive.name == "reshape":
            if len(eqns) == 2 or not _is_plain(eqn):
                return None
            return _shuffle(tuple(reversed(eqns)), order)
        order = [eqn.params["permutation"][a] for a in order]
        atom = eqn.invars[0]
    return None


def _is_plain(eqn: jx.Eqn) -> bool:
    """Whether it is a reshape of an array that lies on no mesh of explicit axes."""
    return (
        eqn.primitive.name == "reshape"
        and eqn.params["dimensions"] is None
        and eqn.params.get("sharding") is None
        and len(eqn.invars) == 1
        and not jx.is_literal(eqn.invars[0])
        and 0 not in eqn.invars[0].aval.shape
    )


def _shuffle(eqns: tuple[jx.Eqn, ...], order: Sequence[int]) -> Shuffle | None:
    """Where every axis of the output is one of the input, and one or more permuted."""
    old, new = eqns[0].invars[0].aval.shape, eqns[-1].outvars[0].aval.shape
    split = eqns[0].outvars[0].aval.shape
    origin = {}
    for olds, mids in blocks(old, split):
        if len(olds) > 1:
            return None
        origin.update({mid: (olds[0], mids) for mid in mids})
    axes, parts = [-1] * len(new), {}
    for places, news in blocks([split[a] for a in order], new):
        mine = [order[place] for place in places]
        axis, mids = origin[mine[0]]
        if len(news) > 1 or sorted(mine) != mids:
            return None
        axes[news[0]] = axis
        if mine != mids:
            sizes = tuple(split[a] for a in mids)
            parts[news[0]] = Parts(sizes, tuple(mids.index(a) for a in mine))
    return Shuffle(eqns, tuple(axes), parts) if parts else None


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of runs of axes, longer than 1, with the same product."""
    olds = [a for a, n in enumerate(old) if n != 1]
    news = [a for a, n in enumerate(new) if n != 1]
    found, i, j = [], 0, 0
    while i < len(olds) and j < len(news):
        left, right = [olds[i]], [news[j]]
        i, j = i + 1, j + 1
        while (a := math.prod(old[k] for k in left)) != (
            b := math.prod(new[k] for k in right)
        ):
            if a < b:
                left.append(olds[i])
                i += 1
            else:
                right.append(news[j])
                j += 1
        found.append((left, right))
    return found
