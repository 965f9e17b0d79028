# SPDX-License-Identifier: Apache-2.0
"""`factorize`: convolutions and matrix products as chains of thinner ones.

A kernel in the tree becomes a dict of factors, and `factorized` is the transformation
of the function that runs such a tree: at each product with a factorised kernel it runs
the chain. It looks at the tree alone, so that trained, saved, shrunk or hand-made
factors of any ranks go in.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import factors
from jaxprune import jaxpr as jx
from jaxprune.base import (
    Apply,
    ConfigError,
    DataError,
    Graph,
    GraphError,
    Path,
    PyTree,
    key_path,
    path_str,
)
from jaxprune.taps import Reading, run_products, taps
from jaxprune.trace import abstract_inputs, is_arraylike, struct

Method = Literal["svd", "responses", "separable", "cp"]
_NAME = "factor"


class Factorized(NamedTuple):
    """A function and its tree, in which factorised kernels are {'factor0': ...}."""

    apply: Apply
    variables: PyTree


def factorize(
    apply: Apply,
    graph: Graph,
    variables: PyTree,
    *inputs: Any,
    method: Method = "svd",
    ratio: float = 0.5,
    only: Sequence[str] = ("*",),
    batches: Iterable[Any] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Factorized:
    """Kernels as products of factors, each at most `ratio` of its multiply-adds.

    inputs, kwargs: as of `trace`, whose graph this is; variables: nested dicts. only:
    fnmatch patterns of key paths ('params/encoder*'). A kernel [kh, kw, in, out] of a
    plain convolution, or a matrix [in, out], becomes with rank r

    - 'svd': [kh, kw, in, r], [1, 1, r, out], the nearest such (Denton et al., 2014,
      "Exploiting linear structure within convolutional networks", section 3.2);
    - 'responses': the same shapes, nearest in what it answers on `batches` (inputs of
      apply, each an array or a tuple), the mean in the bias (Zhang et al., 2016,
      "Accelerating very deep convolutional networks", eq. 3, without the nonlinearity);
    - 'separable': [kh, 1, in, r], [1, kw, r, out], the nearest (Jaderberg et al., 2014,
      "Speeding up convolutional neural networks with low rank expansions", scheme 2);
    - 'cp': [1, 1, in, r], [kh, 1, 1, r], [1, kw, 1, r], [1, 1, r, out] by alternating
      least squares (Lebedev et al., 2015, "Speeding-up convolutional neural networks
      using fine-tuned CP-decomposition").

    The last two need two window axes; a matrix has none: [in, r], [r, out]. r is the
    largest that fits; a kernel stays where r would be 0, or so large that nothing is
    left out. What runs is plain convolutions, to be trained, traced and pruned like any
    others.

    Raises ConfigError for an unknown method or a ratio outside (0, 1), DataError for
    missing batches, GraphError for variables that do not fit the graph or are no dicts,
    and where no kernel can be factorised so.
    """
    _check(method, ratio, batches)
    _check_tree(graph, variables)
    readings = _readings(apply, variables, inputs, kwargs, only)
    responses = {}
    if method == "responses":
        responses = _responses(apply, variables, list(batches or ()), readings, kwargs)
    found: dict[Path, PyTree] = {}
    biases: dict[Path, np.ndarray] = {}
    for path, reading in readings.items():
        strides = reading.eqn.params.get("window_strides", ())
        rank = factors.largest_rank(reading.kernel.shape, strides, method, ratio)
        if not rank:
            continue
        kernel = np.asarray(_at(variables, path), np.float64)
        if method == "responses":
            mean, covariance = responses[path]
            made, basis = factors.by_responses(kernel, covariance, rank)
            bias = (*path[:-1], "bias")
            if _biased(variables, path, kernel):
                old = np.asarray(_at(variables, bias))
                # The mean answer stays what it was: only deviations are projected.
                biases[bias] = old + mean - mean @ basis @ basis.T
        else:
            made = factors.METHODS[method](kernel, rank, seed)
        dtype = _at(variables, path).dtype
        found[path] = {f"{_NAME}{i}": jnp.asarray(f, dtype) for i, f in enumerate(made)}
    if not found:
        raise GraphError(
            f"factorize: no kernel of {', '.join(only)} can be cut to {ratio:.0%} by "
            f"{method!r}; try another ratio or method"
        )
    changed = {p: jnp.asarray(b, _at(variables, p).dtype) for p, b in biases.items()}
    return Factorized(factorized(apply), _replaced(variables, found | changed))


def factorized(apply: Apply) -> Apply:
    """`apply` for trees of which kernels may be dicts {'factor0': ..., 'factor1': ...}.

    Factors are convolution kernels [window..., in, out], one after the other, or a
    matrix's [in, r] and [r, out]; one with a single input channel where there are more
    is depthwise. Where a factorised kernel is used otherwise, it is multiplied out.
    Derivatives of one's own are kept; a `jax.checkpoint` around a factorised kernel is
    not. Raises GraphError for factors that make no chain.
    """

    @functools.wraps(apply)
    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(
            variables, is_leaf=_is_factors
        )
        abstract, rebuild = abstract_inputs((inputs, kwargs))
        given = [x for x in jax.tree.leaves((inputs, kwargs)) if is_arraylike(x)]
        chains = {
            i: _ordered(path_str(key_path(keys)), x)
            for i, (keys, x) in enumerate(flat)
            if _is_factors(x)
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
            if not _plain(Reading((), eqn, x, structs[number], first)):
                args = (x, kernel()) if first else (kernel(), x)
                return jx.bind(eqn, *args)
            return [_chained(eqn, x, chains[number])]

        arrays: list[Any] = [
            functools.partial(_whole, chains[i]) if i in chains else jnp.asarray(x)
            for i, (_, x) in enumerate(flat)
        ]
        origins = [*range(len(arrays)), *(None for _ in given)]
        values, _ = run_products(program, [*arrays, *given], origins, product)
        values = [v() if callable(v) else v for v in values]
        return jax.tree.unflatten(jax.tree.structure(out), values)

    return run


def _is_factors(x: Any) -> bool:
    return isinstance(x, Mapping) and f"{_NAME}0" in x


def _ordered(name: str, parts: Mapping[str, Any]) -> list[Any]:
    """The factors in order, checked to be a chain."""
    names = [f"{_NAME}{i}" for i in range(len(parts))]
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


def _whole(chain: Sequence[Any]) -> jax.Array:
    """The kernel: [window..., in, out], multiplied out."""
    whole = chain[0]
    for factor in chain[1:]:
        if factor.shape[-2] == 1 != whole.shape[-1]:
            whole = whole * factor  # depthwise
        else:
            whole = jnp.einsum("...ir,...ro->...io", whole, factor)
    return whole


def _chained(eqn: jx.Eqn, x: jax.Array, chain: Sequence[Any]) -> jax.Array:
    """The product with the kernel, factor by factor."""
    p = eqn.params
    if eqn.primitive.name == "dot_general":
        (axis,), _ = p["dimension_numbers"][0]
        for factor in chain:
            contract = (((axis,), (0,)), ((), ()))
            x = jax.lax.dot_general(x, factor, contract, precision=p["precision"])
            axis = x.ndim - 1
        return x.astype(eqn.outvars[0].aval.dtype)
    ndim = chain[0].ndim
    image = (0, ndim - 1, *range(1, ndim - 1))
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    dims = p["dimension_numbers"]
    # Along each window axis one factor moves: it has the stride, padding and dilations.
    moves = [
        next((i for i, f in enumerate(chain) if f.shape[axis] > 1), 0)
        for axis in range(ndim - 2)
    ]
    for i, factor in enumerate(chain):
        mine = [move == i for move in moves]
        depthwise = factor.shape[-2] == 1 != factor.shape[-1] and i > 0
        x = jax.lax.conv_general_dilated(
            x,
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
            precision=p["precision"],
        )
    return x.astype(eqn.outvars[0].aval.dtype)


def _plain(reading: Reading) -> bool:
    """Whether the kernel lies as [window..., in, out], or [in, out]."""
    if reading.eqn.primitive.name == "dot_general":
        return reading.first and reading.kernel.ndim == 2 and reading.pairs[0][0] == 0
    ndim = reading.kernel.ndim
    dims = reading.eqn.params["dimension_numbers"]
    return dims.rhs_spec == (ndim - 1, ndim - 2, *range(ndim - 2))


def _responses(
    apply: Apply,
    variables: PyTree,
    batches: Sequence[Any],
    readings: Mapping[Path, Reading],
    kwargs: Mapping[str, Any],
) -> dict[Path, tuple[np.ndarray, np.ndarray]]:
    """Mean [out] and covariance [out, out] of each product's answers."""

    @jax.jit
    def collect(tree: PyTree, inputs: Any) -> dict[str, Any]:
        def look(reading: Reading) -> Any:
            if reading.path not in readings:
                return None
            answers = jx.bind(reading.eqn, *_operands(reading))[0]
            axis = answers.ndim - 1
            if reading.eqn.primitive.name != "dot_general":
                axis = reading.eqn.params["dimension_numbers"].out_spec[1]
            y = jnp.moveaxis(answers, axis, -1).reshape(-1, answers.shape[axis])
            return y.sum(axis=0), y.T @ y, len(y)

        _, seen = taps(apply, look)(tree, *inputs, **kwargs)
        return {path_str(p): x for p, x in seen.items()}

    sums: dict[str, Any] = {}
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        for name, found in collect(variables, inputs).items():
            for parts in found:
                new = [np.asarray(x, np.float64) for x in parts]
                old = sums.get(name, [0, 0, 0])
                sums[name] = [a + b for a, b in zip(old, new, strict=True)]
    if not sums:
        raise DataError("factorize: batches is empty (or was used up before)")
    moments = {}
    for path in readings:
        total, square, count = sums[path_str(path)]
        mean = total / count
        moments[path] = mean, square / count - np.outer(mean, mean)
    return moments


def _operands(reading: Reading) -> tuple[Any, Any]:
    pair = (reading.features, reading.kernel)
    return pair if reading.first else pair[::-1]


def _readings(
    apply: Apply,
    variables: PyTree,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    only: Sequence[str],
) -> dict[Path, Reading]:
    """Kernels of these names that one plain product reads, without their numbers."""
    found: dict[Path, list[Reading]] = {}

    def look(reading: Reading) -> None:
        abstract = struct(reading.kernel), struct(reading.features)
        blank = reading._replace(kernel=abstract[0], features=abstract[1])
        found.setdefault(reading.path, []).append(blank)

    jax.eval_shape(
        lambda tree, args: taps(apply, look)(tree, *args, **kwargs), variables, inputs
    )
    return {
        path: readings[0]
        for path, readings in found.items()
        if len(readings) == 1
        and _plain(readings[0])
        and any(fnmatch.fnmatchcase(path_str(path), pattern) for pattern in only)
    }


def _check(method: str, ratio: float, batches: Any) -> None:
    known = (*factors.METHODS, "responses")
    if method not in known:
        raise ConfigError(f"factorize(method={method!r}): one of {', '.join(known)}")
    if not 0 < ratio < 1:
        raise ConfigError(f"factorize(ratio={ratio!r}): must lie in (0, 1)")
    if method == "responses" and batches is None:
        raise DataError("factorize: 'responses' needs batches=[inputs of apply, ...]")


def _check_tree(graph: Graph, variables: PyTree) -> None:
    shapes = {leaf.path: leaf.shape for leaf in graph.leaves}
    for keys, x in jax.tree_util.tree_flatten_with_path(variables)[0]:
        path = key_path(keys)
        if not all(hasattr(k, "key") for k in keys):
            raise GraphError(
                f"factorize: {path_str(path)} does not lie in nested dicts; for nnx, "
                "pass nnx.to_pure_dict(state), and merge what apply is given"
            )
        if shapes.get(path) != np.shape(x):
            raise GraphError(
                f"factorize: {path_str(path)} {np.shape(x)} is not the graph's "
                f"({shapes.get(path, 'which lacks it')})"
            )


def _at(tree: PyTree, path: Path) -> Any:
    return functools.reduce(lambda node, name: node[name], path, tree)


def _biased(variables: PyTree, path: Path, kernel: np.ndarray) -> bool:
    """Whether a vector 'bias' lies beside the kernel."""
    beside = _at(variables, path[:-1])
    shape = np.shape(beside["bias"]) if "bias" in beside else None
    return path[-1] == "kernel" and shape == kernel.shape[-1:]


def _replaced(tree: PyTree, new: Mapping[Path, Any]) -> PyTree:
    def of(keys: Any, x: Any) -> Any:
        return new.get(key_path(keys), x)

    return jax.tree_util.tree_map_with_path(of, tree)
