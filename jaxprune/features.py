# SPDX-License-Identifier: Apache-2.0
"""The criteria that look at features: what the readers of a channel find in it.

They run the loss's own program (see `taps`), in which loops, branches and grouped
convolutions are not looked into: what only those read has no score, which is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import ConfigError, Graph, GraphError, Path, PyTree, Scores, Slot
from jaxprune.criteria import Criterion, Evidence
from jaxprune.measures import needed, square
from jaxprune.taps import Reading, taps

Found = dict[Path, list[dict[int, jax.Array]]]  # by leaf, by reading, by kernel axis


def activation(statistic: Literal["mean", "std", "apoz"] = "mean") -> Criterion:
    """A statistic of the features over images and positions, where a channel is read.

    'mean': of their absolute values. 'std': their standard deviation. 'apoz': the share
    that is not 0, one minus the average percentage of zeros. All that is read of a
    channel, every reader and batch weighing the same; what a consumer reads lies behind
    normalisation and activation function. Raises ConfigError for another statistic, a
    missing loss or batch, GraphError naming the groups that no convolution or matrix
    product reads plainly.

    Source: Molchanov et al., "Pruning convolutional neural networks for resource
    efficient inference", 2017, section 2.2 (activation); Hu et al., "Network trimming",
    2016, eq. 1 (APoZ).
    """
    if statistic not in _AVERAGED:
        known = ", ".join(_AVERAGED)
        raise ConfigError(f"activation({statistic!r}): the statistic is one of {known}")
    averaged = _AVERAGED[statistic]

    def look(reading: Reading) -> dict[int, _Moments]:
        return {k: _moments(averaged(reading.features), a) for k, a in reading.pairs}

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        zeros = {n: jnp.zeros(g.size) for n, g in graph.groups.items()}
        return jnp.zeros(()), {n: _Moments(z, z) for n, z in zeros.items()}

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores
        seen = _seen(evidence, "activation", look)
        count, known = state
        found = {}
        for name, readers in _readers(evidence.graph, seen, "activation").items():
            mine = [_pooled(*(m[s.indices] for m in v[a])) for s, a, v in readers]
            new = _pooled(*(jnp.stack(part, axis=-1) for part in zip(*mine)))
            found[name] = _joined(known[name], new, count)
        return {n: shown(m) for n, m in found.items()}, (count + 1, found)

    def shown(moments: _Moments) -> jax.Array:
        return jnp.sqrt(moments.variance) if statistic == "std" else moments.mean

    return Criterion(init, update)


# What of each feature is averaged; of 'std', its spread counts.
_AVERAGED: dict[str, Callable[[jax.Array], jax.Array]] = {
    "mean": jnp.abs,
    "std": lambda x: x,
    "apoz": lambda x: x != 0,
}


class _Moments(NamedTuple):
    """Mean and variance, each float[...].

    Variances about their own means: mean squares less squared means would cancel in
    float32 where a mean is far over the deviation.
    """

    mean: jax.Array
    variance: jax.Array


def _moments(features: jax.Array, axis: int) -> _Moments:
    """Of shape [length of the axis], over all other axes."""
    others = tuple(a for a in range(features.ndim) if a != axis)
    x = _single(features)
    return _Moments(x.mean(axis=others), x.var(axis=others))


def _pooled(mean: jax.Array, variance: jax.Array) -> _Moments:
    """Of several samples of one size, along the last axis."""
    return _Moments(mean.mean(axis=-1), variance.mean(axis=-1) + mean.var(axis=-1))


def _single(x: jax.Array) -> jax.Array:
    """float32, or complex64."""
    return x.astype(jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32)


def _joined(known: _Moments, new: _Moments, count: jax.Array) -> _Moments:
    """Of `count` samples and one more of their size (Chan et al., 1983, eq. 2.1)."""
    part = 1 / (count + 1)
    apart = new.mean - known.mean
    spread = (1 - part) * (known.variance + part * square(apart))
    return _Moments(known.mean + part * apart, spread + part * new.variance)


def reconstruction(positions: int = 128, steps: int = 48) -> Criterion:
    """How long a channel lasts as the LASSO selects those that rebuild what is read.

    With z[c] what channel c adds to its readers' outputs at `positions` sampled ones of
    each batch (all, where it has less), beta minimises

        ||sum z[c] - sum beta[c] z[c]||^2 / 2 + lambda ||beta||_1

    for `steps` values of lambda, in equal factors from the largest that keeps any
    channel to a thousandth of it. The score is the share of them at which beta[c] is
    not 0, plus a thousandth of its mean size there, which settles ties. It ranks the
    channels of a group; for ratios by group take select's scope='local'. Keeps [C, C]
    numbers a group. Channels are ranked by what the given network reads, all groups at
    once; the source chooses layer by layer, as `jaxprune.lasso_select` does.

    Raises ConfigError for a missing loss, batch or key, or numbers under 1; GraphError
    naming the groups that no convolution or matrix product reads plainly.

    Source: He et al., "Channel pruning for accelerating very deep neural networks",
    2017, eq. 2, all channels of the layers by their order instead of one lambda each.
    """
    if positions < 1 or steps < 2:
        raise ConfigError(
            f"reconstruction(positions={positions!r}, steps={steps!r}): at least 1, 2"
        )

    return _of_gram("reconstruction", positions, lambda gram: lasting(gram, steps))


def reconstruction_error(positions: int = 128) -> Criterion:
    """What the readers of a channel lose with it: ||z[c]||^2 / ||sum z||^2.

    z[c] is what channel c adds to its readers' outputs at `positions` sampled ones of
    each batch (all, where it has less); all are summed over readers, positions and
    batches, which weigh the same from that size on. The relative error
    when only c is cut and nothing refitted, so that groups compare. Keeps [C, C]
    numbers a group.

    Raises ConfigError for a missing loss, batch or key, or positions under 1;
    GraphError naming the groups that no convolution or matrix product reads plainly.

    Source: Luo et al., "ThiNet: a filter level pruning method for deep neural network
    compression", 2017, eq. 6, of single channels.
    """
    if positions < 1:
        raise ConfigError(f"reconstruction_error(positions={positions!r}): at least 1")

    def relative(gram: jax.Array) -> jax.Array:
        whole = gram.sum()
        return jnp.diagonal(gram) / jnp.where(whole > 0, whole, 1)

    return _of_gram("reconstruction_error", positions, relative)


def _of_gram(
    called: str, positions: int, scored: Callable[[jax.Array], jax.Array]
) -> Criterion:
    """Scores [C] of the matrix of <z[c], z[d]>, [C, C], over all batches so far."""

    def init(graph: Graph, variables: PyTree) -> PyTree:
        del variables
        sizes = {n: g.size for n, g in graph.groups.items()}
        return jnp.zeros((), int), {n: jnp.zeros((c, c)) for n, c in sizes.items()}

    def update(scores: Scores, state: PyTree, evidence: Evidence):
        del scores
        count, grams = state
        if evidence.key is None:
            raise ConfigError(
                f"{called} needs a key: score(..., key=jax.random.key(0))"
            )
        key = jax.random.fold_in(evidence.key, count)

        def look(reading: Reading) -> dict[int, jax.Array]:
            return {k: _added(reading, k, positions, key) for k, _ in reading.pairs}

        seen = _seen(evidence, called, look)
        readers = _readers(evidence.graph, seen, called)
        new = {}
        for name, mine in readers.items():
            # [n, C, outputs]; a channel of several indices adds what they all add.
            added = [v[a][:, slot.indices].sum(axis=2) for slot, a, v in mine]
            grown = [_einsum("nco,ndo->cd", z, z.conj()) for z in added]
            new[name] = sum(map(jnp.real, grown))
        grams = {n: g + new[n] for n, g in grams.items()}
        return {n: scored(g) for n, g in grams.items()}, (count + 1, grams)

    return Criterion(init, update, costly=True)


_einsum = functools.partial(jnp.einsum, precision="highest")


def _added(reading: Reading, axis: int, positions: int, key: Any) -> jax.Array:
    """[n, length of the kernel's axis, outputs]: what each of its indices adds."""
    rows = _single(reading.rows(positions, key))
    kernel = _single(reading.kernel)
    # Which index of the axis each row of the kernel's matrix belongs to.
    shape = [1] * kernel.ndim
    shape[axis] = kernel.shape[axis]
    line = np.broadcast_to(np.arange(kernel.shape[axis]).reshape(shape), kernel.shape)
    place = np.asarray(reading.matrix(line))[:, 0]
    order = np.argsort(place, kind="stable").reshape(kernel.shape[axis], -1)
    return _einsum("nck,cko->nco", rows[:, order], reading.matrix(kernel)[order])


def lasting(gram: jax.Array, steps: int, wanted: jax.Array | None = None) -> jax.Array:
    """[C]: how long each lasts along `lasso_path`, its size there settling ties.

    NaN where the matrix is not finite.
    """
    betas = lasso_path(gram, steps, wanted=wanted)
    size = jnp.abs(betas).mean(axis=0)
    scores = (betas != 0).mean(axis=0) + 1e-3 * size / (1 + size)
    # The path of what is not finite is 0 all along, which is a score like any other.
    known = jnp.isfinite(gram).all()
    if wanted is not None:
        known &= jnp.isfinite(wanted).all()
    return jnp.where(known, scores, jnp.nan)


def lasso_path(
    gram: jax.Array, steps: int, sweeps: int = 100, wanted: jax.Array | None = None
) -> jax.Array:
    """beta[steps, C] of beta' G beta / 2 - beta' b + lambda[s] ||beta||_1.

    b: `wanted`, [C]; by default G 1, so that beta = 1 is without an error. lambda falls
    from max |b| to a thousandth of it, the largest excluded; by coordinate descent
    (Friedman et al., 2010), each from the solution before, until a sweep changes no
    fit by more than rounding does, or for `sweeps`.
    """
    whole = gram.sum(axis=1) if wanted is None else wanted
    diagonal = jnp.diagonal(gram)
    safe = jnp.where(diagonal > 0, diagonal, 1)
    top = jnp.maximum(jnp.abs(whole).max(), jnp.finfo(gram.dtype).tiny)
    lambdas = top * (1e-3 ** (np.arange(1, steps + 1) / steps)).astype(gram.dtype)

    def coordinate(c: Any, carry: Any) -> Any:
        beta, product, strength = carry  # product = G beta
        rest = whole[c] - product[c] + diagonal[c] * beta[c]
        new = jnp.sign(rest) * jnp.maximum(jnp.abs(rest) - strength, 0) / safe[c]
        new = jnp.where(diagonal[c] > 0, new, 0)
        product = product + gram[:, c] * (new - beta[c])
        return beta.at[c].set(new), product, strength

    # What a step must move b - G beta by, of its largest, to count.
    least = 4 * jnp.finfo(gram.dtype).eps * top

    def sweep(carry: Any) -> Any:
        count, _, (beta, product, strength) = carry
        start = beta, product, strength
        new = jax.lax.fori_loop(0, len(gram), coordinate, start)
        moved = jnp.max(diagonal * jnp.abs(new[0] - beta))
        return count + 1, moved, new

    def going(carry: Any) -> Any:
        count, moved, _ = carry
        return (count < sweeps) & (moved > least)

    def step(beta: Any, strength: Any) -> Any:
        # The product anew, lest rounding adds up.
        start = beta, _einsum("cd,d->c", gram, beta), strength
        _, _, (beta, _, _) = jax.lax.while_loop(going, sweep, (0, jnp.inf, start))
        return beta, beta

    return jax.lax.scan(step, jnp.zeros_like(whole), lambdas)[1]


def _seen(evidence: Evidence, name: str, look: Callable[[Reading], Any]) -> Found:
    loss, batch = needed(evidence, name)
    _, seen = taps(loss, look)(evidence.variables, batch)
    return seen


def _readers(
    graph: Graph, seen: Found, name: str
) -> dict[str, list[tuple[Slot, int, dict[int, jax.Array]]]]:
    """Per group (slot, axis of the kernel, what was seen along its axes)."""
    readers = {
        group.name: [
            (slot, slot.axis, values)
            for slot in group.slots
            for values in seen.get(slot.path, [])
            if slot.axis in values
        ]
        for group in graph.groups.values()
    }
    check_read(name, readers)
    return readers


def check_read(name: str, readers: Mapping[str, Sequence[Any]]) -> None:
    """Raise GraphError for groups without a reader, for what `name` stands for."""
    bare = [n for n, found in readers.items() if not found]
    if bare:
        raise GraphError(
            f"{name}: nothing reads {', '.join(map(repr, bare))} but loops, branches, "
            "grouped convolutions or products of features; take another criterion"
        )
