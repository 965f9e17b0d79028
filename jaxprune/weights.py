# SPDX-License-Identifier: Apache-2.0
"""Single weights cut by magnitude: the irregular baseline of pruning by channels.

The zeros lie anywhere, so every array keeps its shape, and hardware for dense products
computes what it did before: nothing here is faster. What a machine that skips zeros
would be spared is counted beside (`nonzero_cost`), never instead of `cost`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.base import (
    Apply,
    BudgetError,
    ConfigError,
    Cost,
    Graph,
    GraphError,
    Path,
    PyTree,
    key_path,
    path_str,
)
from jaxprune.budget import Budget, check, rounded_up
from jaxprune.cost import cost
from jaxprune.rules import linear
from jaxprune.taps import Reading, readings
from jaxprune.trace import trace


def prune_weights(
    apply: Apply,
    variables: PyTree,
    *inputs: Any,
    budget: Budget,
    scope: Literal["global", "local"] = "global",
    **kwargs: Any,
) -> PyTree:
    """The variables with the least weights of the kernels set to 0; shapes stay.

    Budgets: `params(r)`, the fraction of trained numbers that are left, or `flops(r)`,
    the fraction of multiply-adds that a weight which is left takes part in. Met from
    below, to a single weight. Weights that are 0 already count as cut, so that calls
    with smaller and smaller budgets, training with `keep_zeros` between them, are the
    iterative method. Kernels are the trained leaves of two axes or more.

    Args:
      inputs, kwargs: as of `trace`; arrays or jax.ShapeDtypeStruct.
      scope: 'global' cuts weights below a threshold that is one number times the
        standard deviation of the kernel's weights (of those that are not 0); 'local'
        cuts the same fraction of each kernel.

    Raises BudgetError for another kind of budget, or one that cannot be met;
    ConfigError for another scope; GraphError where there is no kernel, or one is not
    finite.

    Source: Han et al., "Learning both weights and connections for efficient neural
    networks", 2015.
    """
    if scope not in ("global", "local"):
        raise ConfigError(f"scope={scope!r}: scope is 'global' or 'local'")
    graph = trace(apply, variables, *inputs, **kwargs)
    kernels = _kernels(graph, variables)
    uses = _uses(apply, variables, inputs, kwargs)
    kind = _check(graph, budget, uses)
    dense, now = cost(graph), _nonzero(graph, kernels, uses)
    saves = {p: uses.get(p, 0) if kind == "flops" else 1 for p in kernels}
    kernels = {p: w for p, w in kernels.items() if saves[p]}
    limit = getattr(dense, kind) * budget.ratio * (1 + 1e-12)
    excess = getattr(now, kind) - limit
    if excess <= 0:
        return variables
    rank = np.concatenate([np.zeros(0), *(_rank(w, scope) for w in kernels.values())])
    saved = [(w != 0).ravel() * np.int64(saves[p]) for p, w in kernels.items()]
    order = np.argsort(rank, kind="stable")
    total = np.concatenate([np.zeros(0, np.int64), *saved])[order].cumsum()
    stays = np.ones(len(order), bool)
    stays[order[: np.searchsorted(total, excess) + 1]] = False
    ends = np.cumsum([w.size for w in kernels.values()])[:-1]
    parts = dict(zip(kernels, np.split(stays, ends), strict=True))

    def cut(keys: Any, x: Any) -> Any:
        part = parts.get(key_path(keys))
        if part is None:
            return x
        where: Any = np.where if isinstance(x, np.ndarray) else jnp.where
        return where(part.reshape(x.shape), x, np.zeros((), x.dtype))

    return jax.tree_util.tree_map_with_path(cut, variables)


def check_reachable(
    apply: Apply,
    graph: Graph,
    variables: PyTree,
    *inputs: Any,
    budget: Budget,
    **kwargs: Any,
) -> None:
    """Raise BudgetError, telling the least, where no zeros meet the budget.

    graph: of the apply, the variables and the inputs, see `trace`. variables: their
    shapes count; jax.ShapeDtypeStruct will do.
    """
    _check(graph, budget, _uses(apply, variables, inputs, kwargs))


def nonzero_cost(apply: Apply, variables: PyTree, *inputs: Any, **kwargs: Any) -> Cost:
    """The cost for a machine that skips the weights which are 0.

    flops: 2 x multiply-adds with a weight that is not 0; products of other things, and
    kernels in loops, branches and grouped convolutions, count whole. params: trained
    numbers without the kernels' zeros. activation_bytes: the dense network's. On
    hardware for dense products the cost is `cost(trace(...))`, zeros or not.
    """
    graph = trace(apply, variables, *inputs, **kwargs)
    uses = _uses(apply, variables, inputs, kwargs)
    return _nonzero(graph, _kernels(graph, variables), uses)


def keep_zeros() -> optax.GradientTransformation:
    """Weights of kernels that are exactly 0 stay 0: the last one in an optax.chain.

    Their updates are dropped, whatever optimiser made them; leaves of one axis pass.
    Raises ConfigError where update is called without the params.
    """

    def held(updates: PyTree, params: PyTree) -> PyTree:
        if params is None:
            raise ConfigError(
                "keep_zeros needs the params: tx.update(updates, state, params)"
            )

        def of(keys: Any, update: Any, p: Any) -> Any:
            if not _is_kernel(key_path(keys), np.ndim(p)):
                return update
            return jnp.where(p == 0, jnp.zeros_like(update), update)

        return jax.tree_util.tree_map_with_path(of, updates, params)

    return optax.stateless(held)


def _check(graph: Graph, budget: Budget, uses: Mapping[Path, int]) -> str:
    """The budget's kind. Raises BudgetError for another one, or one out of reach."""
    check(budget)
    kind = budget.kind
    if kind != "flops" and kind != "params":
        raise BudgetError(
            f"prune_weights: zeros among the weights save no {kind}; ask for flops(r) "
            "or params(r)"
        )
    sizes = {p: math.prod(shape) for p, shape in _shapes(graph).items()}
    each = {p: uses.get(p, 0) if kind == "flops" else 1 for p in sizes}
    saved = sum(n * each[p] for p, n in sizes.items())
    whole = getattr(cost(graph), kind)
    if whole - saved > whole * budget.ratio * (1 + 1e-12):
        least = rounded_up((whole - saved) / whole)
        raise BudgetError(
            f"{kind}({budget.ratio}) cannot be met: what is no kernel's weight has "
            f"{least} of the dense network's {kind}. Ask for {kind}({least}) or more"
        )
    return kind


def _is_kernel(path: Path, ndim: int) -> bool:
    """Biases and scales of stacked layers have two axes, too."""
    return ndim > 1 and path[-1] not in ("bias", "scale")


def _kernels(graph: Graph, variables: PyTree) -> dict[Path, np.ndarray]:
    """The kernels by key path, as NumPy arrays, finite."""
    trained = _shapes(graph)
    flat = jax.tree_util.tree_flatten_with_path(variables)[0]
    found = {
        path: np.asarray(x)
        for path, x in ((key_path(keys), x) for keys, x in flat)
        if path in trained
    }
    if not found:
        raise GraphError("no trained leaf has two axes or more: there is no kernel")
    for path, kernel in found.items():
        if np.iscomplexobj(kernel):
            raise GraphError(f"{path_str(path)} is complex; only real weights are cut")
        if not np.isfinite(kernel.astype(np.float32)).all():
            raise GraphError(f"{path_str(path)} holds numbers that are not finite")
    return found


def _shapes(graph: Graph) -> dict[Path, tuple[int, ...]]:
    """The kernels' shapes by key path."""
    return {
        leaf.path: leaf.shape
        for leaf in graph.leaves
        if leaf.trained and _is_kernel(leaf.path, len(leaf.shape))
    }


def _uses(
    apply: Apply, variables: PyTree, inputs: Any, kwargs: Mapping[str, Any]
) -> dict[Path, int]:
    """How many FLOPs a weight of each kernel takes part in."""
    uses: dict[Path, int] = {}
    for reading in readings(apply, variables, inputs, kwargs):
        uses[reading.path] = uses.get(reading.path, 0) + _uses_in(reading)
    return uses


def _uses_in(reading: Reading) -> int:
    """2 x the products that each weight has a part in, as `cost` counts them."""
    params, shape = reading.eqn.params, reading.kernel.shape
    if reading.eqn.primitive.name == "dot_general":
        read = [kernel for kernel, _ in reading.pairs]
        made, share = math.prod(n for a, n in enumerate(shape) if a not in read), 1.0
    else:
        made = shape[params["dimension_numbers"].rhs_spec[0]]
        share = linear.positions(reading.eqn)
    outputs = math.prod(reading.eqn.outvars[0].aval.shape) // made
    return round(2 * share * outputs)


def _nonzero(
    graph: Graph, kernels: Mapping[Path, np.ndarray], uses: Mapping[Path, int]
) -> Cost:
    dense = cost(graph)
    zeros = {p: w.size - int(np.count_nonzero(w)) for p, w in kernels.items()}
    return dense._replace(
        flops=dense.flops - sum(n * uses.get(p, 0) for p, n in zeros.items()),
        params=dense.params - sum(zeros.values()),
    )


def _rank(kernel: np.ndarray, scope: str) -> np.ndarray:
    """float[n], rising in the order in which weights go, comparable among kernels."""
    size = np.abs(kernel.astype(np.float32)).ravel()
    if scope == "local":
        place = np.empty(size.size)
        place[np.argsort(size, kind="stable")] = np.arange(1, size.size + 1)
        return place / size.size
    alive = kernel[kernel != 0].astype(np.float32)
    spread = float(np.std(alive)) if alive.size else 0.0
    return size / spread if spread > 0 else size
