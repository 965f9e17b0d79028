# SPDX-License-Identifier: Apache-2.0
"""The choice of a step against tables written by hand; paths as JSON."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.base import BudgetError, ConfigError, Cost, DataError
from jaxprune.budget import channels, flops, params
from jaxprune.steps import Path, Step


def table(*rows):
    """A path of (risk, stderr, flops), widths 8 - i."""
    return Path(
        tuple(
            Step(float(i), {"a": np.arange(8) < 8 - i}, Cost(f, f // 2, f // 4), r, e)
            for i, (r, e, f) in enumerate(rows)
        )
    )


TABLE = table(
    (0.30, 0.02, 100),
    (0.28, 0.02, 80),
    (0.25, 0.03, 60),  # the least; within one standard error: 0.28
    (0.29, 0.02, 50),
    (0.27, 0.02, 40),  # the smallest that is
    (0.31, 0.02, 20),
    (float("nan"), 0.0, 10),
)


def test_choices_by_hand():
    assert TABLE.select("min") is TABLE.steps[2]
    assert TABLE.select("1se") is TABLE.steps[4]
    assert TABLE.select(flops(0.5)) is TABLE.steps[4]
    assert TABLE.select(flops(1.0)) is TABLE.steps[2]
    assert TABLE.select(flops(0.3)) is TABLE.steps[5]
    assert TABLE.select(params(0.2)) is TABLE.steps[5]
    assert TABLE.select(channels(0.625)) is TABLE.steps[4]
    with pytest.raises(BudgetError, match=r"the smallest has 0\.1000"):
        TABLE.select(flops(0.05))
    with pytest.raises(ConfigError, match="'1se', 'min', 'knee' or a budget"):
        TABLE.select("best")
    with pytest.raises(BudgetError, match="no budget kind 'flop'"):
        TABLE.select("knee", kind="flop")
    for rule in ("min", flops(0.5)):
        with pytest.raises(ConfigError, match="the path has no steps"):
            Path(()).select(rule)
    nothing = Path((Step(0.0, {}, Cost(9, 9, 9), 0.1, 0.1),))
    with pytest.raises(BudgetError, match="the first step has no channels"):
        nothing.select(channels(0.5))


def test_equal_risks_choose_the_smaller():
    path = table((0.3, 0.0, 100), (0.2, 0.0, 80), (0.2, 0.0, 60), (0.21, 0.0, 50))
    assert path.select("min") is path.steps[2]
    assert path.select("1se") is path.steps[2]


def reference(path, rule):
    """CART's choices by hand: (risk, stderr, cost) sorted by cost, the cheapest first.

    Breiman et al., section 3.4.3: the smallest tree whose risk is at most that of the
    least and its standard error.
    """
    rows = sorted((s.cost.flops, s.risk, s.stderr, i) for i, s in enumerate(path.steps))
    least = None
    for row in rows:
        if least is None or row[1] < least[1]:
            least = row
    if rule == "min":
        return path.steps[least[3]]
    for row in rows:
        if row[1] <= least[1] + least[2]:
            return path.steps[row[3]]


def lower_hull(points):
    """Andrew's monotone chain, the lower half, of points sorted by x."""
    hull = []
    for p in points:
        while len(hull) > 1 and (
            (hull[-1][0] - hull[-2][0]) * (p[1] - hull[-2][1])
            <= (hull[-1][1] - hull[-2][1]) * (p[0] - hull[-2][0])
        ):
            hull.pop()
        hull.append(p)
    return hull


RISKS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=2, max_size=9
)


@settings(max_examples=200, deadline=None)
@given(RISKS, st.integers(0, 99))
def test_choices_are_carts_and_the_knee_is_a_corner_of_the_hull(risks, seed):
    costs = np.random.default_rng(seed).choice(200, len(risks), replace=False) + 1
    costs = np.sort(costs)[::-1]
    path = table(*[(r / 20, e / 20, int(c)) for (r, e), c in zip(risks, costs)])
    assert path.select("min") is reference(path, "min")
    assert path.select("1se") is reference(path, "1se")

    x = (costs - costs[-1]) / (costs[0] - costs[-1])
    r = np.array([s.risk for s in path.steps])
    y = (r - r.min()) / (np.ptp(r) or 1)
    hull = lower_hull(list(zip(x[::-1], y[::-1])))
    start, end = np.array(hull[0]), np.array(hull[-1])
    along = (end - start) / np.linalg.norm(end - start)
    distance = [
        abs(along[0] * (q[1] - start[1]) - along[1] * (q[0] - start[0])) for q in hull
    ]
    chosen = path.select("knee")
    at = next(i for i, s in enumerate(path.steps) if s is chosen)
    if max(distance) < 1e-9:  # nothing lies below the line between the ends
        assert at == (len(risks) - 1 if r[-1] <= r[0] else 0)
    else:
        far = [q for q, d in zip(hull, distance) if d > max(distance) - 1e-9]
        assert any(np.allclose((x[at], y[at]), q) for q in far)


def test_the_knee_by_hand_and_in_another_cost():
    #   FLOPs 100 %, risk 0.0; 60, 0.1; 40, 0.2; 20, 1.0: scaled x = 1, .5, .25, 0.
    path = table((0.0, 0, 100), (0.1, 0, 60), (0.2, 0, 40), (1.0, 0, 20))
    # Below the line y = 1 - x: 0.5 - 0.1 = 0.4, and 0.75 - 0.2 = 0.55.
    assert path.select("knee") is path.steps[2]
    # Channels fall evenly, 8, 7, 6, 5: 2/3 of x: 1/3 - 0.1, and 2/3 - 0.2.
    assert path.select("knee", kind="channels") is path.steps[2]
    straight = table((0.0, 0, 100), (0.5, 0, 60), (1.0, 0, 20))
    assert straight.select("knee") is straight.steps[0]


def test_risks_that_are_no_numbers_are_never_chosen():
    nan, inf = float("nan"), float("inf")
    path = table((nan, 0.1, 100), (0.5, 0.1, 60), (-inf, 0.1, 50), (inf, 0.1, 20))
    for rule in ("min", "1se", "knee", flops(0.6)):
        assert path.select(rule) is path.steps[1]
    with pytest.raises(DataError, match="none of 2 steps has a finite risk"):
        table((nan, nan, 100), (inf, nan, 60)).select("min")
    with pytest.raises(DataError, match="none of 1 steps has a finite risk"):
        path.select(flops(0.2))


def test_too_few_images_for_a_standard_error():
    path = table((0.3, float("nan"), 100), (0.2, float("nan"), 80))
    path = Path(tuple(s._replace(counted=1) for s in path.steps))
    with pytest.raises(DataError, match=r"'1se'.*2 images or more, 1 counted.*'min'"):
        path.select("1se")
    assert path.select("min") is path.steps[1]


def test_json_round_trip():
    again = Path.from_json(TABLE.to_json())
    assert "NaN" not in TABLE.to_json()
    for one, two in zip(TABLE.steps[:-1], again.steps[:-1], strict=True):
        chex.assert_trees_all_equal(one.keep, two.keep)
        assert one._replace(keep=None) == two._replace(keep=None)
    assert np.isnan(again.steps[-1].risk)
    for text in ("{", "[]", '{"steps": [{"alpha": 1}]}', "3"):
        with pytest.raises(DataError, match="not a pruning path"):
            Path.from_json(text)


def test_a_keep_of_other_letters_is_no_keep():
    text = TABLE.to_json().replace("11111111", "1111x111")
    with pytest.raises(DataError, match="group 'a' is '1111x111'"):
        Path.from_json(text)
