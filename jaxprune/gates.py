# SPDX-License-Identifier: Apache-2.0
"""Gates: one trained number per channel, brought to zero by proximal steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import sparsity, steering, trees
from jaxprune.base import ConfigError, Graph, GraphError, Group, PyTree
from jaxprune.pricing import Weights, checked_weights, concrete, fitting
from jaxprune.sharded import fetched
from jaxprune.steering import Strength

# What is added to a product, by the names that it has in libraries.
_ADDED = ("bias", "b", "beta", "offset", "shift")


def init_gates(graph: Graph) -> dict[str, jax.Array]:
    """Gates {group: float32[C]} of ones: every channel passes unchanged."""
    return {n: jnp.ones(g.size, jnp.float32) for n, g in graph.groups.items()}


def gate(graph: Graph, gates: Mapping[str, Any], variables: PyTree) -> PyTree:
    """The variables with each channel scaled by its gate, once wherever it is read.

    The gate is folded into the trained kernels that read the channel. A group that none
    reads, such as queries and keys, has one of its makers scaled: the trained one of
    least rank, biases aside, and the biases beside it, which are known by their names
    (bias, b, beta, offset, shift). Of several kernels, that is right where they are
    multiplied, and not where they are added up, which a graph does not tell. What reads
    a channel otherwise, a norm over the channels or an elementwise product, sees the
    ungated value, until the gate is 0: then everything that belongs to the channel is
    0, and no gradient reaches it or its gate. So gates of 0 and 1 do what `mask` does.
    A kernel that both makes and reads a channel (tied embeddings) is scaled once, so
    that a gate between them counts twice there. Raises GraphError for gates that do not
    fit the graph.

    Source: Huang & Wang, "Data-driven sparse structure selection for deep neural
    networks", 2018. Theirs may leave 0 again; here 0 is final, as it is for `dead`.
    """
    sizes = {n: g.size for n, g in graph.groups.items()}
    gates = fitting(sizes, gates, "gates")
    gates = {
        n: g if np.ndim(g) else jnp.broadcast_to(g, (sizes[n],))
        for n, g in gates.items()
    }
    counts = trees.channel_count(graph, roles=("in",))
    read = {n: g for n, g in gates.items() if counts[n].any()}
    unread = {n: g for n, g in gates.items() if n not in read}
    variables = trees.channel_scale(graph, read, variables, roles=("in",))
    variables = trees.channel_scale(
        _one_maker(graph, unread), unread, variables, roles=("out",)
    )
    alive = {
        n: (g if isinstance(g, np.ndarray) else jnp.asarray(g)) != 0
        for n, g in gates.items()
    }
    return trees.zeroed(graph, alive, variables)


def _one_maker(graph: Graph, names: Collection[str]) -> Graph:
    """The graph of these groups, each at one product of its makers alone."""
    leaves = {leaf.path: leaf for leaf in graph.leaves}

    def reduced(group: Group) -> Group:
        makers = [s for s in group.slots if leaves[s.path].trained and s.role == "out"]
        added = [s for s in makers if s.path[-1] in _ADDED]
        products = [s for s in makers if s not in added]
        if products:
            one = min(products, key=lambda s: len(leaves[s.path].shape))
            makers = [one, *(s for s in added if s.path[:-1] == one.path[:-1])]
        return dataclasses.replace(group, slots=tuple(makers))

    return dataclasses.replace(
        graph, groups={n: reduced(graph.groups[n]) for n in names}, terms=()
    )


def proximal_gates(
    strength: Strength, weights: Weights | None = None, *, key: str | None = None
) -> optax.GradientTransformation:
    """Soft-thresholding, sign(z) max(0, |z| - strength w), last in a chain for gates.

    z = gates + updates. `strength` and the last one of a group are as in `proximal`, of
    plain gradients and momentum; behind Adam `preconditioned_gates` has the right step.
    `weights` {group: float or float[C]}: 1 by default, see also `flops_weights` and
    `repriced`, both with gates=True. key: of the gates in a dict of params, of which
    the others pass; None: the gates are all. Raises ConfigError for a negative
    strength, or where update is called without the gates; GraphError for weights that
    do not fit the gates.
    """
    _check(strength, weights)

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        if params is None:
            raise ConfigError(
                "proximal_gates needs the gates: tx.update(updates, state, gates)"
            )
        _check_gates("proximal_gates", params)
        arrived = {n: params[n] + updates[n] for n in params}
        shrunk, state = _thresholded(strength, weights, params, arrived, state)
        return {n: shrunk[n] - params[n] for n in params}, state

    def init(params: PyTree) -> Any:
        del params
        return steering.begun(strength)

    return _among("proximal_gates", optax.GradientTransformation(init, update), key)


def preconditioned_gates(
    tx: optax.GradientTransformation,
    strength: Strength,
    weights: Weights | None = None,
    *,
    steps: Callable[[PyTree, PyTree], PyTree],
    key: str | None = None,
) -> optax.GradientTransformation:
    """The optimiser `tx` of gates, then soft-thresholding in its own metric.

    Where `tx` moves gate i by lr d[i] times its (averaged) gradient, as Adam does, the
    step is sign(z) max(0, |z| - s w d), s = lr * lambda: `preconditioned` with blocks
    of one number. It rests where lambda w and the gradient balance; `proximal_gates`
    behind Adam, whose updates are as long whatever the gradient is, does not.

    tx: the whole optimiser, learning rate included. steps: as of `preconditioned`, such
    as `adam_steps()`. key: of the gates in a dict of params, of which `tx` moves the
    others too; None: the gates are all. Other arguments and errors as of
    `proximal_gates`; the state is (state of tx, state of the proximal step).
    """
    _check(strength, weights)
    tx = optax.with_extra_args_support(tx)

    def of(tree: PyTree) -> PyTree:
        return tree if key is None else tree[key]

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ConfigError(
                "preconditioned_gates needs the gates: tx.update(updates, state, gates)"
            )
        _check_key("preconditioned_gates", key, params)
        _check_gates("preconditioned_gates", of(params))
        updates, inner = tx.update(updates, state[0], params, **extra)
        before, more = of(params), of(updates)
        each = of(steering.checked_steps(steps(inner, params)))
        arrived = {n: before[n] + more[n] for n in before}
        shrunk, outer = _thresholded(strength, weights, before, arrived, state[1], each)
        new = {n: shrunk[n] - before[n] for n in before}
        return new if key is None else {**updates, key: new}, (inner, outer)

    def init(params: PyTree) -> Any:
        return tx.init(params), steering.begun(strength)

    return optax.GradientTransformationExtraArgs(init, update)


class AcceleratedState(NamedTuple):
    """`point` {group: float[C]}: lambda of the last step. `proximal`: its state."""

    point: PyTree
    proximal: Any


def accelerated_gates(
    strength: Strength,
    weights: Weights | None = None,
    *,
    momentum: float | Callable[[Any], Any] = 0.9,
    key: str | None = None,
) -> optax.GradientTransformation:
    """Accelerated proximal gradient for gates; last in a chain, behind plain gradients.

    With lambda' the gates, where the gradient is taken, and eta the learning rate,

        z(t)       = lambda'(t-1) - eta grad(lambda'(t-1))          what arrives
        v(t)       = S(z(t)) - lambda'(t-1) + mu v(t-1)
        lambda'(t) = S(z(t)) + mu v(t)

    S is soft-thresholding by strength * w, strength = eta * gamma. lambda(t) = S(z(t))
    is the sequence that converges; it is the state's `point`, and v(t) = lambda(t) -
    lambda(t-1), computed so that a gate that S leaves at 0 twice is exactly 0. The
    momentum is here: what stands before in the chain is optax.scale_by_learning_rate
    alone, no Adam and no momentum of its own.

    momentum: mu; or a function of the step count t, from 0: `lambda t: t / (t + 3)` is
    Nesterov's (k - 2) / (k + 1) counted from 1, with which the authors begin and which
    has the rate of 1/k^2 on convex problems; 0 is `proximal_gates`. Other arguments and
    errors as there.

    Source: Huang & Wang, "Data-driven sparse structure selection for deep neural
    networks", 2018. Their program besides cuts negative gates off at 0; here a gate
    may change its sign.
    """
    _check(strength, weights)
    if not callable(momentum) and not 0 <= momentum < 1:
        raise ConfigError(f"momentum={momentum!r}: must be in [0, 1)")

    def update(updates: PyTree, state: AcceleratedState, params: PyTree | None = None):
        if params is None:
            raise ConfigError(
                "accelerated_gates needs the gates: tx.update(updates, state, gates)"
            )
        _check_gates("accelerated_gates", params)
        steps = state.proximal.steps
        mu = momentum(steps) if callable(momentum) else momentum
        z = {n: params[n] + updates[n] for n in params}
        point, inner = _thresholded(strength, weights, params, z, state.proximal)
        ahead = {
            n: (p + mu * (p - state.point[n])).astype(p.dtype) for n, p in point.items()
        }
        return {n: ahead[n] - params[n] for n in params}, AcceleratedState(point, inner)

    def init(params: PyTree) -> AcceleratedState:
        return AcceleratedState(
            jax.tree.map(jnp.array, params), steering.begun(strength)
        )

    return _among("accelerated_gates", optax.GradientTransformation(init, update), key)


def gates_to_keep(gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The keep that cuts channels whose gate is exactly 0; no group is emptied.

    `shrink(graph, gates_to_keep(gates), gate(graph, gates, variables))` is the network.
    Raises GraphError for one gate for a whole group, which cannot be cut alone.
    """
    found = {n: fetched(g) for n, g in gates.items()}
    for name, own in found.items():
        if own.ndim != 1:
            raise GraphError(f"the gates of group {name!r} are {own.shape}, not [C]")
    return {n: sparsity.never_empty(g != 0, np.abs(g)) for n, g in found.items()}


def deaths(
    gates: Mapping[str, Any], weights: Weights | None = None
) -> dict[str, jax.Array]:
    """{group: float[C]}: the strengths s at which `proximal_gates` makes them 0.

    |z[g,c]| / w[g,c]; infinite where there is no penalty. weights: as of
    `proximal_gates`.
    """
    return steering.deaths_of(*_penalised(weights, gates, gates))


def _among(
    name: str, tx: optax.GradientTransformation, key: str | None
) -> optax.GradientTransformation:
    """`tx` for the gates alone, where they are params[key]; the other params pass."""
    if key is None:
        return tx

    def init(params: PyTree) -> Any:
        _check_key(name, key, params)
        return tx.init(params[key])

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        known = None if params is None else params[key]
        new, state = tx.update(updates[key], state, known)
        return {**updates, key: new}, state

    return optax.GradientTransformation(init, update)


def _check_key(name: str, key: str | None, params: Any) -> None:
    """Raises ConfigError for params without the gates."""
    if key is not None and key not in params:
        raise ConfigError(
            f"{name}: the params have no {key!r}; key= is the name of the gates among "
            f"{', '.join(map(str, params))}"
        )


def _check_gates(name: str, gates: Any) -> None:
    """Raises ConfigError for params that are more than the gates."""
    if not isinstance(gates, Mapping) or any(
        not jax.tree_util.all_leaves([gate]) for gate in gates.values()
    ):
        raise ConfigError(
            f"{name}: its params are the gates alone, {{group: float[C]}}; give them "
            f"an optimiser of their own, or say {name}(..., key=) for gates within "
            "other params"
        )


def _check(strength: Strength, weights: Weights | None) -> None:
    """Raises for a strength, or a target that it cannot reach with these weights."""
    steering.check_strength(strength)
    if isinstance(weights, Mapping):
        weights = concrete(weights)
        checked_weights({n: np.size(w) for n, w in weights.items()}, weights)
    if isinstance(strength, steering.Steering) and isinstance(weights, Mapping):
        known = {n: w for n, w in weights.items() if not isinstance(w, jax.core.Tracer)}
        strength.check({n: np.asarray(w) > 0 for n, w in known.items()})


def _penalised(
    weights: Weights | None, before: Mapping[str, Any], z: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sizes, weights) of the gates z, the weights being those of `before`."""
    if callable(weights):
        weights = weights(
            {n: jnp.maximum(jnp.sum(g != 0), 1) for n, g in before.items()}
        )
    counts = {n: np.size(g) for n, g in z.items()}
    own = checked_weights(counts, dict.fromkeys(z, 1.0) if weights is None else weights)
    return {n: jnp.abs(g) for n, g in z.items()}, own


def _thresholded(
    strength: Strength,
    weights: Weights | None,
    before: Mapping[str, Any],
    z: Mapping[str, Any],
    state: Any,
    each: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Any]:
    """(S(z), the state behind it), weights being those of the gates before.

    each: {group: float[C]}, the lengths of the optimiser's steps; 1 by default.
    """
    sizes, own = _penalised(weights, before, z)
    if each is not None:
        own = {n: w * each[n] for n, w in own.items()}
    s, state = steering.stepped(strength, state, lambda: steering.deaths_of(sizes, own))
    factors = {n: sparsity.shrinkage(sizes[n], s * own[n]) for n in z}
    return {n: (g * factors[n]).astype(g.dtype) for n, g in z.items()}, state
