# SPDX-License-Identifier: Apache-2.0
"""A few places of `benchmarks/damage.py`: all damage is found, and named."""

import collections

import pytest

from benchmarks import damage

pytest.importorskip("flatbuffers")


def test_harm_at_any_place_is_found_and_named(tmp_path):
    counts = damage.campaign(tmp_path, places=3)
    assert set(counts) == {"saved network", "training state", "export"}
    for name, found in counts.items():
        assert {outcome for _, outcome in found} == {"found"}, (name, found)
        kinds = collections.Counter(kind for kind, _ in found)
        once = {"deleted", "renamed", "linked", "emptied", "swapped"}
        assert set(kinds) >= once | {"flipped"}
        assert found.total() >= 20
    assert sum(found.total() for found in counts.values()) >= 180
