# SPDX-License-Identifier: Apache-2.0
"""Reading jaxprs: the only file that touches `jax.extend`.

Jaxprs are read here and re-run equation by equation; none is ever built by hand.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import numpy as np

Eqn = Any  # jax.extend.core.JaxprEqn, whose avals are typed too widely to be of use


_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)


class Program(NamedTuple):
    """A jaxpr with its constants: `eqns` compute `outvars` from `invars`."""

    invars: Sequence[Any]
    constvars: Sequence[Any]
    consts: Sequence[Any]
    eqns: Sequence[Eqn]
    outvars: Sequence[Any]

    def begun(self, args: Sequence[Any]) -> tuple[dict[Any, Any], Callable[[Any], Any]]:
        """(values of the variables, so far inputs and constants; how to read an atom).

        What runs the equations adds their outputs to the first.
        """
        env = dict(zip(self.invars, args, strict=True))
        env.update(zip(self.constvars, self.consts, strict=True))
        return env, lambda atom: atom.val if is_literal(atom) else env[atom]

    def uses(self) -> Counter[Any]:
        """How often each variable is an operand or an output."""
        places = (*(eqn.invars for eqn in self.eqns), self.outvars)
        return Counter(a for atoms in places for a in atoms if not is_literal(a))


def program(jaxpr: Any) -> Program:
    """Open a jaxpr, closed or not (the two are one class in newer versions of JAX)."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    consts = getattr(jaxpr, "consts", ())
    return Program(inner.invars, inner.constvars, consts, inner.eqns, inner.outvars)


def called(eqn: Eqn) -> Program:
    """The program that an equation calls; of some, JAX has renamed the parameter."""
    name = "call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"
    return program(eqn.params[name])


def trace(f: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The program of f at the shapes and dtypes of args, and its outputs' tree."""
    jaxpr, out = jax.make_jaxpr(f, return_shape=True)(*args)
    return program(jaxpr), out


def is_literal(atom: Any) -> bool:
    """Whether an equation's operand is a value rather than a variable."""
    return isinstance(atom, jex_core.Literal)


def bind(eqn: Eqn, *args: Any, **changed: Any) -> list[Any]:
    """Run one equation on other operands, with some of its parameters changed."""
    if eqn.primitive.name == "pvary":  # its operand may differ between devices by now
        return [vary(x, frozenset(eqn.params["axes"])) for x in args]
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    out = eqn.primitive.bind(*args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def context() -> tuple[Any, ...]:
    """What a traced program depends on besides its arguments, to be compared.

    Settings of JAX, the mesh, and named axes (of vmap or shard_map) with their sizes.
    """
    names = sorted(jex_core.unsafe_get_axis_names_DO_NOT_USE(), key=str)
    axes = tuple((name, jax.lax.axis_size(name)) for name in names)
    settings = tuple(getattr(jax.config, name) for name in _SETTINGS)
    return axes, settings, jax.sharding.get_abstract_mesh()


def varying(x: Any) -> frozenset[str]:
    """Under shard_map, the axes of the mesh along which an array, or aval, differs."""
    aval = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return getattr(kind, "varying", frozenset())


def explicit_sharding(x: Any) -> jax.sharding.NamedSharding | None:
    """How an array, or aval, lies over a mesh whose axes are part of its type."""
    found = jax.typeof(x).sharding if isinstance(x, jax.Array) else None
    found = found or getattr(x, "sharding", None)
    if not isinstance(found, jax.sharding.NamedSharding):
        return None
    if jax.sharding.AxisType.Explicit not in found.mesh.axis_types:
        return None
    return jax.sharding.NamedSharding(found.mesh.abstract_mesh, found.spec)


def fitted(
    sharding: jax.sharding.NamedSharding, shape: Sequence[int], cut: Sequence[Any]
) -> jax.sharding.NamedSharding:
    """It, without splitting cut axes (not None) whose length no longer divides."""
    parts = list(sharding.spec)
    for axis, names in enumerate(parts[: len(cut)]):  # `jacfwd` leaves longer ones
        names = names if isinstance(names, tuple) else (names,)
        shards = math.prod(sharding.mesh.shape.get(name, 1) for name in names)
        if cut[axis] is not None and shape[axis] % shards:
            parts[axis] = None
    return sharding.update(spec=jax.sharding.PartitionSpec(*parts))


def laid_like(x: Any, y: Any, whole: Sequence[int]) -> Any:
    """x as y lies over a mesh whose axes are part of its type, split along no `whole`.

    x has y's shape but for the axes that are whole.
    """
    sharding = explicit_sharding(y)
    if sharding is None:
        return x
    parts = [None if a in whole else part for a, part in enumerate(sharding.spec)]
    mesh = sharding.mesh if isinstance(y, jax.core.Tracer) else y.sharding.mesh
    spec = jax.sharding.PartitionSpec(*parts)
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, spec))


def vary(x: Any, axes: frozenset[str]) -> Any:
    """The array as one that may differ along these axes of the mesh."""
    more = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, more, to="varying") if more else x


def scan_parts(eqn: Eqn, operands: Sequence[Any]) -> tuple[list, list, list]:
    """A scan's constants, first carry, and scanned arrays."""
    p = eqn.params
    if "ft_in" in p:  # after JAX 0.10
        start, carried, _ = (len(list(part)) for part in p["ft_in"].unpack())
    else:
        start, carried = p["num_consts"], p["num_carry"]
    end = start + carried
    return list(operands[:start]), list(operands[start:end]), list(operands[end:])


def while_parts(eqn: Eqn, operands: Sequence[Any]) -> tuple[list, list, list]:
    """A while loop's constants of the condition, of the body, and first carry."""
    start = eqn.params["cond_nconsts"]
    end = start + eqn.params["body_nconsts"]
    return list(operands[:start]), list(operands[start:end]), list(operands[end:])


def is_array(aval: Any) -> bool:
    """Whether a type is an array of numbers (not a key, a token, a reference)."""
    dtype = getattr(aval, "dtype", None)
    return (
        hasattr(aval, "shape")
        and dtype is not None
        and not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    )


def kind(dtype: Any) -> str:
    """NumPy's letter: b, i, u, f or c. It has V for JAX's own, bfloat16 and int4."""
    dtype = np.dtype(dtype)
    if dtype.kind == "V":
        for letter, family in _FAMILIES.items():
            if jax.dtypes.issubdtype(dtype, family):
                return letter
    return dtype.kind


_FAMILIES = {"i": np.signedinteger, "u": np.unsignedinteger, "f": np.floating}


def scalar(value: Any) -> float | None:
    """A literal as a number, or None where it is an array, a key or a tracer."""
    if isinstance(value, jax.core.Tracer) or np.ndim(value):
        return None
    try:
        number = float(value)
        whole = np.asarray(value).dtype.kind in "iu"
        exact = not whole or int(number) == int(value)
    except TypeError:
        return None
    return number if exact else None  # integers beyond 2^53 are not all floats


def whole_array(value: Any, most: int) -> np.ndarray | None:
    """A constant of integers or bools, of at most so many; None of any other."""
    if isinstance(value, jax.core.Tracer) or np.size(value) > most:
        return None
    whole = isinstance(value, int) or getattr(
        getattr(value, "dtype", None), "kind", ""
    ) in ("i", "u", "b")
    here = getattr(value, "is_fully_addressable", True)
    return np.asarray(value) if whole and here else None


def is_finite(value: Any) -> bool:
    """Whether all numbers of a constant are finite; of a tracer, that is assumed."""
    if isinstance(value, jax.core.Tracer) or not is_array(value):
        return True
    return kind(value.dtype) not in "fc" or bool(np.isfinite(np.asarray(value)).all())


# Frames that are not the user's: of JAX, of this package, of Flax and Optax.
_LIBRARIES = (
    os.path.dirname(jax.__file__) + os.sep,
    os.path.dirname(__file__) + os.sep,
    os.path.join("site-packages", "flax", ""),
    os.path.join("site-packages", "optax", ""),
)


class Site(NamedTuple):
    """An equation as a cause: `primitive (file.py:12)`, the line being the user's."""

    eqn: Eqn

    def __str__(self) -> str:
        name = self.eqn.primitive.name
        traceback = getattr(self.eqn.source_info, "traceback", None)
        for frame in traceback.frames if traceback else ():
            if not any(part in frame.file_name for part in _LIBRARIES):
                return f"{name} ({os.path.basename(frame.file_name)}:{frame.line_num})"
        return name
