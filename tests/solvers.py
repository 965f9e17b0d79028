# SPDX-License-Identifier: Apache-2.0
"""Solvers by SciPy of the problems that jaxprune solves otherwise."""

from __future__ import annotations

import numpy as np
import scipy.optimize


def by_bounded_descent(
    gram: np.ndarray, strength: float, wanted: np.ndarray | None = None
) -> np.ndarray:
    """The lasso's beta as the difference of two vectors that are not negative.

    Of beta' G beta / 2 - beta' wanted + strength ||beta||_1; wanted is G 1 by default.
    """
    c = len(gram)
    wanted = gram.sum(axis=1) if wanted is None else wanted

    def value(parts: np.ndarray) -> tuple[float, np.ndarray]:
        beta = parts[:c] - parts[c:]
        slope = wanted - gram @ beta
        risk = beta @ (gram @ beta) / 2 - beta @ wanted + strength * parts.sum()
        return risk, strength + np.concatenate([-slope, slope])

    found = scipy.optimize.minimize(
        value,
        np.zeros(2 * c),
        jac=True,
        bounds=[(0, None)] * (2 * c),
        options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000},
    )
    return found.x[:c] - found.x[c:]
