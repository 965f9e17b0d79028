# SPDX-License-Identifier: Apache-2.0
"""`factorized`: a function that runs trees in which kernels are chains of factors.

At each product with a factorised kernel it runs the chain. It looks at the tree alone,
so that trained, saved, shrunk or hand-made factors of any ranks go in.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import jaxpr as jx
from jaxprune.base import Apply, Graph, GraphError, Path, PyTree, key_path, path_str
from jaxprune.factors import movers
from jaxprune.taps import Reading, run_products
from jaxprune.trace import abstract_inputs, is_arraylike, struct

NAME = "factor"
# The collection of factors that are not trained, beside 'params' and as nested.
FIXED = "dictionary"


def factorized(apply: Apply, *, only: Collection[Path] | None = None) -> Apply:
    """`apply` for trees of which kernels may be dicts {'factor0': ..., 'factor1': ...}.

    Factors are convolution kernels [window..., in, out], one after the other, or a
    matrix's [in, r] and [r, out]; one with a single input channel where there are more
    is depthwise. Where a factorised kernel is used otherwise, it is multiplied out.
    Factors may lie in the collection 'dictionary' instead of 'params', at the same
    place: there they are not trained. Derivatives of one's own are kept; a
    `jax.checkpoint` around a factorised kernel is not. only: the key paths of kernels
    that are chains to this function; `apply` itself takes those of others as they are,
    as one does that was factorised, then pruned. Raises GraphError for factors that
    make no chain.
    """

    def chosen(path: Path, x: Any) -> bool:
        return _is_chain(x) and (only is None or path in only)

    @functools.wraps(apply)
    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(
            _joined(variables, only),
            is_leaf=lambda keys, x: chosen(key_path(keys), x),
            is_leaf_takes_path=True,
        )
        abstract, rebuild = abstract_inputs((inputs, kwargs))
        given = [x for x in jax.tree.leaves((inputs, kwargs)) if is_arraylike(x)]
        chains = {
            i: _ordered(path_str(key_path(keys)), x)
            for i, (keys, x) in enumerate(flat)
            if _is_chain(x)
        }
        structs = [
            _dense_struct(chains[i]) if i in chains else struct(x)
            for i, (_, x) in enumerate(flat)
        ]

        def dense(flat_variables: list[Any], flat_inputs: list[Any]) -> Any:
            args, more = rebuild(flat_inputs)
            return apply(jax.tree.unflatten(treedef, flat_variables), *args, **more)

        program, out = jx.trace(dense, structs, abstract)

        def product(number: int, eqn: jx.Eqn, x: Any, kernel: Any, first: bool) -> Any:
            if number not in chains:
                return None
            if not is_plain(Reading((), eqn, x, structs[number], first)):
                args = (x, kernel()) if first else (kernel(), x)
                return jx.bind(eqn, *args)
            return [_chained(eqn, x, chains[number])]

        arrays: list[Any] = [
            functools.partial(whole_kernel, chains[i])
            if i in chains
            else jnp.asarray(x)
            for i, (_, x) in enumerate(flat)
        ]
        origins = [*range(len(arrays)), *(None for _ in given)]
        values = run_products(program, [*arrays, *given], origins, product)
        values = [v() if callable(v) else v for v in values]
        return jax.tree.unflatten(jax.tree.structure(out), values)

    run.takes_factors = True  # type: ignore[attr-defined]
    return run


def takes_factors(apply: Apply) -> bool:
    """Whether a function is one of `factorized`."""
    return getattr(apply, "takes_factors", False)


def is_factor(path: Path) -> bool:
    """Whether a leaf is a factor of a kernel."""
    number = path[-1].removeprefix(NAME)
    return number != path[-1] and number.isdigit()


def is_factorized(graph: Graph) -> bool:
    """Whether the graph is of a network whose kernels are chains."""
    return any(leaf.path[-1] == f"{NAME}0" for leaf in graph.leaves)


def with_chains(variables: PyTree, chains: Mapping[Path, Sequence[Any]]) -> PyTree:
    """The nested dicts with some kernels replaced by their factors."""
    named = {p: {f"{NAME}{i}": f for i, f in enumerate(c)} for p, c in chains.items()}
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: named.get(key_path(keys), x), variables
    )


def fix_first(variables: PyTree, paths: Sequence[Path]) -> PyTree:
    """The tree with the first factor of these kernels of 'params' not to be trained."""
    moved: dict[str, Any] = {}

    def without(node: Any, path: Path) -> Any:
        if not isinstance(node, Mapping):
            return node
        if ("params", *path) in paths:
            here = moved
            for name in path:
                here = here.setdefault(name, {})
            here[f"{NAME}0"] = node[f"{NAME}0"]
            return {n: x for n, x in node.items() if n != f"{NAME}0"}
        return {n: without(x, (*path, n)) for n, x in node.items()}

    params = without(variables["params"], ())
    fixed = _merged(variables.get(FIXED, {}), moved)  # of another call, too
    return {**variables, "params": params, FIXED: fixed}


def _merged(first: Any, second: Any) -> Any:
    """Nested dicts as one; where both have a leaf, the second's."""
    if not isinstance(second, Mapping):
        return second
    first = first if isinstance(first, Mapping) else {}
    return {**first, **{n: _merged(first.get(n), x) for n, x in second.items()}}


def _joined(variables: PyTree, only: Collection[Path] | None) -> PyTree:
    """The tree with the factors of the collection 'dictionary' among the others."""

    def parted(fixed: Any, path: Path, mine: bool) -> Any:
        """What of the collection is, or is not, of the kernels in `only`."""
        if _is_chain(fixed):
            return fixed if (path in (only or ())) == mine else {}
        parts = {n: parted(x, (*path, n), mine) for n, x in fixed.items()}
        return {n: x for n, x in parts.items() if x}

    if not isinstance(variables, Mapping) or "params" not in variables:
        return variables
    fixed = variables.get(FIXED)
    if not fixed or not _holds_factors(fixed):
        return variables
    rest = {n: x for n, x in variables.items() if n != FIXED}
    if only is not None:
        others = parted(fixed, ("params",), False)
        rest |= {FIXED: others} if others else {}
        fixed = parted(fixed, ("params",), True)
    return {**rest, "params": _merged(variables["params"], fixed)}


def _holds_factors(tree: PyTree) -> bool:
    """Whether all leaves are factors: a network may have a collection of that name."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return all(is_factor(key_path(keys)) for keys, _ in flat)


def _is_chain(x: Any) -> bool:
    return isinstance(x, Mapping) and f"{NAME}0" in x


def _ordered(name: str, parts: Mapping[str, Any]) -> list[Any]:
    """The factors in order, checked to be a chain."""
    names = [f"{NAME}{i}" for i in range(len(parts))]
    if set(names) != set(parts):
        raise GraphError(f"{name}: factors are {', '.join(names)}, not {list(parts)}")
    chain = [jnp.asarray(parts[n]) for n in names]
    channels = chain[0].shape[-2]
    for i, factor in enumerate(chain):
        read, made = factor.shape[-2:]
        if factor.ndim != chain[0].ndim or not (
            read == channels or read == 1 and made == channels
        ):
            shapes = ", ".join(str(f.shape) for f in chain)
            raise GraphError(
                f"{name}: the factors {shapes} make no chain: {names[i]} reads {read} "
                f"of {channels} channels"
            )
        channels = made
    return chain


def _dense_struct(chain: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """Of the kernel that the factors stand for."""
    shapes = [f.shape for f in chain]
    window = tuple(max(sizes) for sizes in zip(*(s[:-2] for s in shapes)))
    shape = (*window, shapes[0][-2], shapes[-1][-1])
    return jax.ShapeDtypeStruct(shape, chain[0].dtype)


def whole_kernel(chain: Sequence[Any]) -> Any:
    """The kernel that the factors stand for, [window..., in, out]."""
    whole = chain[0]
    for factor in chain[1:]:
        if factor.shape[-2] == 1 != whole.shape[-1]:
            whole = whole * factor  # depthwise
        else:
            whole = jnp.einsum("...ir,...ro->...io", whole, factor)
    return whole


def _chained(eqn: jx.Eqn, x: jax.Array, chain: Sequence[Any]) -> jax.Array:
    """The product with the kernel, factor by factor, each in the dtypes of the one."""
    p = eqn.params
    read = x.dtype
    chain = [factor.astype(eqn.invars[1].aval.dtype) for factor in chain]
    alike = {k: p[k] for k in ("precision", "preferred_element_type")}
    if eqn.primitive.name == "dot_general":
        (axis,), _ = p["dimension_numbers"][0]
        for factor in chain:
            contract = (((axis,), (0,)), ((), ()))
            x = jax.lax.dot_general(x.astype(read), factor, contract, **alike)
            axis = x.ndim - 1
        return x.astype(eqn.outvars[0].aval.dtype)
    ndim = chain[0].ndim
    image = (0, ndim - 1, *range(1, ndim - 1))
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    dims = p["dimension_numbers"]
    # Along each window axis one factor moves: it has the stride, padding and dilations.
    moves = movers([f.shape for f in chain])
    for i, factor in enumerate(chain):
        mine = [move == i for move in moves]
        depthwise = i > 0 and factor.shape[-2] == 1 != chain[i - 1].shape[-1]
        x = jax.lax.conv_general_dilated(
            x.astype(read),
            factor,
            [s if m else 1 for s, m in zip(p["window_strides"], mine)],
            [s if m else (0, 0) for s, m in zip(p["padding"], mine)],
            [s if m else 1 for s, m in zip(p["lhs_dilation"], mine)],
            [s if m else 1 for s, m in zip(p["rhs_dilation"], mine)],
            jax.lax.ConvDimensionNumbers(
                dims.lhs_spec if i == 0 else image,
                kernel,
                dims.out_spec if i == len(chain) - 1 else image,
            ),
            feature_group_count=factor.shape[-1] if depthwise else 1,
            **alike,
        )
    return x.astype(eqn.outvars[0].aval.dtype)


def is_plain(reading: Reading) -> bool:
    """Whether the kernel lies as [window..., in, out], or [in, out]."""
    if reading.eqn.primitive.name == "dot_general":
        return reading.first and reading.kernel.ndim == 2 and reading.pairs[0][0] == 0
    ndim = reading.kernel.ndim
    dims = reading.eqn.params["dimension_numbers"]
    return dims.rhs_spec == (ndim - 1, ndim - 2, *range(ndim - 2))
