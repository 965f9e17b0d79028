# SPDX-License-Identifier: Apache-2.0
"""The criteria that measure: from weights, gradients, or nothing at all."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxprune import trees
from jaxprune.base import (
    ConfigError,
    Graph,
    GraphError,
    Leaf,
    PyTree,
    Role,
    Scores,
    key_path,
)
from jaxprune.criteria import Criterion, Evidence, stateless


def floats(tree: PyTree) -> PyTree:
    """The tree in float32 at least; zeros for what is not floating point."""
    return jax.tree.map(
        lambda x: _wide(x) if _is_float(x) else jnp.zeros(x.shape), tree
    )


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def magnitude(p: Literal[1, 2] = 1, *, roles: tuple[Role, ...] = ("out",)) -> Criterion:
    """The p-norm of the trained weights of a channel: sum |w|, or sqrt(sum w^2).

    By default of those that make the channel (its filter, bias, batch-norm scale and
    bias); roles=('out', 'in') adds those that read it. Not normalised: sizes of groups
    differ, so put `normalize` behind it for a global selection. A group without trained
    weights in `roles` is measured by all that it has. Raises ConfigError for another p,
    GraphError naming the groups that have no trained weight at all.

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017 (p = 1).
    """
    if p not in (1, 2):
        raise ConfigError(f"magnitude(p={p!r}): p is 1 or 2")

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        counts = trees.channel_count(graph)
        bare = [n for n, count in counts.items() if not count.any()]
        if bare:
            raise GraphError(
                f"magnitude: nothing of {', '.join(map(repr, bare))} is trained; trace "
                "with what is frozen closed over by apply, so that no group has it, or "
                "give select scores of your own for it"
            )
        return ()

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores
        graph = evidence.graph
        power = jnp.abs if p == 1 else jnp.square
        tree = jax.tree.map(power, floats(evidence.variables))
        sums = trees.channel_sum(graph, tree, roles=roles)
        counts = trees.channel_count(graph, roles=roles)
        if not all(count.any() for count in counts.values()):
            every = trees.channel_sum(graph, tree)
            sums = {n: s if counts[n].any() else every[n] for n, s in sums.items()}
        return sums if p == 1 else jax.tree.map(jnp.sqrt, sums), state

    return Criterion(init, update)


def bn_scale() -> Criterion:
    """|gamma|, the scale of the normalisation behind a channel; the mean of several.

    Read from the trained vectors named 'scale' of each group. Raises GraphError naming
    the groups that have none.

    Source: Liu et al., "Learning efficient convolutional networks through network
    slimming", 2017.
    """

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        wanted = {leaf.path for leaf in graph.leaves if _is_scale(leaf)}
        bare = [
            name
            for name, group in graph.groups.items()
            if not any(slot.path in wanted for slot in group.slots)
        ]
        if bare:
            raise GraphError(
                f"bn_scale: no normalisation scale in {', '.join(map(repr, bare))}; "
                "magnitude() and taylor() work for any group"
            )
        return ()

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores

        def gamma(keys: Any, x: jax.Array) -> jax.Array:
            scale = key_path(keys)[-1:] == ("scale",) and x.ndim == 1
            return jnp.abs(x) if scale else jnp.zeros_like(x)

        graph = evidence.graph
        values = jax.tree_util.tree_map_with_path(gamma, floats(evidence.variables))
        sums = trees.channel_sum(graph, values, roles=("out",))
        return {n: sums[n] / _scales(graph, n) for n in graph.groups}, state

    return Criterion(init, update)


def _scales(graph: Graph, name: str) -> int:
    """How many normalisation scales each channel of the group has."""
    paths = {leaf.path for leaf in graph.leaves if _is_scale(leaf)}
    slots = graph.groups[name].slots
    return sum(s.indices.shape[1] for s in slots if s.path in paths)


def _is_scale(leaf: Leaf) -> bool:
    return leaf.trained and leaf.path[-1] == "scale" and len(leaf.shape) == 1


def taylor(
    power: Literal[1, 2] = 2,
    *,
    roles: tuple[Role, ...] = ("out", "in"),
    mean: bool = True,
) -> Criterion:
    """|sum of gradient * weight| ** power: what the loss does without the channel.

    The sum over theta[g,c] is the first-order change of a batch's loss when the channel
    is masked; power=2 squares it. With `mean`, the mean over the batches so far;
    without, the last batch's (for `ema`). Where the network is homogeneous (ReLU), the
    weights that make a channel and those that read it sum to the same, so `roles`
    changes scores by a factor only.

    Raises ConfigError for a missing loss or batch.

    Source: Molchanov et al., "Importance estimation for neural network pruning", 2019,
    eq. 8.
    """
    if power not in (1, 2):
        raise ConfigError(f"taylor(power={power!r}): power is 1 or 2")

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        return jnp.zeros(()), {n: jnp.zeros(g.size) for n, g in graph.groups.items()}

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores
        products = _gradient_times_weight(evidence)
        sums = trees.channel_sum(evidence.graph, products, roles=roles)
        new = {n: jnp.abs(s) ** power for n, s in sums.items()}
        if not mean:
            return new, state
        count, average = state
        count = count + 1
        average = {n: a + (new[n] - a) / count for n, a in average.items()}
        return average, (count, average)

    return Criterion(init, update)


def _gradient_times_weight(evidence: Evidence) -> PyTree:
    """variables * d loss / d variables; zeros for what is not floating point."""
    loss, batch = evidence.loss, evidence.batch
    if loss is None or batch is None:
        missing = "loss=" if loss is None else "batches="
        raise ConfigError(
            f"taylor needs {missing}; call score(taylor(), graph, variables, "
            "loss=lambda variables, batch: ..., batches=[...])"
        )
    leaves, treedef = jax.tree.flatten(evidence.variables)
    smooth = [_is_float(x) for x in leaves]

    def of(values: list[Any]) -> jax.Array:
        rest = iter(values)
        merged = [next(rest) if s else x for x, s in zip(leaves, smooth)]
        return loss(jax.tree.unflatten(treedef, merged), batch)

    values = [x for x, s in zip(leaves, smooth) if s]
    gradients = iter(jax.grad(of)(values))
    return jax.tree.unflatten(
        treedef,
        [
            _wide(x) * _wide(next(gradients)) if s else jnp.zeros(x.shape)
            for x, s in zip(leaves, smooth)
        ],
    )


def random() -> Criterion:
    """Uniform in [0, 1), from the key alone; ConfigError where that is missing."""

    def drawn(scores: Scores, evidence: Evidence) -> Scores:
        del scores
        if evidence.key is None:
            raise ConfigError("random needs a key: score(..., key=jax.random.key(0))")
        groups = evidence.graph.groups
        keys = jax.random.split(evidence.key, len(groups))
        return {
            n: jax.random.uniform(k, (g.size,))
            for k, (n, g) in zip(keys, groups.items())
        }

    return stateless(drawn)
