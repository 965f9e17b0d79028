# SPDX-License-Identifier: Apache-2.0
"""`factorize`: convolutions and matrix products as chains of thinner ones.

A kernel in the tree becomes a dict of factors, which `chains.factorized` runs.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import chains, factors, ranks, responses
from jaxprune.base import (
    Apply,
    BudgetError,
    ConfigError,
    DataError,
    Graph,
    GraphError,
    Path,
    PyTree,
    check_separate,
    key_path,
    path_str,
)
from jaxprune.behind import biases
from jaxprune.budget import Budget, check
from jaxprune.chains import factorized, is_plain
from jaxprune.reconstruct import replaced
from jaxprune.select import check_positive
from jaxprune.taps import Reading, readings
from jaxprune.trace import trace

__all__ = ["Chain", "Factorized", "Method", "factorize", "factorized"]

Method = Literal[
    "svd",
    "separable",
    "cp",
    "predicted",
    "responses",
    "nonlinear",
    "asymmetric",
    "asymmetric3d",
]
_SEEING = ("responses", "nonlinear", "asymmetric", "asymmetric3d")  # want batches


class Chain(NamedTuple):
    """A factorised kernel: its rank, of how many, and whether it is fit to a ReLU."""

    rank: int
    full: int
    relu: bool = False


class Factorized(NamedTuple):
    """A function and its tree, in which factorised kernels are {'factor0': ...}.

    chains: by the kernel's key path, 'params/conv/kernel'.
    """

    apply: Apply
    variables: PyTree
    chains: Mapping[str, Chain]


def factorize(
    apply: Apply,
    graph: Graph,
    variables: PyTree,
    *inputs: Any,
    method: Method = "svd",
    ratio: float | None = None,
    budget: Budget | None = None,
    only: Sequence[str] = ("*",),
    batches: Iterable[Any] | None = None,
    positions: int = 512,
    multiple_of: int = 1,
    seed: int = 0,
    **kwargs: Any,
) -> Factorized:
    """Kernels as products of factors, each within a ratio, or all within a budget.

    inputs, kwargs: as of `trace`, whose graph this is; variables: nested dicts. ratio:
    of its multiply-adds that each kernel may keep, 0.5 where neither is given. budget:
    `flops(r)` or `params(r)` of the whole network; ranks are then chosen as by Zhang et
    al. ("Rank selection for whole-model acceleration"), so that the product of the
    energies that stay is large ('cp' and 'predicted': one ratio for all kernels). only:
    fnmatch patterns of key paths ('params/encoder*'). multiple_of: of ranks. A kernel
    [kh, kw, in, out] of a plain convolution, or a matrix [in, out], becomes with rank r

    - 'svd': [kh, kw, in, r], [1, 1, r, out], the nearest such (Denton et al., 2014,
      "Exploiting linear structure within convolutional networks", the matrix
      decomposition; not its clusters of filters);
    - 'separable': [kh, 1, in, r], [1, kw, r, out], the nearest (Jaderberg et al., 2014,
      "Speeding up convolutional neural networks with low rank expansions", scheme 2);
    - 'cp': [1, 1, in, r], [kh, 1, 1, r], [1, kw, 1, r], [1, 1, r, out] by alternating
      least squares (Lebedev et al., 2015, "Speeding-up convolutional neural networks
      using fine-tuned CP-decomposition");
    - 'predicted': the shapes of 'svd', the first a dictionary that predicts all weights
      of a filter from r of them, the second what is learned (Denil et al., 2013,
      "Predicting parameters in deep learning"). The dictionary moves from 'params' to
      the collection 'dictionary', which is not trained nor counted among parameters;
      multiply-adds are as many as those of 'svd';
    - 'responses': the shapes of 'svd', nearest in what it answers on `batches` (inputs
      of apply, each an array or a tuple, `positions` of each), the mean in the bias;
    - 'nonlinear': the same in what the ReLU behind it makes of the answers, through a
      bias or batch norm. Where there is no ReLU, or another reader, as 'responses';
    - 'asymmetric': 'nonlinear', layer after layer, each fed by those before it as they
      are by then, and held to what the given network makes;
    - 'asymmetric3d': [kh, 1, in, s], [1, kw, s, r], [1, 1, r, out]: 'asymmetric' on top
      of 'separable', both steps leaving the same fraction.

    The last four are Zhang et al., 2016, "Accelerating very deep convolutional networks
    for classification and detection". Chains of window axes need two of them; a matrix
    has none: [in, r], [r, out]. A kernel stays where no rank saves anything, where it
    is a factor already, or the budget is met without it. What runs is plain
    convolutions, to be trained, traced and pruned like any others. Of a network that
    was factorised, then pruned, more kernels may be factorised; `load` then takes
    `factorized(apply, only=[...])`, of these kernels and what was pruned.

    Raises ConfigError for an unknown method or a ratio outside (0, 1), BudgetError for
    a budget that no ranks meet, DataError for missing batches or such as give answers
    that are not finite, GraphError for variables that are not, do not fit the graph or
    are no dicts, and where no kernel can be factorised so.
    """
    _check(method, ratio, budget, batches, multiple_of, positions, only)
    _check_tree(graph, variables, method)
    kernels = _readings(method, apply, variables, inputs, kwargs, only)
    if not kernels and list(only) != ["*"]:
        some = next((path_str(x.path) for x in graph.leaves if len(x.shape) > 1), "")
        raise GraphError(
            f"factorize: only={list(only)!r} names no kernel that {method!r} cuts; it "
            f"holds fnmatch patterns of key paths such as {some!r}"
        )
    seen_by, added = None, dict[Path, Path]()
    if method in _SEEING and kernels and batches is not None:
        seen_by = responses.sampler(
            apply, list(batches), kernels, positions, seed, kwargs
        )
        added = biases(apply, variables, inputs, kwargs)
    own = seen_by(variables) if seen_by else None
    kind = str(budget.kind) if budget else "flops"
    table = _table(method, variables, kernels, own, added, kind, multiple_of)
    if budget is None:
        found = ranks.within(table, 0.5 if ratio is None else ratio)
    else:
        # At these inputs, which may be others than the graph's.
        whole = trace(apply, variables, *inputs, **kwargs)
        found = ranks.together(whole, table, method, budget)
    chosen = {path: choice.rank for path, choice in found.items() if choice.rank}
    if not chosen and budget is not None:
        return Factorized(factorized(apply), variables, {})
    if not chosen:
        raise GraphError(
            f"factorize: no kernel of {', '.join(only)} can be cut to "
            f"{ratio or 0.5:.0%} by {method!r}; try another ratio or method"
            + "; factors are not cut anew"
            * chains.is_factorized(graph)
        )
    if seen_by is None or own is None:
        made = {
            path: factors.METHODS[method](_float64(variables, path), rank, seed)
            for path, rank in chosen.items()
        }
        new, relu = variables, set[Path]()
    else:
        made, new, relu = _fitted(method, variables, chosen, own, added, seen_by)
    parts = {
        path: [jnp.asarray(f, _at(variables, path).dtype) for f in made[path]]
        for path in made
    }
    thin = chains.with_chains(new, parts)
    if method == "predicted":
        thin = chains.fix_first(thin, list(made))
    full = {p: factors.full_rank(method, r.kernel.shape) for p, r in kernels.items()}
    of = {path_str(p): Chain(r, full[p], p in relu) for p, r in chosen.items()}
    # Those that were chains before are to `apply` what they were.
    mine = list(made) if chains.is_factorized(graph) else None
    return Factorized(factorized(apply, only=mine), thin, of)


def check_reachable(
    apply: Apply,
    graph: Graph,
    variables: PyTree,
    *inputs: Any,
    method: Method,
    budget: Budget,
    multiple_of: int = 1,
    **kwargs: Any,
) -> None:
    """Raises BudgetError, telling the least, where `factorize` would; of shapes alone.

    variables, inputs: arrays or jax.ShapeDtypeStruct.
    """
    kind = str(budget.kind)
    found = _readings(method, apply, variables, inputs, kwargs, ("*",))
    table = {p: ranks.priced(method, r, kind, multiple_of) for p, r in found.items()}
    ranks.check(graph, table, method, budget)


def _table(
    method: str,
    variables: PyTree,
    readings: Mapping[Path, Reading],
    own: Callable[[Path], responses.Sample] | None,
    added: Mapping[Path, Path],
    kind: str,
    multiple_of: int,
) -> dict[Path, list[ranks.Choice]]:
    """What each kernel may become, at which cost, and how much of it stays."""
    table = {}
    for path, reading in readings.items():
        kernel, spectrum = _float64(variables, path), None
        if own is not None:
            spectrum = responses.spectrum(own(path).answers, path in added)
        table[path] = ranks.choices(
            method, kernel, reading, kind, spectrum, multiple_of
        )
    return table


def _fitted(
    method: str,
    variables: PyTree,
    chosen: Mapping[Path, int],
    own: Callable[[Path], responses.Sample],
    added: Mapping[Path, Path],
    seen_by: Callable[[PyTree], Callable[[Path], responses.Sample]],
) -> tuple[dict[Path, list[np.ndarray]], PyTree, set[Path]]:
    """(factors, the tree with new biases, kernels that were fitted to a ReLU)."""
    tree = variables
    made: dict[Path, list[np.ndarray]] = {}
    moved: dict[Path, np.ndarray] = {}
    relu: set[Path] = set()
    for path, rank in chosen.items():  # as the program reads them
        kernel = _float64(variables, path)
        parts = [kernel]
        if method == "asymmetric3d":
            parts = factors.separable(kernel, factors.inner_rank(kernel.shape, rank))
        seen = own(path).answers
        if method.startswith("asymmetric"):
            before = np.asarray(chains.whole_kernel(parts))
            tree = replaced(tree, {path: before})
            seen = seen_by(tree)(path).answers
        bias = added.get(path)
        new = responses.replacement(
            *(own(path), seen, rank),
            biased=bias is not None,
            relu=method != "responses",
        )
        ones = (1,) * (kernel.ndim - 2)
        made[path] = [
            *parts[:-1],
            parts[-1] @ new.first,
            new.last.reshape(*ones, *new.last.shape),
        ]
        changed = {path: np.asarray(chains.whole_kernel(made[path]))}
        if bias is not None:
            changed[bias] = moved[bias] = _float64(variables, bias) + new.bias
        tree = replaced(tree, changed)
        relu |= {path} if new.relu else set()
    return made, replaced(variables, moved), relu


def _readings(
    method: str,
    apply: Apply,
    variables: PyTree,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    only: Sequence[str],
) -> dict[Path, Reading]:
    """Kernels for the method, of these names, that one plain product reads.

    Without their numbers. What is used otherwise, too, would be multiplied out there.
    """
    found: dict[Path, list[Reading]] = {}
    others: set[Path] = set()
    for reading in readings(apply, variables, inputs, kwargs, elsewhere=others):
        found.setdefault(reading.path, []).append(reading)
    return {
        path: ways[0]
        for path, ways in found.items()
        if len(ways) == 1
        and path not in others
        and is_plain(ways[0])
        and not chains.is_factor(path)
        and factors.full_rank(method, ways[0].kernel.shape)
        and any(fnmatch.fnmatchcase(path_str(path), pattern) for pattern in only)
    }


def _check(
    method: str,
    ratio: Any,
    budget: Any,
    batches: Any,
    multiple_of: Any,
    positions: Any,
    only: Any,
) -> None:
    known = get_args(Method)
    if method not in known:
        raise ConfigError(f"factorize(method={method!r}): one of {', '.join(known)}")
    number = isinstance(ratio, int | float | np.number)
    if ratio is not None and not (number and 0 < ratio < 1):
        raise ConfigError(f"factorize(ratio={ratio!r}): must lie in (0, 1)")
    if ratio is not None and budget is not None:
        raise ConfigError("factorize: give a ratio for each kernel or a budget for all")
    if budget is not None:
        check(budget)
    if budget is not None and budget.kind not in ("flops", "params"):
        raise BudgetError("factorize: a budget is jp.flops(r) or jp.params(r)")
    check_positive(multiple_of=multiple_of, positions=positions)
    if isinstance(only, str):
        raise ConfigError(f"factorize(only={only!r}): a list of patterns, [{only!r}]")
    if method in _SEEING and batches is None:
        raise DataError(f"factorize: {method!r} needs batches=[inputs of apply, ...]")
    check_separate(batches, "factorize: batches")


def _check_tree(graph: Graph, variables: PyTree, method: str) -> None:
    if method == "predicted" and "params" not in variables:
        raise GraphError(
            "factorize: 'predicted' keeps what is not trained beside 'params'; pass "
            "{'params': variables}, and an apply that takes it"
        )
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


def _float64(tree: PyTree, path: Path) -> np.ndarray:
    if jnp.iscomplexobj(_at(tree, path)):
        raise GraphError(f"factorize: {path_str(path)} is complex, not real")
    kernel = np.asarray(_at(tree, path), np.float64)
    if not np.isfinite(kernel).all():
        raise GraphError(f"factorize: {path_str(path)} is not finite")
    return kernel
