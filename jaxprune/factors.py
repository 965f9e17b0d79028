# SPDX-License-Identifier: Apache-2.0
"""Kernels [window..., in, out] as chains of thinner ones, in NumPy's float64.

Sources and shapes: see `lowrank.factorize`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

_SWEEPS = 200  # of alternating least squares, at most


def largest_rank(
    shape: Sequence[int], strides: Sequence[int], method: str, ratio: float
) -> int:
    """The largest rank within the ratio of multiply-adds; 0 where there is none.

    Counted at the positions at which each factor runs: before a stride, more of them.
    """
    *window, read, out = shape
    size = math.prod(window)
    full = min(size * read, out)
    if method in ("separable", "cp"):
        if len(window) != 2 or min(window) < 2:
            return 0
        (kh, kw), (down, across) = window, strides
        if method == "separable":
            each = kh * read * across + kw * out
            full = min(kh * read, kw * out)
        else:
            each = read * down * across + kh * across + kw + out
            full = size * read * out
    else:
        each = size * read + out
    rank = int(ratio * size * read * out / each)
    return rank if rank < full else 0


def by_svd(kernel: np.ndarray, rank: int, seed: int) -> list[np.ndarray]:
    """[window..., in, rank] and [1..., rank, out], nearest in the Frobenius norm."""
    del seed
    *window, _, out = kernel.shape
    u, s, v = np.linalg.svd(kernel.reshape(-1, out), full_matrices=False)
    root = np.sqrt(s[:rank])
    first = (u[:, :rank] * root).reshape(*kernel.shape[:-1], rank)
    return [first, (root[:, None] * v[:rank]).reshape(*(1 for _ in window), rank, out)]


def separable(kernel: np.ndarray, rank: int, seed: int) -> list[np.ndarray]:
    """[kh, 1, in, rank] and [1, kw, rank, out], nearest in the Frobenius norm."""
    del seed
    kh, kw, read, out = kernel.shape
    matrix = kernel.transpose(0, 2, 1, 3).reshape(kh * read, kw * out)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    first = (u[:, :rank] * root).reshape(kh, 1, read, rank)
    second = (root[:, None] * v[:rank]).reshape(rank, kw, out).transpose(1, 0, 2)
    return [first, second[None]]


def by_cp(kernel: np.ndarray, rank: int, seed: int) -> list[np.ndarray]:
    """Alternating least squares, from random factors, until it moves no more."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(n, rank)) for n in kernel.shape]
    flat = [np.moveaxis(kernel, a, 0).reshape(kernel.shape[a], -1) for a in range(4)]
    size, before = np.sum(kernel**2), np.inf
    for _ in range(_SWEEPS):
        for axis in range(4):
            others = [parts[a] for a in range(4) if a != axis]
            gram = math.prod(p.T @ p for p in others)
            spread = np.einsum("ar,br,cr->abcr", *others).reshape(-1, rank)
            # A little of ridge: columns that grow alike would cancel each other.
            gram = gram + 1e-10 * np.trace(gram) / rank * np.eye(rank)
            parts[axis] = np.linalg.solve(gram, (flat[axis] @ spread).T).T
        error = size - np.sum((flat[3] @ spread) * parts[3])
        if before - error < 1e-7 * size:
            break
        before = error
    # The same size in each factor, so that training moves them alike.
    norms = [np.linalg.norm(p, axis=0) for p in parts]
    even = math.prod(norms) ** 0.25
    kh, kw, read, out = (p / n * even for p, n in zip(parts, norms, strict=True))
    return [
        read[None, None],
        kh[:, None, None],
        kw[None, :, None],
        out.T[None, None],
    ]


def by_responses(
    kernel: np.ndarray, covariance: np.ndarray, rank: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Factors that project answers on their principal axes, and these [out, r]."""
    _, axes = np.linalg.eigh(covariance)
    basis = axes[:, ::-1][:, :rank]
    last = basis.T.reshape(*(1 for _ in kernel.shape[:-2]), rank, -1)
    return [kernel @ basis, last], basis


METHODS: dict[str, Callable[[np.ndarray, int, int], list[np.ndarray]]] = {
    "svd": by_svd,
    "separable": separable,
    "cp": by_cp,
}
