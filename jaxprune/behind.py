# SPDX-License-Identifier: Apache-2.0
"""What products answer, and the ReLU behind them, read off the running program.

Between a product and its ReLU there may be what is affine channel by channel and does
not depend on the input: a bias, batch norm with its running statistics, a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune import jaxpr as jx
from jaxprune.base import Apply, Path, PyTree
from jaxprune.taps import CALLS, DERIVED, is_shown, opened

_AFFINE = ("add", "add_any", "sub", "mul", "div")


class Answers(NamedTuple):
    """One product: what it answers, and what a ReLU is given in its place.

    before: None where something else, or something more, reads the answers.
    """

    path: Path
    eqn: jx.Eqn
    answers: Any
    before: Any

    def rows(self, x: Any) -> Any:
        """`answers` or `before` as [n, out]."""
        axis = x.ndim - 1
        if self.eqn.primitive.name != "dot_general":
            axis = self.eqn.params["dimension_numbers"].out_spec[1]
        return jax.numpy.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])


class _Tag(NamedTuple):
    """What a value is: 'leaf', a variable; 'free' of the input; 'made' by a product."""

    kind: str
    number: int = -1  # of the variable, or of the product's kernel


_FREE = _Tag("free")
_Tags = Sequence[_Tag | None]


class _Found(NamedTuple):
    products: dict[int, tuple[jx.Eqn, Any]]
    before: dict[int, Any]
    shared: set[int]


def behind(
    f: Apply, look: Callable[[Answers], Any]
) -> Callable[..., tuple[Any, dict[Path, Any]]]:
    """g(variables, *inputs) -> (f(variables, *inputs), {path: look(answers)}).

    Of kernels that one product reads, as `taps` shows them; a look of None is left out.
    """

    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        program, out, paths, values = opened(f, variables, inputs, kwargs)
        tags = [_Tag("leaf", i) for i in range(len(paths))]
        found = _Found({}, {}, set())
        given = [None] * (len(values) - len(paths))
        values, _ = _walk(program, values, [*tags, *given], found)
        seen = {}
        for number, (eqn, answers) in found.products.items():
            before = None if number in found.shared else found.before.get(number)
            seen[paths[number]] = look(Answers(paths[number], eqn, answers, before))
        seen = {path: x for path, x in seen.items() if x is not None}
        return jax.tree.unflatten(jax.tree.structure(out), values), seen

    return run


def _walk(
    program: jx.Program, args: Sequence[Any], tags: _Tags, found: _Found
) -> tuple[list[Any], list[_Tag | None]]:
    """The program's outputs and what they are; products are noted in `found`."""
    env, read = program.begun(args)
    known: dict[Any, _Tag | None] = dict(zip(program.invars, tags, strict=True))
    known.update((var, _FREE) for var in program.constvars)
    uses = program.uses()

    def note_shared(variables: Sequence[Any], tags: _Tags) -> None:
        for var, t in zip(variables, tags, strict=True):
            if t and t.kind == "made" and uses[var] > 1:
                found.shared.add(t.number)

    def tag(atom: Any) -> _Tag | None:
        return _FREE if jx.is_literal(atom) else known[atom]

    note_shared(program.invars, tags)
    for eqn in program.eqns:
        values, here = [list(map(g, eqn.invars)) for g in (read, tag)]
        name = eqn.primitive.name
        if name in CALLS | DERIVED and any(t and t.kind != "free" for t in here):
            outs, of = _walk(jx.called(eqn), values, here, found)
        else:
            outs = jx.bind(eqn, *values)
            of = [_after(eqn, values, outs, here, found)] * len(outs)
        note_shared(eqn.outvars, of)
        env.update(zip(eqn.outvars, outs, strict=True))
        known.update(zip(eqn.outvars, of, strict=True))
    return [read(a) for a in program.outvars], [tag(a) for a in program.outvars]


def _after(
    eqn: jx.Eqn, values: Sequence[Any], outs: Sequence[Any], tags: _Tags, found: _Found
) -> _Tag | None:
    """What an equation's outputs are, given what its operands are."""
    name = eqn.primitive.name
    if is_shown(eqn, [t.number if t and t.kind == "leaf" else None for t in tags]):
        (number,) = (t.number for t in tags if t and t.kind == "leaf")
        if number in found.products:  # a kernel that serves twice
            found.shared.add(number)
        found.products[number] = eqn, outs[0]
        return _Tag("made", number)
    if all(t and t.kind != "made" for t in tags):
        cast = name == "convert_element_type"
        return tags[0] if cast else _FREE
    made = [i for i, t in enumerate(tags) if t and t.kind == "made"]
    if len(made) != 1 or not all(tags):
        return None
    tag = tags[made[0]]
    if name == "convert_element_type" or (
        name in _AFFINE and (name != "div" or made == [0])
    ):
        return tag
    if name == "max" and tag is not None:
        floor = eqn.invars[1 - made[0]]
        if jx.is_literal(floor) and jx.scalar(floor.val) == 0:
            found.before[tag.number] = values[made[0]]
    return None
