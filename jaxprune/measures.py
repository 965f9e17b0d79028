# SPDX-License-Identifier: Apache-2.0
"""The criteria that measure: from weights, gradients, or nothing at all."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.base import (
    ConfigError,
    Graph,
    GraphError,
    Leaf,
    PyTree,
    Role,
    Scores,
    check_roles,
    key_path,
)
from jaxprune.criteria import Criterion, Evidence, stateless
from jaxprune.placement import is_numpy, power_sums


def floats(tree: PyTree) -> PyTree:
    """The tree in float32 at least; zeros for what is not floating point."""
    return jax.tree.map(
        lambda x: _wide(x) if _is_float(x) else jnp.zeros(jnp.shape(x)), tree
    )


def square(x: jax.Array) -> jax.Array:
    """|x|^2, real."""
    return jnp.real(x * jnp.conj(x)) if jnp.iscomplexobj(x) else jnp.square(x)


def _wide(x: Any) -> jax.Array:
    wide = jnp.promote_types(jnp.result_type(x), jnp.float32)
    return jnp.asarray(x, jax.dtypes.canonicalize_dtype(wide))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def magnitude(
    p: Literal[1, 2] = 1,
    *,
    roles: tuple[Role, ...] = ("out",),
    kernels: bool = False,
) -> Criterion:
    """The p-norm of the trained weights of a channel: sum |w|, or sqrt(sum w^2).

    By default of those that make the channel (its filter, bias, batch-norm scale and
    bias); roles=('out', 'in') adds those that read it. kernels: of kernels alone, which
    have two axes or more: the paper's norm of the filter, for which what stands behind
    a filter, and may undo its size, does not count. Not normalised: sizes of groups
    differ, so put `normalize` behind it for a global selection. A group without such
    weights in `roles` is measured by all that it has. Raises ConfigError for another p
    or role, GraphError naming the groups that have no trained weight at all.

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017, section 3.1
    (p = 1, kernels).
    """
    if p not in (1, 2):
        raise ConfigError(f"magnitude(p={p!r}): p is 1 or 2")
    check_roles(roles)

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores
        graph, tree = evidence.graph, evidence.variables
        if all(map(is_numpy, jax.tree.leaves(tree))):
            measure = functools.partial(trees.channel_sum, along=along)
            sums = _made_by(measure, graph, tree, roles, kernels)
            return sums if p == 1 else {n: np.sqrt(s) for n, s in sums.items()}, state
        tree = jax.tree.map(jnp.abs if p == 1 else square, floats(tree))
        sums = _made_by(trees.channel_sum, graph, tree, roles, kernels)
        return sums if p == 1 else jax.tree.map(jnp.sqrt, sums), state

    def along(x: np.ndarray, axis: int) -> np.ndarray:
        return power_sums(x if _is_float(x) else np.zeros(x.shape), axis, p)

    return Criterion(_trained("magnitude"), update, numpy=True)


def _trained(name: str) -> Any:
    """A criterion's init that raises for groups of which nothing is trained."""

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        counts = trees.channel_count(graph)
        bare = [n for n, count in counts.items() if not count.any()]
        if bare:
            raise GraphError(
                f"{name}: nothing of {', '.join(map(repr, bare))} is trained; trace "
                "with what is frozen closed over by apply, so that no group has it, or "
                "give select scores of your own for it"
            )
        return ()

    return init


def _made_by(
    measure: Any, graph: Graph, tree: PyTree, roles: tuple[Role, ...], kernels: bool
) -> dict[str, Any]:
    """What a channel's weights in `roles` measure; all of them, where it has none."""
    some = _of_kernels(graph) if kernels else graph
    found = measure(some, tree, roles=roles)
    counts = trees.channel_count(some, roles=roles)
    if all(count.any() for count in counts.values()):
        return found
    every = measure(graph, tree)
    return {n: f if counts[n].any() else every[n] for n, f in found.items()}


def _of_kernels(graph: Graph) -> Graph:
    """The graph as if nothing were trained but what has two axes or more."""
    leaves = [
        dataclasses.replace(x, trained=x.trained and len(x.shape) > 1)
        for x in graph.leaves
    ]
    return dataclasses.replace(graph, leaves=tuple(leaves))


def bn_scale() -> Criterion:
    """|gamma|, the scale of the normalisation behind a channel; the mean of several.

    Read from the trained vectors named 'scale' of each group. Raises GraphError naming
    the groups that have none.

    Source: Liu et al., "Learning efficient convolutional networks through network
    slimming", 2017, section 3.
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
    return leaf.trained and leaf.path[-1:] == ("scale",) and len(leaf.shape) == 1


def taylor(
    power: Literal[1, 2] = 2,
    *,
    roles: tuple[Role, ...] = ("out", "in"),
    mean: bool = True,
) -> Criterion:
    """|sum of gradient * weight| ** power: what the loss does without the channel.

    The sum is over theta[g,c], and over frozen weights of the channel, too; power=2
    squares it. With `mean`, the mean over the batches so far; without, the last batch's
    (for `ema`). The weights that read a channel sum to feature * d loss / d feature,
    the first-order change of the loss without it; where the network is homogeneous
    (ReLU, and norms by the batch's own statistics, or none), those that make it sum to
    the same. There the default is twice that change (behind norms by running statistics
    kernel and scale count on their own, and it is more), and roles=("in",) is the
    change itself anywhere; a group that has one of the roles alone is scaled
    to compare with the others.

    Raises ConfigError for a missing loss or batch, GraphError naming the groups that
    have no weight in `roles`.

    Source: Molchanov et al., "Importance estimation for neural network pruning", 2019,
    eq. 8.
    """
    if power not in (1, 2):
        raise ConfigError(f"taylor(power={power!r}): power is 1 or 2")
    check_roles(roles)

    def change(scores: Scores, evidence: Evidence) -> Scores:
        del scores
        loss, batch = needed(evidence, "taylor")
        products = _gradient_times_weight(loss, evidence.variables, batch)
        sums = _summed("taylor", evidence.graph, products, roles)
        return {n: jnp.abs(s) ** power for n, s in sums.items()}

    return _averaged(change) if mean else stateless(change)


def fisher(*, roles: tuple[Role, ...] = ("out", "in")) -> Criterion:
    """Half the mean over images of (sum of gradient * weight)^2: Fisher pruning.

    The loss's second-order change without the channel, the Hessian taken to be the
    Fisher information and the loss to be at a minimum: with roles=("in",), and by
    default four times of it, as for `taylor`. That one squares the mean of a batch,
    this one each image of it: batches are pytrees whose leaves have the images as their
    first axis, and `loss` is called with one at a time. All images of all batches count
    the same.

    Raises ConfigError for a missing loss or batch, or leaves of other first axes,
    GraphError as `taylor`.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, eq. 8.
    """

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        return jnp.zeros(()), {n: jnp.zeros(g.size) for n, g in graph.groups.items()}

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores
        loss, batch = needed(evidence, "fisher")
        lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
        if len(lengths) != 1 or lengths <= {(), (0,)}:
            raise ConfigError(
                "fisher: the leaves of a batch must have its images as their first "
                f"axis, this one's are {sorted(lengths)}"
            )

        def squares(image: Any) -> Scores:
            one = jax.tree.map(lambda x: x[None], image)
            products = _gradient_times_weight(loss, evidence.variables, one)
            sums = _summed("fisher", evidence.graph, products, roles)
            return {n: s**2 / 2 for n, s in sums.items()}

        each = jax.lax.map(squares, batch)
        count, total = state
        count = count + lengths.pop()[0]
        total = {n: t + each[n].sum(axis=0) for n, t in total.items()}
        return {n: t / count for n, t in total.items()}, (count, total)

    return Criterion(init, update)


def geometric_median(
    *, roles: tuple[Role, ...] = ("out",), kernels: bool = False
) -> Criterion:
    """The sum of the distances to all other channels of the group: FPGM.

    A channel near the geometric median of a group can be replaced by the others. Its
    vector is what of the trained weights makes it (`roles` and `kernels` as in
    `magnitude`; the paper's is the filter, kernels=True), and distances are Euclidean.
    Not normalised: the paper cuts as much of every layer, select's scope='local'; for a
    global selection see `normalize`.

    Raises GraphError naming the groups that have no trained weight.

    Source: He et al., "Filter pruning via geometric median for deep convolutional
    neural networks acceleration", 2019, eq. 6.
    """

    def distances(gram: jax.Array) -> jax.Array:
        norms = jnp.diagonal(gram)
        squares = norms[:, None] + norms[None, :] - 2 * gram
        return jnp.sqrt(jnp.maximum(squares, 0)).sum(axis=1)

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores
        tree = floats(evidence.variables)
        grams = _made_by(trees.channel_gram, evidence.graph, tree, roles, kernels)
        return {n: distances(gram) for n, gram in grams.items()}, state

    return Criterion(_trained("geometric_median"), update)


def lamp(*, roles: tuple[Role, ...] = ("out",), kernels: bool = False) -> Criterion:
    """The squared 2-norm over the sum of those that are not smaller: LAMP, by channel.

    In (0, 1]: the largest of each group has 1, so that a global selection never empties
    a group. Of equal ones the first counts as the smaller. `roles` and `kernels` as in
    `magnitude`. Raises GraphError naming the groups that have no trained weight.

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021,
    eq. 4, with channels for weights.
    """
    norm = magnitude(2, roles=roles, kernels=kernels)

    def relative(values: jax.Array) -> jax.Array:
        order = jnp.argsort(values)
        squares = jnp.square(values[order])
        rest = jnp.cumsum(squares[::-1])[::-1]
        return values.at[order].set(squares / jnp.where(rest > 0, rest, 1))

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        norms, state = norm.update(scores, state, evidence)
        return {n: relative(jnp.asarray(x)) for n, x in norms.items()}, state

    return Criterion(_trained("lamp"), update)


def measured(at_once: int = 1) -> Criterion:
    """What the loss really gains when a channel is masked, one by one; the mean.

    The mean over the batches so far of loss(without it) - loss(as it is): exact for a
    single channel, and below 0 where the network is better without. A pass for every
    channel and batch, `at_once` of them vectorised: for small networks, or few
    channels. Not finite where the network breaks, which `score` refuses.

    Raises ConfigError for a missing loss or batch, or `at_once` under 1.
    """
    if at_once < 1:
        raise ConfigError(f"measured(at_once={at_once!r}): at least 1")

    def rises_of(scores: Scores, evidence: Evidence) -> Scores:
        del scores
        loss, batch = needed(evidence, "measured")
        graph, variables = evidence.graph, evidence.variables
        now = loss(variables, batch)

        def rise(channel: jax.Array) -> jax.Array:
            first, keep = 0, {}
            for name, group in graph.groups.items():
                keep[name] = jnp.arange(first, first + group.size) != channel
                first += group.size
            return loss(trees.zeroed(graph, keep, variables), batch) - now

        rises = jax.lax.map(rise, jnp.arange(graph.channels), batch_size=at_once)
        ends = np.cumsum([g.size for g in graph.groups.values()])
        return dict(zip(graph.groups, jnp.split(rises, ends[:-1])))

    return _averaged(rises_of)


def _averaged(measure: Callable[[Scores, Evidence], Scores]) -> Criterion:
    """The mean of a measure over the batches so far."""

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        return jnp.zeros(()), {n: jnp.zeros(g.size) for n, g in graph.groups.items()}

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        new = measure(scores, evidence)
        count, average = state
        count = count + 1
        average = {n: a + (new[n] - a) / count for n, a in average.items()}
        return average, (count, average)

    return Criterion(init, update)


def needed(evidence: Evidence, name: str) -> tuple[Any, Any]:
    """The loss and the batch; ConfigError for a criterion that lacks one."""
    loss, batch = evidence.loss, evidence.batch
    if loss is None or batch is None:
        missing = "loss=" if loss is None else "batches="
        raise ConfigError(
            f"{name} needs {missing}; call score({name}(), graph, variables, "
            "loss=lambda variables, batch: ..., batches=[...])"
        )

    def checked(variables: PyTree, batch: Any) -> jax.Array:
        found = loss(variables, batch)
        if not jax.tree_util.all_leaves([found]) or jnp.shape(found) != ():
            shapes = jax.tree.map(jnp.shape, found)
            raise ConfigError(
                f"{name}: the loss returns arrays of shape {shapes}, not one number; "
                "reduce it, by jnp.mean, say, and return nothing beside it"
            )
        return found

    return checked, batch


def _gradient_times_weight(loss: Any, variables: PyTree, batch: Any) -> PyTree:
    """variables * d loss / d variables; zeros for what is not floating point.

    Of complex ones the real part, which is the loss's change.
    """
    leaves, treedef = jax.tree.flatten(variables)
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
            jnp.real(_wide(x) * _wide(next(gradients))) if s else jnp.zeros(x.shape)
            for x, s in zip(leaves, smooth)
        ],
    )


def _summed(
    name: str, graph: Graph, products: PyTree, roles: tuple[Role, ...]
) -> dict[str, Any]:
    """Products over the weights of each channel, frozen ones too, as if in all roles.

    Batch statistics are no weights: where the variables have no collections, as those
    of nnx, what is not trained and no product sums over.
    """
    collections = any(leaf.path[:1] == ("params",) for leaf in graph.leaves)
    slots = [slot for group in graph.groups.values() for slot in group.slots]
    read = {slot.path for slot in slots if slot.role == "in"}

    def weight(leaf: Leaf) -> bool:
        statistic = leaf.path[:1] == ("batch_stats",)
        statistic |= not (collections or leaf.trained or leaf.path in read)
        return not statistic and jnp.issubdtype(leaf.dtype, jnp.inexact)

    leaves = [dataclasses.replace(x, trained=weight(x)) for x in graph.leaves]
    graph = dataclasses.replace(graph, leaves=tuple(leaves))
    counts = [trees.channel_count(graph, roles=(role,)) for role in roles]
    found = {n: sum(bool(c[n].any()) for c in counts) for n in graph.groups}
    bare = [n for n, present in found.items() if not present]
    if bare:
        raise GraphError(
            f"{name}: nothing of {', '.join(map(repr, bare))} is a weight in the roles "
            f"{', '.join(roles)}; give select scores of your own for it"
        )
    sums = trees.channel_sum(graph, products, roles=roles)
    return {n: s * (len(roles) / found[n]) for n, s in sums.items()}


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
