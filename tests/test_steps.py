# SPDX-License-Identifier: Apache-2.0
"""The choice of a step against tables written by hand; paths as JSON."""

import chex
import numpy as np
import pytest

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
    with pytest.raises(ConfigError, match="'1se', 'min' or a budget"):
        TABLE.select("best")


def test_equal_risks_choose_the_smaller():
    path = table((0.3, 0.0, 100), (0.2, 0.0, 80), (0.2, 0.0, 60), (0.21, 0.0, 50))
    assert path.select("min") is path.steps[2]
    assert path.select("1se") is path.steps[2]


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
