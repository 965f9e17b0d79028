# SPDX-License-Identifier: Apache-2.0
"""The two passes over a program: `analyse` labels it, `run` evaluates it when cut.

Behaviour per primitive lives in `rules/`; nothing here knows any of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.base import GraphError
from jaxprune.labels import Labels, Value, fixed
from jaxprune.shuffles import NAME, with_shuffles

Kept = tuple[np.ndarray | None, ...]
Axes = tuple[int, ...]
_MOST = 65536  # indices of one axis


class Node(NamedTuple):
    """One analysed equation; `aux` is what its rule wants to see again when it runs.

    For an equation that calls programs, their tape, or the tuple of their tapes.
    """

    eqn: jx.Eqn
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    aux: Any = None


class Tape(NamedTuple):
    """An analysed program at one call site: labels are per site, jaxprs are shared.

    exact: whether axes were frozen over which a sum tells cutting from masking.
    """

    program: jx.Program
    consts: tuple[Value, ...]
    nodes: tuple[Node, ...]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    exact: bool


class Rule(NamedTuple):
    """How one primitive is analysed and how it is run when cut.

    analyse(context, eqn, ins) -> the output Values, or (Values, aux).
    rewrite(cut) -> the outputs, for a `Cut` that holds the small operands.
    at_removed(cut, axes) -> what the masked network holds at the removed indices of
    these axes of the one output, as an array of length 1 along them. Needed of rules
    that call an axis even.
    fold(eqn, arrays) -> the one output of operands that are known NumPy arrays of
    integers or bools, or None: so that what is indexed by constants can be followed.
    """

    analyse: Callable[..., Any]
    rewrite: Callable[[Cut], list[Any]]
    at_removed: Callable[[Cut, Axes], Any] | None = None
    fold: Callable[[jx.Eqn, Sequence[np.ndarray]], np.ndarray | None] | None = None


@dataclasses.dataclass(frozen=True)
class Context:
    """What an analysis rule works with: the labels, and the way into sub-programs."""

    labels: Labels
    rules: Mapping[str, Rule]

    def walk(
        self, program: jx.Program, ins: Sequence[Value], in_place: bool = False
    ) -> Tape:
        """Analyse a sub-program; in_place: where `Cut.run_in_place` can run it.

        Of others it is not asked what removed indices hold, so no axis is called even.
        """
        if in_place:
            return analyse(self, program, ins)
        tape = analyse(self, program, [v._replace(even=()) for v in ins])
        return tape._replace(outs=tuple(v._replace(even=()) for v in tape.outs))


@dataclasses.dataclass(frozen=True)
class Cut:
    """One equation to run: small operands `args`, and the indices that are kept.

    kept(value) gives, per axis, the int indices that stay, or None for all of them.
    frame: the run that it is part of; None once taken out of it, by `parts`. at: the
    axes of the one output of which what removed indices hold is asked.
    """

    node: Node
    args: tuple[Any, ...]
    kept: Callable[[Value], Kept]
    rules: Mapping[str, Rule]
    frame: Frame | None = None
    at: Axes = ()

    @property
    def eqn(self) -> jx.Eqn:
        return self.node.eqn

    def kept_in(self, i: int) -> Kept:
        return self.kept(self.node.ins[i])

    def kept_out(self, i: int = 0) -> Kept:
        return self.kept(self.node.outs[i])

    def shape_out(self, i: int = 0) -> tuple[int, ...]:
        """The i-th output's shape once cut, 1 along the axes `at`."""
        dense = self.eqn.outvars[i].aval.shape
        small = [n if k is None else len(k) for n, k in zip(dense, self.kept_out(i))]
        return tuple(1 if a in self.at else n for a, n in enumerate(small))

    def at_removed(self, i: int, axes: Axes) -> Any:
        """Operand i at the removed indices of even axes: of length 1 along them."""
        if not axes or self.frame is None:
            return self.args[i]
        return self.frame.at_removed(self.eqn.invars[i], self.node.ins[i], axes)

    def parts(self) -> tuple[Cut, tuple[Any, ...]]:
        """The cut without its operands, and the operands."""
        return dataclasses.replace(self, args=(), frame=None), self.args

    def bind(self, *args: Any, **changed: Any) -> list[Any]:
        """The equation on other operands, laid over devices as far as they divide."""
        for name, value in self.eqn.params.items():
            if isinstance(value, jax.sharding.NamedSharding):
                changed[name] = jx.fitted(value, self.shape_out(), self.kept_out())
        return jx.bind(self.eqn, *(args or self.args), **changed)

    def run(self, tape: Tape, *args: Any) -> list[Any]:
        return run(tape, self.kept, self.rules, args)

    @property
    def even(self) -> bool:
        """Whether what removed indices hold may be asked across this call's border."""
        values = (*self.node.ins, *self.node.outs)
        return self.frame is not None and any(self._even(v) for v in values)

    def _even(self, value: Value) -> Axes:
        """The cut axes whose removed indices hold the same, which is not known."""
        return tuple(
            axis
            for axis, kept in enumerate(self.kept(value))
            if kept is not None and value.is_even(axis) and value.known(axis) is None
        )

    def run_in_place(self, tape: Tape) -> list[Any]:
        """The called program as a part of the run that called it."""
        frame = Frame(tape, self.kept, self.rules)
        for i, (var, value) in enumerate(zip(tape.program.invars, self.node.ins)):
            for axes in _subsets(self._even(value)):
                frame.removed[var, axes] = self.at_removed(i, axes)
        if self.frame is not None:
            self.frame.inner[id(self.node)] = frame
        return frame.run(self.args)


@dataclasses.dataclass(frozen=True)
class Frame:
    """One run of a program, `kept` and `rules` as in `Cut`.

    env: what its variables are by now. removed: what `at_removed` said of them. inner:
    the runs, by the id of their nodes, of the programs that it called in place.
    """

    tape: Tape
    kept: Callable[[Value], Kept]
    rules: Mapping[str, Rule]
    env: dict[Any, Any] = dataclasses.field(default_factory=dict)
    removed: dict[tuple[Any, Axes], Any] = dataclasses.field(default_factory=dict)
    inner: dict[int, Frame] = dataclasses.field(default_factory=dict)

    def run(self, args: Sequence[Any]) -> list[Any]:
        program = self.tape.program
        self.env.update(zip(program.invars, args))
        for var, const, value in zip(
            program.constvars, program.consts, self.tape.consts
        ):
            self.env[var] = take(const, self.kept(value))
        for node in self.tape.nodes:
            outs = self._bind(self.cut(node))
            self.env.update(zip(node.eqn.outvars, outs))
        return list(map(self.read, program.outvars, self.tape.outs))

    def _bind(self, cut: Cut) -> list[Any]:
        node = cut.node
        untouched = all(
            k is None for value in (*node.ins, *node.outs) for k in self.kept(value)
        )
        plain = node.eqn.primitive.name != NAME
        if plain and untouched and not _cut_inside(node, self.kept):
            return jx.bind(node.eqn, *cut.args)
        return self.rules[node.eqn.primitive.name].rewrite(cut)

    def read(self, atom: Any, value: Value) -> Any:
        if jx.is_literal(atom):
            return take(atom.val, self.kept(value))
        return self.env[atom]

    def cut(self, node: Node) -> Cut:
        args = tuple(map(self.read, node.eqn.invars, node.ins))
        return Cut(node, args, self.kept, self.rules, self)

    def at_removed(self, atom: Any, value: Value, axes: Axes) -> Any:
        """What the masked network holds at the removed indices of even axes."""
        axes = tuple(sorted(axes))  # `run_in_place` knows choices of axes by this order
        if (atom, axes) not in self.removed:
            self.removed[atom, axes] = self._at_removed(atom, value, axes)
        return self.removed[atom, axes]

    def _at_removed(self, atom: Any, value: Value, axes: Axes) -> Any:
        number = next((n for n in map(value.known, axes) if n is not None), None)
        if number is not None:
            x = self.read(atom, value)
            shape = [1 if a in axes else n for a, n in enumerate(np.shape(x))]
            return jx.laid_like(jax.lax.full_like(x, number, shape=shape), x, axes)
        node = self._makers[atom]
        if (inner := self.inner.get(id(node))) is not None:
            i = node.eqn.outvars.index(atom)
            return inner.at_removed(
                inner.tape.program.outvars[i], inner.tape.outs[i], axes
            )
        at_removed = self.rules[node.eqn.primitive.name].at_removed
        if at_removed is None:
            raise GraphError(f"the rule of {jx.Site(node.eqn)} lacks `at_removed`")
        return at_removed(dataclasses.replace(self.cut(node), at=axes), axes)

    @functools.cached_property
    def _makers(self) -> dict[Any, Node]:
        return {var: node for node in self.tape.nodes for var in node.eqn.outvars}


def rebind(cut: Cut) -> list[Any]:
    """The rewrite of equations that are themselves on small operands."""
    return cut.bind()


def analyse(context: Context, program: jx.Program, ins: Sequence[Value]) -> Tape:
    """Label a program, given the labels of its inputs."""
    labels = context.labels
    ins = [_of_shape(value, var.aval) for value, var in zip(ins, program.invars)]
    env: dict[Any, Value] = dict(zip(program.invars, ins))
    consts = tuple(const_value(labels, c) for c in program.consts)
    env.update(zip(program.constvars, consts))

    def read(atom: Any) -> Value:
        return const_value(labels, atom.val) if jx.is_literal(atom) else env[atom]

    nodes = []
    eqns = with_shuffles(program) if NAME in context.rules else program.eqns
    for eqn in eqns:
        values = tuple(read(atom) for atom in eqn.invars)
        rule = context.rules.get(eqn.primitive.name)
        if rule is None:
            outs, aux = freeze_all(context, eqn, values), None
        else:
            if not has_jaxpr(eqn):
                _note_use(labels, values)
            result = rule.analyse(context, eqn, values)
            outs, aux = result if isinstance(result, tuple) else (result, None)
            outs = _folded(rule, eqn, values, outs)
        nodes.append(Node(eqn, values, tuple(outs), aux))
        env.update(zip(eqn.outvars, outs))
    ends = tuple(read(atom) for atom in program.outvars)
    return Tape(program, consts, tuple(nodes), tuple(ins), ends, labels.exact)


def _of_shape(value: Value, aval: Any) -> Value:
    """Without its array, where a called program is given only parts of that."""
    whole = value.array is None or value.array.shape == aval.shape
    return value if whole else value._replace(array=None)


def _folded(
    rule: Rule, eqn: jx.Eqn, ins: Sequence[Value], outs: Sequence[Value]
) -> list[Value]:
    """The outputs with the arrays that they are, of known operands."""
    if has_jaxpr(eqn):
        return [_of_shape(v, var.aval) for v, var in zip(outs, eqn.outvars)]
    arrays = [v.array for v in ins if v.array is not None]
    outs = [v if v.array is None else v._replace(array=None) for v in outs]
    if rule.fold is not None and len(arrays) == len(ins) and _is_small(eqn.outvars[0]):
        outs[0] = outs[0]._replace(array=rule.fold(eqn, arrays))
    return list(outs)


def _is_small(var: Any) -> bool:
    """Whether an array may be one of indices, and not a table of something else."""
    size = math.prod(n if isinstance(n, int) else _MOST + 1 for n in var.aval.shape)
    return jx.is_array(var.aval) and var.aval.dtype.kind in "iub" and size <= _MOST


def run(
    tape: Tape,
    kept: Callable[[Value], Kept],
    rules: Mapping[str, Rule],
    args: Sequence[Any],
) -> list[Any]:
    """Evaluate an analysed program on small inputs."""
    return Frame(tape, kept, rules).run(args)


def _cut_inside(node: Node, kept: Callable[[Value], Kept]) -> bool:
    """Whether a sub-program of this equation is cut although its ends are not."""
    aux = node.aux if type(node.aux) is tuple else (node.aux,)
    tapes = [tape for tape in aux if isinstance(tape, Tape)]
    nodes = [n for tape in tapes for n in tape.nodes]
    values = [v for tape in tapes for v in (*tape.ins, *tape.consts)]
    values += [v for n in nodes for v in (*n.ins, *n.outs)]
    return any(k is not None for v in values for k in kept(v)) or any(
        _cut_inside(n, kept) for n in nodes
    )


def _subsets(axes: Axes) -> list[Axes]:
    """All choices of one axis or more."""
    sizes = range(1, len(axes) + 1)
    return [c for size in sizes for c in itertools.combinations(axes, size)]


def take(x: Any, kept: Kept) -> Any:
    """x at the kept indices of every axis."""
    for axis, indices in enumerate(kept):
        if indices is not None:
            x = pick(x, axis, indices)
    return x


def pick(x: Any, axis: int, indices: np.ndarray) -> Any:
    """x at static indices of one axis: a slice where they are evenly spaced."""
    steps = np.diff(indices)
    if len(indices) and (steps > 0).all() and (steps == steps[:1]).all():
        step = int(steps[0]) if len(steps) else 1
        start, limit = int(indices[0]), int(indices[-1]) + 1
        if start == 0 and limit == x.shape[axis] and step == 1:
            return x
        return jax.lax.slice_in_dim(x, start, limit, step, axis)
    return jax.numpy.take(x, indices, axis=axis)


def const_value(labels: Labels, x: Any) -> Value:
    """A literal or a closed-over constant: cut like a variable, but not masked."""
    shape = np.shape(x)
    if not jx.is_array(x) and shape:
        return fixed(len(shape))
    axes = tuple(labels.fresh_constant(n) for n in shape)
    fill = None if jx.is_finite(x) else math.nan
    const, array = None if shape else jx.scalar(x), jx.whole_array(x, _MOST)
    return Value(axes, (fill,) * len(shape), const, array=array)


def freeze_all(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """What happens at a primitive without a rule: nothing that it touches is cut."""
    _note_use(context.labels, ins)
    cause = jx.Site(eqn)
    for value in ins:
        for axis in value.labels:
            context.labels.freeze(axis, cause)
    return [fixed(len(getattr(v.aval, "shape", ()))) for v in eqn.outvars]


def has_jaxpr(eqn: jx.Eqn) -> bool:
    """Whether an equation calls a program; its variables are used inside, not by it.

    A scatter's `update_jaxpr` only says how two numbers are combined.
    """
    calls = ("jaxpr" in name and name != "update_jaxpr" for name in eqn.params)
    return any(calls) or "branches" in eqn.params


def _note_use(labels: Labels, values: Sequence[Value]) -> None:
    for value in values:
        if value.leaf is not None and value.leaf >= 0:
            labels.first_use.setdefault(value.leaf, len(labels.first_use))
