# SPDX-License-Identifier: Apache-2.0
"""Low rank in what kernels answer: linear, through the ReLU, and layer after layer.

Zhang et al., "Accelerating very deep convolutional networks for classification and
detection", 2016. Rows of y are answers W x of the given network to what it reads, of
y^ those to what the already approximated layers before give. A layer that answers
M y^ + b, M of low rank, is two: the kernel W M1, then M2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.base import Apply, DataError, Path, PyTree, path_str
from jaxprune.behind import Answers, behind
from jaxprune.taps import drawn

_RIDGE = 1e-9  # in units of the mean variance of the answers
_WEIGHTS = (0.01,) * 25 + (1.0,) * 25  # of the relaxation, the paper's lambda


class Fit(NamedTuple):
    """y^ @ first @ last + offset: [out, r], [r, out], [out]."""

    first: np.ndarray
    last: np.ndarray
    offset: np.ndarray

    def __call__(self, y: np.ndarray) -> np.ndarray:
        return y @ self.first @ self.last + self.offset


class Sample(NamedTuple):
    """Answers [n, out] of one product, and what its ReLU is given; None: no ReLU."""

    answers: np.ndarray
    before: np.ndarray | None


def sampler(
    apply: Apply,
    batches: Sequence[Any],
    wanted: Collection[Path],
    positions: int,
    seed: int,
    kwargs: Mapping[str, Any],
) -> Callable[[PyTree], Callable[[Path], Sample]]:
    """variables -> (path -> Sample) at random positions of each batch, the same always.

    batches: of inputs, each an array or a tuple. Raises DataError where there is none.
    """
    if not batches:
        raise DataError("factorize: batches is empty (or was used up before)")
    keys = jax.random.split(jax.random.key(seed), len(batches))
    order = sorted(wanted)

    @jax.jit
    def collect(tree: PyTree, inputs: Any, key: Any) -> dict[str, Any]:
        def look(found: Answers) -> Any:
            if found.path not in wanted:
                return None
            y, own = found.rows(found.answers), order.index(found.path)
            at = drawn(len(y), positions, jax.random.fold_in(key, own))
            before = found.before
            return y[at], None if before is None else found.rows(before)[at]

        _, seen = behind(apply, look)(tree, *inputs, **kwargs)
        return {path_str(path): x for path, x in seen.items()}

    def seen_by(variables: PyTree) -> Callable[[Path], Sample]:
        inputs = [b if isinstance(b, tuple) else (b,) for b in batches]
        found = [collect(variables, i, k) for i, k in zip(inputs, keys, strict=True)]

        def of(path: Path) -> Sample:
            parts, before = zip(*(x[path_str(path)] for x in found), strict=True)
            answers = _joined(parts)
            if not np.isfinite(answers).all():
                raise DataError(
                    f"factorize: what {path_str(path)} answers to the batches is not "
                    "finite; are they, and the variables?"
                )
            return Sample(answers, None if before[0] is None else _joined(before))

        return of

    return seen_by


def _joined(parts: Sequence[Any]) -> np.ndarray:
    return np.concatenate(parts).astype(np.float64)


def spectrum(answers: np.ndarray, biased: bool) -> np.ndarray:
    """Falling: the eigenvalues of the answers' covariance (about 0 without a bias)."""
    y = answers - answers.mean(axis=0) if biased else answers
    return np.linalg.eigvalsh(y.T @ y / len(y))[::-1]


def reduced_rank(
    given: np.ndarray, wanted: np.ndarray, rank: int, fixed: np.ndarray | None = None
) -> Fit:
    """The least squares fit of `wanted` by a map of `given` of this rank (GSVD).

    given, wanted: [n, out]. fixed: the offset, if it is not to be fitted.
    """
    if fixed is None:
        means = given.mean(axis=0), wanted.mean(axis=0)
    else:
        means = np.zeros(given.shape[1]), fixed
    y, z = given - means[0], wanted - means[1]
    gram = y.T @ y / len(y)
    gram += (_RIDGE * np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))
    whole = np.linalg.solve(gram, y.T @ z / len(y))
    # Of the best fit of full rank, the principal axes.
    axes = np.linalg.eigh(whole.T @ gram @ whole)[1][:, ::-1][:, :rank]
    first, last = whole @ axes, axes.T
    return Fit(first, last, means[1] - means[0] @ first @ last)


def nearest(target: np.ndarray, given: np.ndarray, weight: float) -> np.ndarray:
    """Element by element, the z of least (r(target) - r(z))^2 + weight (z - given)^2.

    The better of the two sides of 0, on each of which it is a parabola.
    """
    goal = np.maximum(target, 0)
    below = np.minimum(given, 0)
    above = np.maximum((weight * given + goal) / (weight + 1), 0)
    costs = [
        goal**2 + weight * (below - given) ** 2,
        (goal - above) ** 2 + weight * (above - given) ** 2,
    ]
    return np.where(costs[0] < costs[1], below, above)


def rectified(
    given: np.ndarray,
    target: np.ndarray,
    rank: int,
    fixed: np.ndarray | None = None,
    weights: Sequence[float] = _WEIGHTS,
) -> tuple[Fit, list[float]]:
    """The fit of least mean |r(target) - r(fit(given))|^2 found, r = max(0, .).

    By turns z = nearest(...) and a fit of z of this rank, from the linear solution on;
    the weight of |z - fit|^2 grows. Returns the best of all, never worse on these rows
    than the linear one, and the relaxed objective after each turn, which falls as long
    as the weight stays.
    """

    def loss(fit: Fit) -> float:
        error = np.maximum(target, 0) - np.maximum(fit(given), 0)
        return float(np.mean(np.sum(error**2, axis=1)))

    fit = reduced_rank(given, target, rank, fixed)
    best, least, relaxed = fit, loss(fit), []
    for weight in weights:
        z = nearest(target, fit(given), weight)
        fit = reduced_rank(given, z, rank, fixed)
        apart = np.mean(np.sum((z - fit(given)) ** 2, axis=1))
        error = np.maximum(target, 0) - np.maximum(z, 0)
        relaxed.append(float(np.mean(np.sum(error**2, axis=1)) + weight * apart))
        now = loss(fit)
        if now < least:
            best, least = fit, now
    return best, relaxed


class Replacement(NamedTuple):
    """[out, r] behind the kernel's own outputs, [r, out], and what the bias gains."""

    first: np.ndarray
    last: np.ndarray
    bias: np.ndarray
    relu: bool


def replacement(
    own: Sample, seen: np.ndarray, rank: int, *, biased: bool, relu: bool
) -> Replacement:
    """M and b for one layer.

    own: of the given network; seen: y^ [n, out]. biased: whether there is a bias that
    can take b. relu: whether to fit what the ReLU makes of the answers, where one
    directly follows; else, and where what lies between is not affine by channel, the
    answers.
    """
    line = None
    if relu and own.before is not None:
        line = _line(own.answers, own.before)
    if line is None or own.before is None:
        fixed = None if biased else np.zeros(seen.shape[1])
        fit = reduced_rank(seen, own.answers, rank, fixed)
        return Replacement(fit.first, fit.last, fit.offset, False)
    slope, offset = line
    fit, _ = rectified(seen, own.before, rank, None if biased else offset)
    # Back through before = slope * answers + offset; what has no slope is constant.
    slope = np.where(np.abs(slope) <= 1e-6 * np.abs(slope).max(), 1.0, slope)
    return Replacement(fit.first, fit.last / slope, (fit.offset - offset) / slope, True)


def _line(y: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Slope and offset [out] of u in y, or None where they make no line."""
    deviation = y - y.mean(axis=0)
    variance = np.mean(deviation**2, axis=0)
    dead = variance <= 1e-12 * max(variance.max(), 1e-30)
    slope = np.mean(deviation * (u - u.mean(axis=0)), axis=0)
    slope = np.where(dead, 1.0, slope / np.where(dead, 1.0, variance))
    offset = u.mean(axis=0) - slope * y.mean(axis=0)
    error = u - slope * y - offset
    if np.sqrt(np.mean(error**2)) > 1e-2 * np.sqrt(np.mean(u**2)) + 1e-30:
        return None
    return slope, offset
