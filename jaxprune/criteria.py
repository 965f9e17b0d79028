# SPDX-License-Identifier: Apache-2.0
"""Criteria: how much each channel matters, as composable (init, update) pairs.

As an optax transformation passes updates along, a criterion passes scores along: those
that measure (jaxprune/measures.py) put new scores in, those that transform
(`normalize`, `per_cost`, `ema`) change what arrives, and `chain` strings them together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import budget, placement, trees
from jaxprune.base import (
    ConfigError,
    DataError,
    Graph,
    GraphError,
    Keep,
    PyTree,
    Scores,
    check_separate,
)
from jaxprune.sharded import fetched

Loss = Callable[[PyTree, Any], jax.Array]


class Evidence(NamedTuple):
    """What a criterion may look at; `loss(variables, batch)` -> scalar."""

    graph: Graph
    variables: PyTree
    loss: Loss | None = None
    batch: Any = None
    key: jax.Array | None = None


class Criterion(NamedTuple):
    """`init(graph, variables)` -> state; `update(scores, state, evidence)` -> both.

    Scores are {group: float[C]}, higher = more important. `update` is traced once and
    called for every batch, so the state is a pytree of arrays. numpy: given NumPy
    arrays it computes with NumPy, so that for variables in a CPU's memory nothing is
    compiled. transforms: it changes scores that are there, and measures none. costly:
    making scores of the state is much of the work; before the last batch, what no state
    needs of it is left out, by a program of its own.
    """

    init: Callable[[Graph, PyTree], PyTree]
    update: Callable[[Scores, PyTree, Evidence], tuple[Scores, PyTree]]
    numpy: bool = False
    transforms: bool = False
    costly: bool = False


def score(
    criterion: Criterion,
    graph: Graph,
    variables: PyTree,
    *,
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
    key: jax.Array | None = None,
) -> dict[str, np.ndarray]:
    """Scores {group: float[C]} after all batches (a finite iterable), as NumPy arrays.

    Without batches the criterion is updated once. The work of a batch is compiled once;
    that of `magnitude`, with `normalize` and `per_cost`, is NumPy's where the variables
    lie in one CPU's memory, and may there differ from a compiled one's by rounding.
    Raises ConfigError where the criterion needs a loss, batches or a key that is
    missing, or for a key that is none, DataError for empty batches, GraphError naming
    the group of a score that is not finite.
    """
    return scorer(criterion, graph, loss)(variables, batches=batches, key=key)


def scorer(
    criterion: Criterion, graph: Graph, loss: Loss | None = None
) -> Callable[..., dict[str, np.ndarray]]:
    """`score` for many calls: `run(variables, *, batches, key, keep)`, traced once.

    With a `keep` the masked network is scored.
    """
    _check_measures(criterion)

    @jax.jit
    def update(state: PyTree, keep: Keep | None, variables: PyTree, batch, key):
        if keep is not None:
            variables = trees.mask(graph, keep, variables)
        zeros = {n: jnp.zeros(g.size) for n, g in graph.groups.items()}
        evidence = Evidence(graph, variables, loss, batch, key)
        return _updated(criterion, zeros, state, evidence)

    @jax.jit
    def advance(*args: Any) -> PyTree:
        return update(*args)[1]

    def run(
        variables: PyTree,
        *,
        batches: Iterable[Any] | None = None,
        key: jax.Array | None = None,
        keep: Keep | None = None,
    ) -> dict[str, np.ndarray]:
        if key is not None:
            check_key("score", key)
        check_separate(batches)
        state = criterion.init(graph, variables)
        scores = None
        if criterion.numpy and batches is None and keep is None:
            arrays = placement.on_host(variables)
            if arrays is not None:
                empty = {n: np.zeros(g.size) for n, g in graph.groups.items()}
                evidence = Evidence(graph, arrays, loss, None, key)
                scores, _ = _updated(criterion, empty, state, evidence)
                return check_scores(graph, jax.tree.map(_canonical, scores))
        for batch, last in _marking_last([None] if batches is None else batches):
            if last or not criterion.costly:
                scores, state = update(state, keep, variables, batch, key)
            else:
                state = advance(state, keep, variables, batch, key)
        if scores is None:
            raise DataError("batches is empty (or an iterator that was used up before)")
        return check_scores(graph, scores)

    return run


def _updated(
    criterion: Criterion, scores: Scores, state: PyTree, evidence: Evidence
) -> tuple[Scores, PyTree]:
    """What its update returns; raises ConfigError for anything but a pair of both."""
    found = criterion.update(scores, state, evidence)
    pair = isinstance(found, tuple | list) and len(found) == 2
    if pair and isinstance(found[0], Mapping):
        return found[0], found[1]
    raise ConfigError(
        f"a criterion's update returns ({{group: scores}}, state), this one "
        f"{type(found).__name__}; jaxprune.criteria.stateless(f) makes one of a "
        "function f(scores, evidence) that returns scores alone"
    )


def _marking_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each with whether it is the last."""
    known: list[Any] = []
    for item in items:
        if known:
            yield known.pop(), False
        known.append(item)
    if known:
        yield known.pop(), True


def _check_is(criterion: Any) -> None:
    """Raises ConfigError for anything else, such as a function that makes one."""
    if not hasattr(criterion, "init") or not hasattr(criterion, "update"):
        called = getattr(criterion, "__name__", None)
        hint = f"; call it: {called}()" if called else ""
        raise ConfigError(f"{criterion!r:.80} is no criterion{hint}")


def _check_measures(criterion: Criterion) -> None:
    """Raises ConfigError for what is no criterion, or has no scores to change."""
    _check_is(criterion)
    if getattr(criterion, "transforms", False):
        raise ConfigError(
            "the criterion begins with a step that changes scores, and there are none "
            "yet; measure first: chain(magnitude(), normalize())"
        )


def check_criterion(
    criterion: Criterion,
    graph: Graph,
    variables: PyTree,
    *,
    loss: Loss | None = None,
    batch: Any = None,
    key: jax.Array | None = None,
) -> None:
    """Raise what `score` would of the graph or the program; nothing is computed.

    variables, batch: arrays or their shapes.
    """
    _check_measures(criterion)

    def update(variables: PyTree, batch: Any, key: Any) -> Scores:
        zeros = {n: jnp.zeros(g.size) for n, g in graph.groups.items()}
        state = criterion.init(graph, variables)
        evidence = Evidence(graph, variables, loss, batch, key)
        return _updated(criterion, zeros, state, evidence)[0]

    jax.eval_shape(update, variables, batch, key)


def check_key(name: str, key: Any) -> None:
    """Raises ConfigError for what is no JAX key, such as a seed."""
    typed = jnp.issubdtype(getattr(key, "dtype", int), jax.dtypes.prng_key)
    if not typed and np.ndim(key) == 0:
        raise ConfigError(f"{name}: key={key!r} is no key; jax.random.key(0) is one")


def _canonical(x: np.ndarray) -> np.ndarray:
    """In the type that JAX would have given it."""
    return x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)


def check_scores(graph: Graph, scores: Scores) -> dict[str, np.ndarray]:
    """The scores as finite NumPy arrays in the graph's order; else GraphError."""
    if not isinstance(scores, Mapping):
        raise GraphError(f"scores={scores!r:.80}: {{group: float[C]}}, as of score()")
    checked = {}
    for name in scores:
        if name not in graph.groups:
            raise GraphError(f"scores name group {name!r}, which the graph lacks")
    for name, group in graph.groups.items():
        if name not in scores:
            raise GraphError(f"scores lack group {name!r} (float[{group.size}])")
        value = fetched(scores[name])
        if value.shape != (group.size,):
            raise GraphError(
                f"group {name!r} has {group.size} channels, its scores have shape "
                f"{value.shape}"
            )
        if not np.isfinite(value).all():
            bad = np.flatnonzero(~np.isfinite(value))
            raise GraphError(
                f"group {name!r}: the scores of {len(bad)} of {group.size} channels "
                f"are not finite, the first is channel {bad[0]}; are weights, loss "
                "and batches finite?"
            )
        if np.iscomplexobj(value):
            raise GraphError(f"group {name!r}: the scores are complex; say which order")
        real = jnp.issubdtype(value.dtype, jnp.inexact)
        checked[name] = value if real else value.astype(np.float64)
    return checked


def chain(*criteria: Criterion) -> Criterion:
    """Criteria one after the other, each fed with the scores of the one before.

    The first one is to measure. Raises ConfigError for none at all, and what is none.
    """
    if not criteria:
        raise ConfigError("chain() of no criterion; chain(magnitude(), normalize())")
    for criterion in criteria:
        _check_is(criterion)

    def init(graph: Graph, variables: PyTree) -> PyTree:
        return tuple(c.init(graph, variables) for c in criteria)

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        states = []
        for i, (criterion, s) in enumerate(zip(criteria, state, strict=True)):
            key = evidence.key
            own = key if key is None else jax.random.fold_in(key, i)
            scores, s = _updated(criterion, scores, s, evidence._replace(key=own))
            states.append(s)
        return scores, tuple(states)

    numpy, costly = all(c.numpy for c in criteria), any(c.costly for c in criteria)
    return Criterion(init, update, numpy, criteria[0].transforms, costly)


def stateless(
    f: Callable[[Scores, Evidence], Scores],
    *,
    numpy: bool = False,
    transforms: bool = False,
) -> Criterion:
    """A criterion out of `f(scores, evidence) -> scores`; see `Criterion`."""

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del graph, variables
        return ()

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        return f(scores, evidence), state

    return Criterion(init, update, numpy, transforms)


def normalize(by: Literal["mean", "max", "sum", "l2"] = "mean") -> Criterion:
    """Scores of each group divided by their own mean, maximum, sum or 2-norm.

    Of their absolute values; a group of zeros stays so. ConfigError for another `by`.
    """
    norms: dict[str, Callable[[Any], Any]] = {
        "mean": lambda x: x.mean(),
        "max": lambda x: x.max(),
        "sum": lambda x: x.sum(),
        "l2": lambda x: (x * x).sum() ** 0.5,
    }
    if by not in norms:
        raise ConfigError(f"normalize(by={by!r}): by is one of {', '.join(norms)}")

    def normalized(x: Any) -> Any:
        norm = norms[by](abs(x))
        return x / (np if placement.is_numpy(x) else jnp).where(norm > 0, norm, 1)

    return stateless(
        lambda scores, evidence: jax.tree.map(normalized, dict(scores)),
        numpy=True,
        transforms=True,
    )


def per_cost(kind: budget.Kind = "flops") -> Criterion:
    """Scores divided by what fraction of the dense network's cost a channel carries.

    The cost is marginal, at the dense network: cost(all) - cost(all but one), relative
    to cost(all). Raises GraphError naming the groups whose channels cost nothing.
    """
    budget.check_kind(kind)

    def divided(scores: Scores, evidence: Evidence) -> Scores:
        shares = budget.marginal(evidence.graph, kind)
        free = [n for n, s in zip(evidence.graph.groups, shares) if s <= 0]
        if free:
            raise GraphError(
                f"per_cost({kind}): the channels of group "
                f"{', '.join(map(repr, free))} cost nothing; choose another kind"
            )
        return {n: scores[n] / s for n, s in zip(evidence.graph.groups, shares)}

    return stateless(divided, numpy=True, transforms=True)


def ema(decay: float) -> Criterion:
    """The moving average (exponential, start corrected) of the scores that arrive.

    For scores of single batches or training steps: `chain(taylor(mean=False),
    ema(0.9))`. ConfigError for a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"ema(decay={decay!r}): decay is in [0, 1)")

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        return jnp.zeros(()), {n: jnp.zeros(g.size) for n, g in graph.groups.items()}

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del evidence
        weight, average = state
        weight = decay * weight + (1 - decay)
        average = {n: decay * a + (1 - decay) * scores[n] for n, a in average.items()}
        return {n: a / weight for n, a in average.items()}, (weight, average)

    return Criterion(init, update, transforms=True)
