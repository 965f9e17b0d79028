# SPDX-License-Identifier: Apache-2.0
"""What products answer, their biases, and the ReLU behind them, off the program.

Between a product and its ReLU there may be what is affine channel by channel and does
not depend on the input: a bias, batch norm with its running statistics, a scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    """What a value is: 'leaf', a variable; 'free' of the input; 'made' by a product.

    Or a 'line', a variable of one axis that lies along one of more.
    """

    kind: str
    number: int = -1  # of the variable, or of the product's kernel
    axis: int = -1  # of a vector, where it lies; of a product, that of its channels
    straight: bool = False  # a product to which nothing was done, and which one reads


_FREE = _Tag("free")
_Tags = Sequence[_Tag | None]


class _Found(NamedTuple):
    products: dict[int, tuple[jx.Eqn, Any]]
    before: dict[int, Any]
    shared: set[int]
    # How many products a kernel has; (kernel, bias): to how many it is added; how often
    # a variable is used.
    counts: Counter[int]
    added: Counter[tuple[int, int]]
    ends: Counter[int]


def behind(
    f: Apply, look: Callable[[Answers], Any]
) -> Callable[..., tuple[Any, dict[Path, Any]]]:
    """g(variables, *inputs) -> (f(variables, *inputs), {path: look(answers)}).

    Of kernels that one product reads, as `taps` shows them; a look of None is left out.
    """

    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        out, paths, values, found = _walked(f, variables, inputs, kwargs)
        seen = {}
        for number, (eqn, answers) in found.products.items():
            before = None if number in found.shared else found.before.get(number)
            seen[paths[number]] = look(Answers(paths[number], eqn, answers, before))
        seen = {path: x for path, x in seen.items() if x is not None}
        return jax.tree.unflatten(jax.tree.structure(out), values), seen

    return run


def biases(
    f: Apply, variables: PyTree, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[Path, Path]:
    """{kernel: its bias}: the leaf beside it that its products are added to, directly.

    A vector along the channels that the kernel makes, used for nothing else, whatever
    its name. Where there is a norm, or a scale, in between, it is none.
    """
    added: dict[Path, Path] = {}

    def run(tree: PyTree, args: Sequence[Any]) -> None:
        _, paths, _, found = _walked(f, tree, args, kwargs)
        for (kernel, bias), times in found.added.items():
            alone = times == found.counts[kernel] == found.ends[bias]
            if alone and paths[kernel][:-1] == paths[bias][:-1]:
                added[paths[kernel]] = paths[bias]

    jax.eval_shape(run, variables, inputs)
    return added


def _walked(
    f: Apply, variables: PyTree, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[PyTree, list[Path], list[Any], _Found]:
    """(f's outputs' tree, the variables' paths, the outputs, what was found)."""
    program, out, paths, values = opened(f, variables, inputs, kwargs)
    found = _Found({}, {}, set(), Counter(), Counter(), Counter())
    vectors = [x.ndim == 1 for x in values[: len(paths)]]
    tags = [_Tag("leaf", i, 0 if v else -1) for i, v in enumerate(vectors)]
    given = [None] * (len(values) - len(paths))
    values, _ = _walk(program, values, [*tags, *given], found)
    return out, paths, values, found


def _walk(
    program: jx.Program, args: Sequence[Any], tags: _Tags, found: _Found
) -> tuple[list[Any], list[_Tag | None]]:
    """The program's outputs and what they are; products are noted in `found`."""
    env, read = program.begun(args)
    known: dict[Any, _Tag | None] = {var: _FREE for var in program.constvars}
    uses = program.uses()

    def note(variables: Sequence[Any], tags: _Tags) -> None:
        for var, t in zip(variables, tags, strict=True):
            if t and t.kind == "made" and uses[var] > 1:
                found.shared.add(t.number)
                t = t._replace(straight=False)
            known[var] = t

    def tag(atom: Any) -> _Tag | None:
        return _FREE if jx.is_literal(atom) else known[atom]

    note(program.invars, tags)
    for eqn in program.eqns:
        values, here = [list(map(g, eqn.invars)) for g in (read, tag)]
        name = eqn.primitive.name
        if name in CALLS | DERIVED and any(t and t.kind != "free" for t in here):
            outs, of = _walk(jx.called(eqn), values, here, found)
        else:
            outs = jx.bind(eqn, *values)
            of = [_after(eqn, values, outs, here, found)] * len(outs)
        note(eqn.outvars, of)
        env.update(zip(eqn.outvars, outs, strict=True))
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
        found.counts[number] += 1
        return _Tag("made", number, _channels(eqn, tags), True)
    first = tags[0]
    turned = name == "transpose" and first is not None and first.kind == "leaf"
    if turned or name == "convert_element_type":
        return first
    line = _line(eqn, first) if len(tags) == 1 else None
    if line is not None:
        return line
    found.ends.update(t.number for t in tags if t and t.kind in ("leaf", "line"))
    if all(t and t.kind != "made" for t in tags):
        return _FREE
    made = [i for i, t in enumerate(tags) if t and t.kind == "made"]
    if len(made) != 1 or not all(tags):
        return None
    tag = tags[made[0]]
    if tag is not None and name in _AFFINE and (name != "div" or made == [0]):
        beside = tags[1 - made[0]]
        plain = tag.straight and tag.axis >= 0 and name in ("add", "add_any")
        if plain and beside is not None and beside.kind in ("leaf", "line"):
            if beside.axis == tag.axis:
                found.added[tag.number, beside.number] += 1
        return tag._replace(straight=False)
    if name == "max" and tag is not None:
        floor = eqn.invars[1 - made[0]]
        if jx.is_literal(floor) and jx.scalar(floor.val) == 0:
            found.before[tag.number] = values[made[0]]
    return None


def _channels(eqn: jx.Eqn, tags: _Tags) -> int:
    """The axis of a product's outputs that its kernel makes; -1 where it makes more."""
    if eqn.primitive.name != "dot_general":
        return int(eqn.params["dimension_numbers"].out_spec[1])
    k = next(i for i, t in enumerate(tags) if t and t.kind == "leaf")
    summed = eqn.params["dimension_numbers"][0][k]
    if eqn.invars[k].aval.ndim - len(summed) != 1:
        return -1
    return 0 if k == 0 else eqn.outvars[0].aval.ndim - 1


def _line(eqn: jx.Eqn, tag: _Tag | None) -> _Tag | None:
    """The tag of a vector that is laid along an axis, without being repeated there."""
    name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if tag is None or tag.kind not in ("leaf", "line") or tag.axis < 0:
        return None
    if name not in ("reshape", "broadcast_in_dim"):
        return None
    length = eqn.invars[0].aval.shape[tag.axis]
    if name == "broadcast_in_dim":
        axis = eqn.params["broadcast_dimensions"][tag.axis]
    else:  # of a single number, any axis would do: that of flax's layers
        alone = [a for a, n in enumerate(shape) if n != 1] or [len(shape) - 1]
        axis = alone[0] if len(alone) == 1 else -1
    if axis == -1 or shape[axis] != length:
        return None
    return _Tag("line", tag.number, axis)
