# SPDX-License-Identifier: Apache-2.0
"""Kernels [window..., in, out] as chains of thinner ones, in NumPy's float64.

Sources and shapes: see `lowrank.factorize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_SWEEPS = 200  # of alternating least squares, at most
_RIDGE = 1e-4  # of the kernel regression, in units of the covariance's mean diagonal

Shape = tuple[int, ...]


class Axis(NamedTuple):
    """Positions along a window's axis: of the input, of the window, of the output.

    `at` is `after`, but for a transposed convolution, whose window stands at `before`.
    """

    before: int
    at: int
    after: int


def full_rank(method: str, shape: Sequence[int]) -> int:
    """The rank from which on nothing is left out, or 0 for kernels not of the kind."""
    *window, read, out = shape
    size = math.prod(window)
    if method in ("separable", "cp", "asymmetric3d"):
        if len(window) != 2 or min(window) < 2:
            return 0
        if method == "separable":
            return min(window[0] * read, window[1] * out)
        if method == "cp":
            # Of the four ways to write the kernel as a sum over all but one axis.
            return math.prod(shape) // max(shape)
    return min(size * read, out)


def shapes(method: str, shape: Sequence[int], rank: int) -> list[Shape]:
    """Of the factors at this rank."""
    *window, read, out = shape
    ones = (1,) * len(window)
    if method == "separable":
        return [(window[0], 1, read, rank), (1, window[1], rank, out)]
    if method == "cp":
        kh, kw = window
        return [
            (1, 1, read, rank),
            (kh, 1, 1, rank),
            (1, kw, 1, rank),
            (1, 1, rank, out),
        ]
    if method == "asymmetric3d":
        kh, kw = window
        inner = inner_rank(shape, rank)
        return [(kh, 1, read, inner), (1, kw, inner, rank), (1, 1, rank, out)]
    return [(*window, read, rank), (*ones, rank, out)]


def inner_rank(shape: Sequence[int], rank: int) -> int:
    """'asymmetric3d': of the window's two axes, given the rank of the channels.

    Both steps leave the same fraction of what they find, as in the paper.
    """
    kh, kw, read, out = shape
    left = rank * (kh * kw * read + out) / (kh * kw * read * out)
    fits = int(left * kh * kw * read * rank / (kh * read + kw * rank))
    return max(1, min(fits, kh * read, kw * rank))


def multiply_adds(factors: Sequence[Shape], axes: Sequence[Axis]) -> int:
    """Of a chain for one image, or of a single kernel: padding taps counted."""
    total = 0
    moves = movers(factors)
    for i, shape in enumerate(factors):
        along = [
            axis.before if i < move else axis.at if i == move else axis.after
            for axis, move in zip(axes, moves, strict=True)
        ]
        total += math.prod(along) * math.prod(shape)
    return total


def movers(factors: Sequence[Shape]) -> list[int]:
    """For each window axis the factor that moves along it, with stride and padding."""
    return [
        next((i for i, shape in enumerate(factors) if shape[axis] > 1), 0)
        for axis in range(len(factors[0]) - 2)
    ]


def by_svd(kernel: np.ndarray, rank: int, seed: int = 0) -> list[np.ndarray]:
    """[window..., in, rank] and [1..., rank, out], nearest in the Frobenius norm."""
    del seed
    *window, _, out = kernel.shape
    u, s, v = np.linalg.svd(kernel.reshape(-1, out), full_matrices=False)
    root = np.sqrt(s[:rank])
    first = (u[:, :rank] * root).reshape(*kernel.shape[:-1], rank)
    return [first, (root[:, None] * v[:rank]).reshape(*(1 for _ in window), rank, out)]


def separable(kernel: np.ndarray, rank: int, seed: int = 0) -> list[np.ndarray]:
    """[kh, 1, in, rank] and [1, kw, rank, out], nearest in the Frobenius norm."""
    del seed
    kh, kw, read, out = kernel.shape
    u, s, v = np.linalg.svd(_separated(kernel), full_matrices=False)
    root = np.sqrt(s[:rank])
    first = (u[:, :rank] * root).reshape(kh, 1, read, rank)
    second = (root[:, None] * v[:rank]).reshape(rank, kw, out).transpose(1, 0, 2)
    return [first, second[None]]


def _separated(kernel: np.ndarray) -> np.ndarray:
    """[kh * in, kw * out]"""
    kh, kw, read, out = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(kh * read, kw * out)


def spectrum(method: str, kernel: np.ndarray) -> np.ndarray:
    """Falling: what of the kernel's squares each rank adds."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    if method in ("separable", "asymmetric3d"):
        matrix = _separated(kernel)
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def by_cp(kernel: np.ndarray, rank: int, seed: int = 0) -> list[np.ndarray]:
    """Alternating least squares, from random factors, until it moves no more."""
    parts, _ = alternate(kernel, rank, seed)
    # The same size in each factor, so that training moves them alike.
    norms = [np.linalg.norm(p, axis=0) for p in parts]
    even = math.prod(norms) ** 0.25
    norms = [np.where(n > 0, n, 1) for n in norms]
    kh, kw, read, out = (p / n * even for p, n in zip(parts, norms, strict=True))
    return [
        read[None, None],
        kh[:, None, None],
        kw[None, :, None],
        out.T[None, None],
    ]


def alternate(
    kernel: np.ndarray, rank: int, seed: int
) -> tuple[list[np.ndarray], list[float]]:
    """Of each axis of the kernel [length, rank], and the squared error by sweep."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(n, rank)) for n in kernel.shape]
    last = np.moveaxis(kernel, 3, 0).reshape(kernel.shape[3], -1)
    size, errors = np.sum(kernel**2), [np.inf]
    for _ in range(_SWEEPS):
        for axis in range(4):
            others = [parts[a] for a in range(4) if a != axis]
            gram = math.prod(p.T @ p for p in others)
            # A little of ridge: columns that grow alike would cancel each other.
            ridge = 1e-10 * np.trace(gram) / rank
            gram = gram + (ridge or 1.0) * np.eye(rank)  # 1: of a kernel of zeros
            rest = _contracted(kernel, parts, axis)
            parts[axis] = np.linalg.solve(gram, rest.T).T
        spread = np.einsum("ar,br,cr->abcr", *parts[:3]).reshape(-1, rank)
        errors.append(float(np.sum((last - parts[3] @ spread.T) ** 2)))
        if errors[-2] - errors[-1] < 1e-7 * size:
            break
    return parts, errors[1:]


def _contracted(kernel: np.ndarray, parts: list[np.ndarray], axis: int) -> np.ndarray:
    """[length, rank]: the kernel times the parts of all axes but one.

    The longest first, so that no product of two long axes and the rank is made.
    """
    left = [a for a in range(4) if a != axis]
    longest = max(left, key=lambda a: kernel.shape[a])
    found = np.tensordot(kernel, parts[longest], (longest, 0))
    rest = [a for a in range(4) if a != longest]  # found's axes before the rank
    for other in left:
        if other != longest:
            place = rest.index(other)
            line = [1] * found.ndim
            line[place], line[-1] = parts[other].shape
            found = (found * parts[other].reshape(line)).sum(axis=place)
            rest.remove(other)
    return found


def predicted(kernel: np.ndarray, rank: int, seed: int = 0) -> list[np.ndarray]:
    """A fixed dictionary [window..., in, rank] and what is learned, [1..., rank, out].

    The dictionary predicts a filter from its weights at `rank` random places by kernel
    ridge regression, U = K[:, a] (K[a, a] + ridge)^-1. The covariance K of two weights
    is exp(-distance^2 / 2) of their places in the window, in pixels, times that of
    their input channels over the kernel's own filters and places. The learned part
    starts where the product is nearest to the kernel.
    """
    *window, read, out = kernel.shape
    flat = kernel.reshape(-1, out)
    by_channel = kernel.reshape(-1, read, out)
    channels = np.einsum("pio,pjo->ij", by_channel, by_channel)
    channels /= max(np.trace(channels) / read, 1e-30)
    places = np.stack(np.unravel_index(np.arange(len(flat)), (*window, read)), axis=1)
    known = np.random.default_rng(seed).permutation(len(flat))[:rank]
    apart = places[:, None, :-1] - places[None, known, :-1]
    near = np.exp(-np.sum(apart**2, axis=-1) / 2)
    covariance = near * channels[places[:, None, -1], places[None, known, -1]]
    inner = covariance[known] + _RIDGE * np.eye(rank)
    dictionary = np.linalg.solve(inner, covariance.T).T
    learned = np.linalg.lstsq(dictionary, flat, rcond=None)[0]
    return [
        dictionary.reshape(*kernel.shape[:-1], rank),
        learned.reshape(*(1 for _ in window), rank, out),
    ]


# Those that look at the kernel alone.
METHODS: dict[str, Callable[[np.ndarray, int, int], list[np.ndarray]]] = {
    "svd": by_svd,
    "separable": separable,
    "cp": by_cp,
    "predicted": predicted,
}
