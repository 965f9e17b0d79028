# SPDX-License-Identifier: Apache-2.0
"""What convolutions and matrix products read while a network runs.

`taps` runs a function's own program equation by equation and shows each product of a
variable with features to a `look`. Programs that are called (jit, remat, functions with
derivatives of their own) are run in place; loops and branches are run unseen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.base import Apply, Path, PyTree, check_function, key_path
from jaxprune.trace import abstract_inputs, is_arraylike, struct

# Equations that call a program; and those that tell its derivative too.
CALLS = frozenset(
    ("jit", "pjit", "closed_call", "composite", "core_call")
    + ("remat", "remat2", "checkpoint")
)
DERIVED = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


class Reading(NamedTuple):
    """One product: the leaf at `path`, as it is or cast, is the `kernel` of `eqn`.

    Where the program transposes the leaf first, `eqn` is what it is without that.

    `matrix`, `kernel_of` and `rows` are not for depthwise kernels.
    """

    path: Path
    eqn: jx.Eqn
    features: Any
    kernel: Any
    first: bool = True  # whether the features are the first operand

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(axis of the kernel, axis of the features) that are summed over together."""
        p = self.eqn.params
        if self.eqn.primitive.name == "dot_general":
            features, kernel = p["dimension_numbers"][0][:: 1 if self.first else -1]
            return list(zip(kernel, features, strict=True))
        dims = p["dimension_numbers"]
        return [(dims.rhs_spec[1], dims.lhs_spec[1])]

    def matrix(self, kernel: Any) -> Any:
        """A kernel as [all that is read, made]; `rows` has the same order."""
        axes, inner = self.order
        shape = np.shape(kernel)
        read = math.prod(shape[a] for a in axes[:inner])
        return kernel.transpose(axes).reshape(read, -1)

    def kernel_of(self, matrix: Any) -> Any:
        """The inverse of `matrix`."""
        axes, _ = self.order
        shape = tuple(self.kernel.shape[a] for a in axes)
        return matrix.reshape(shape).transpose(np.argsort(axes))

    @property
    def order(self) -> tuple[tuple[int, ...], int]:
        """The kernel's axes in the order of `matrix`, and how many of them are read."""
        read = [k for k, _ in self.pairs]
        if self.eqn.primitive.name != "dot_general":
            to, of, *window = self.eqn.params["dimension_numbers"].rhs_spec
            return (*window, of, to), len(window) + 1
        made = [a for a in range(self.kernel.ndim) if a not in read]
        return (*read, *made), len(read)

    def rows(self, count: int | None = None, key: Any = None) -> jax.Array:
        """[n, read]: what makes the outputs at positions as of `drawn`, or at all.

        rows() @ matrix(kernel) are the outputs there. With the same key, of arrays of
        the same shape, positions are the same.
        """
        if self.eqn.primitive.name == "dot_general":
            summed = [f for _, f in self.pairs]
            x = jnp.moveaxis(self.features, summed, range(-len(summed), 0))
            read = math.prod(self.features.shape[a] for a in summed)
            x = x.reshape(-1, read)
            return x[drawn(len(x), count, key)]
        p = self.eqn.params
        dims = p["dimension_numbers"]
        batch, feature, *space = dims.lhs_spec
        x = self.features.transpose((batch, *space, feature))
        sides = zip(p["padding"], p["lhs_dilation"], strict=True)
        wide = [(low, high, dilation - 1) for (low, high), dilation in sides]
        zero = jnp.zeros((), x.dtype)
        x = jax.lax.pad(x, zero, [(0, 0, 0), *wide, (0, 0, 0)])
        out = self.eqn.outvars[0].aval.shape
        grid = (out[dims.out_spec[0]], *(out[a] for a in dims.out_spec[2:]))
        chosen = drawn(math.prod(grid), count, key)
        first, *corner = jnp.unravel_index(chosen, grid)
        ndim = len(space)
        index: list[Any] = [first.reshape(-1, *[1] * ndim)]
        for i, (at, stride) in enumerate(zip(corner, p["window_strides"], strict=True)):
            taps = self.kernel.shape[dims.rhs_spec[2 + i]]
            reach = jnp.arange(taps) * p["rhs_dilation"][i]
            place = (at * stride)[:, None] + reach
            index.append(place.reshape(-1, *[1] * i, taps, *[1] * (ndim - 1 - i)))
        return x[tuple(index)].reshape(len(chosen), -1)


def drawn(length: int, count: int | None, key: Any) -> jax.Array:
    """int[count], rising: one of each of `count` equal parts; all where there are less.

    So that none is drawn twice, and a batch's images are seen alike.
    """
    if count is None or count >= length:
        return jnp.arange(length)
    ends = np.arange(count + 1) * length // count
    return jnp.asarray(ends[:-1]) + jax.random.randint(key, (count,), 0, np.diff(ends))


def taps(
    f: Apply,
    look: Callable[[Reading], Any],
    *,
    depthwise: bool = False,
    elsewhere: set[Path] | None = None,
) -> Callable[..., tuple[Any, dict[Path, list[Any]]]]:
    """g(variables, *inputs) -> (f(variables, *inputs), {path: [look(reading), ...]}).

    In the order in which the program reads. A look of None is left out. Convolutions
    in groups (but with `depthwise` those of as many groups as channels), and products
    with an axis of batches, are not shown. elsewhere: gains the paths of variables that
    are used in any other way than is shown, too.
    """
    others: set[Path] = set() if elsewhere is None else elsewhere

    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        program, out, paths, values = opened(f, variables, inputs, kwargs)
        seen: dict[Path, list[Any]] = {}

        def show(number: int, eqn: jx.Eqn, *rest: Any) -> None:
            found = look(Reading(paths[number], eqn, *rest))
            if found is not None:
                seen.setdefault(paths[number], []).append(found)

        origins = [*range(len(paths)), *(None for _ in values[len(paths) :])]
        values = run_products(
            *(program, values, origins, show, CALLS | DERIVED, depthwise),
            lambda number: others.add(paths[number]),
        )
        return jax.tree.unflatten(jax.tree.structure(out), values), seen

    return run


def readings(
    f: Apply,
    variables: PyTree,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    depthwise: bool = False,
    elsewhere: set[Path] | None = None,
) -> list[Reading]:
    """Every product of a kernel that `taps` shows, shapes for its numbers."""
    found: list[Reading] = []

    def look(reading: Reading) -> None:
        features, kernel = struct(reading.features), struct(reading.kernel)
        found.append(reading._replace(features=features, kernel=kernel))

    tapped = taps(f, look, depthwise=depthwise, elsewhere=elsewhere)
    jax.eval_shape(lambda tree, args: tapped(tree, *args, **kwargs), variables, inputs)
    return found


def opened(
    f: Apply, variables: PyTree, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[jx.Program, PyTree, list[Path], list[Any]]:
    """f's program, its outputs' tree, the variables' paths, and what the program takes.

    The variables come first, then the arrays among the inputs.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(variables)
    program, out, given = program_of(f, jax.tree.map(struct, variables), inputs, kwargs)
    paths = [key_path(keys) for keys, _ in flat]
    return program, out, paths, [*(jnp.asarray(x) for _, x in flat), *given]


def program_of(
    f: Apply, template: PyTree, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[jx.Program, PyTree, list[Any]]:
    """f's program at the template's shapes, its outputs' tree, the arrays given."""
    check_function(f)
    treedef = jax.tree.structure(template)
    abstract, rebuild = abstract_inputs((tuple(inputs), dict(kwargs)))
    given = [x for x in jax.tree.leaves((inputs, kwargs)) if is_arraylike(x)]

    def plain(leaves: list[Any], arrays: list[Any]) -> Any:
        args, more = rebuild(arrays)
        return f(jax.tree.unflatten(treedef, leaves), *args, **more)

    program, out = jx.trace(plain, jax.tree.leaves(template), abstract)
    return program, out, given


def run_products(
    program: jx.Program,
    args: Sequence[Any],
    origins: Sequence[int | None],
    product: Callable[..., list[Any] | None],
    calls: Collection[str] = CALLS,
    depthwise: bool = False,
    elsewhere: Callable[[int], None] = lambda number: None,
) -> list[Any]:
    """The program's outputs.

    origins: the number of each input that is a variable, which may be a function that
    makes it, called where the array itself is needed. At a product of one of them with
    features, product(number, eqn, features, kernel, whether the features come first)
    gives the outputs, or None for the usual ones. A kernel that was transposed is shown
    as it was, and the equation as it is for that. Of the equations that call a program,
    `calls` that take a variable are run in place. depthwise: as of `is_shown`.
    elsewhere: called with the number of a variable at each other use of it.
    """
    given = [
        None if number is None else _Origin(number, var, x, tuple(range(_ndim(var))))
        for number, var, x in zip(origins, program.invars, args, strict=True)
    ]
    return _run(program, args, given, product, calls, depthwise, elsewhere)[0]


class _Origin(NamedTuple):
    """A value that is variable `number`: `value`, of `var`, its axes in this order."""

    number: int
    var: Any
    value: Any
    order: tuple[int, ...]

    @property
    def whole(self) -> bool:
        return self.order == tuple(range(len(self.order)))


def _run(
    program: jx.Program,
    args: Sequence[Any],
    origins: Sequence[_Origin | None],
    product: Callable[..., list[Any] | None],
    calls: Collection[str],
    depthwise: bool,
    elsewhere: Callable[[int], None],
) -> tuple[list[Any], list[_Origin | None]]:
    """The program's outputs, and what variable each of them is."""
    env, read = program.begun(args)
    leaf = dict(zip(program.invars, origins, strict=True))

    def origin(atom: Any) -> _Origin | None:
        return None if jx.is_literal(atom) else leaf.get(atom)

    for eqn in program.eqns:
        name = eqn.primitive.name
        values, here = [list(map(g, eqn.invars)) for g in (read, origin)]
        of: list[_Origin | None] = [None] * len(eqn.outvars)
        outs = None
        if name in calls and any(here):
            outs, of = _run(
                jx.called(eqn), values, here, product, calls, depthwise, elsewhere
            )
        elif name in ("convert_element_type", "transpose") and (own := here[0]):
            make = values[0]
            if callable(make):
                outs = [functools.partial(_made, eqn, make)]
            else:
                outs = jx.bind(eqn, make)
            if name == "transpose":
                order = tuple(own.order[a] for a in eqn.params["permutation"])
                of = [own._replace(order=order)]
            elif own.whole:
                of = [own._replace(var=eqn.outvars[0], value=outs[0])]
            else:
                elsewhere(own.number)
        elif (found := _shown(eqn, here, depthwise)) is not None:
            k, own, straight = found
            outs = product(own.number, straight, values[1 - k], own.value, k == 1)
        else:
            for own in filter(None, here):
                elsewhere(own.number)
        if outs is None:
            outs = jx.bind(eqn, *(v() if callable(v) else v for v in values))
        env.update(zip(eqn.outvars, outs, strict=True))
        leaf.update(zip(eqn.outvars, of, strict=True))
    return [read(a) for a in program.outvars], [origin(a) for a in program.outvars]


def _ndim(var: Any) -> int:
    return len(getattr(var.aval, "shape", ()))


def _shown(
    eqn: jx.Eqn, origins: Sequence[_Origin | None], depthwise: bool
) -> tuple[int, _Origin, jx.Eqn] | None:
    """(which operand is the kernel, it, the equation for it as it was), if shown."""
    if not is_shown(eqn, [o and o.number for o in origins], depthwise=depthwise):
        return None
    ((k, own),) = ((i, o) for i, o in enumerate(origins) if o is not None)
    if own.whole:
        return k, own, eqn
    params, order = dict(eqn.params), own.order
    dims = params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        summed, batch = dims
        made = [axis for i, axis in enumerate(order) if i not in summed[k]]
        if made != sorted(made):  # the outputs' axes would lie in another order
            return None
        mine = tuple(order[a] for a in summed[k])
        both = (mine, summed[1]) if k == 0 else (summed[0], mine)
        params["dimension_numbers"] = (both, batch)
    else:
        rhs = tuple(order[a] for a in dims.rhs_spec)
        params["dimension_numbers"] = dims._replace(rhs_spec=rhs)
    invars = list(eqn.invars)
    invars[k] = own.var
    return k, own, eqn.replace(invars=invars, params=params)


def _made(eqn: jx.Eqn, make: Callable[[], Any]) -> Any:
    return jx.bind(eqn, make())[0]


def is_shown(
    eqn: jx.Eqn, numbers: Sequence[int | None], *, depthwise: bool = False
) -> bool:
    """Whether exactly one operand is a variable, and the product is a plain one."""
    p = eqn.params
    if eqn.primitive.name == "conv_general_dilated":
        channels = eqn.invars[0].aval.shape[p["dimension_numbers"].lhs_spec[1]]
        groups = (1, channels) if depthwise else (1,)
        plain = p["feature_group_count"] in groups and p["batch_group_count"] == 1
        return numbers[0] is None and numbers[1] is not None and plain
    if eqn.primitive.name == "dot_general":
        (_, batch) = p["dimension_numbers"]
        return (numbers[0] is None) != (numbers[1] is None) and not any(batch)
    return False
