# SPDX-License-Identifier: Apache-2.0
"""Graphs as text: the round trip, and every fault named."""

import copy
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toygraphs

from jaxprune import models
from jaxprune.base import (
    EDGES,
    Extent,
    Frozen,
    Graph,
    GraphError,
    Group,
    Leaf,
    Slot,
    Term,
)
from jaxprune.cost import cost
from jaxprune.graph_io import (
    graph_from_json,
    graph_table,
    graph_to_json,
    keep_from_text,
    keep_to_text,
)
from jaxprune.trace import trace

KERNEL = ("params", "a/b", "kernel")


def odd() -> Graph:
    """Indices of every kind, names that need care."""
    rng = np.random.default_rng(0)
    kinds = {
        "plain": np.arange(4)[:, None],
        "offset": np.arange(5, 9)[:, None],
        "flattened": np.arange(4)[:, None] + 4 * np.arange(3),
        "blocks": 3 * np.arange(4)[:, None] + np.arange(3),
        "backwards": np.arange(3, -1, -1)[:, None],
        "scattered": rng.permutation(12)[:8].reshape(4, 2),
        "one": np.array([[7, 3]]),
        'é"\n': np.array([[1], [4], [2], [3]]),
    }
    groups = {
        name: Group(name, len(x), (Slot(KERNEL, 1, x, "in"),), name != "blocks")
        for name, x in kinds.items()
    }
    leaves = (Leaf(KERNEL, (2, 12), "bfloat16"), Leaf(("s",), (), "int32", False))
    frozen = (Frozen(KERNEL, 0, 2, "the network's output"),)
    extents = (Extent(3), Extent(1, (("plain", 2), ("one", 1))))
    terms = (Term("flops", 2**70, extents, "conv"), Term("activation_bytes", 4, (), ""))
    return Graph(groups, frozen, leaves, terms)


def assert_same(a: Graph, b: Graph) -> None:
    assert list(a.groups) == list(b.groups)
    assert (a.frozen, a.leaves, a.terms) == (b.frozen, b.leaves, b.terms)
    for one, two in zip(a.groups.values(), b.groups.values(), strict=True):
        assert (one.name, one.size, one.exact) == (two.name, two.size, two.exact)
        for s, t in zip(one.slots, two.slots, strict=True):
            assert (s.path, s.axis, s.role) == (t.path, t.axis, t.role)
            np.testing.assert_array_equal(s.indices, t.indices)
            assert t.indices.dtype == np.int64 and t.indices.shape == s.indices.shape


@pytest.mark.parametrize("graph", [odd(), toygraphs.chain(3, 1, 8), Graph({}, (), ())])
def test_round_trip(graph):
    text = graph_to_json(graph)
    assert_same(graph, graph_from_json(text))
    assert graph_to_json(graph_from_json(text)) == text


def test_traced_network_round_trip():
    net = models.build("segnet", {"num_classes": 3, "widths": [2, 3, 4, 4, 4]})
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda: models.init(net, jax.random.key(0), (32, 32)))
    graph = trace(net.apply, variables, image, train=False)
    again = graph_from_json(graph_to_json(graph))
    assert_same(graph, again)
    assert cost(again) == cost(graph)
    assert "lambda" not in graph_to_json(graph)


def test_ranges_are_compact():
    wide = toygraphs.chain(4096)
    assert len(graph_to_json(wide)) < 2000


def faults():
    def put(value, *path):
        def change(record):
            *parents, last = path
            for name in parents:
                record = record[name]
            if value is KeyError:
                del record[last]
            else:
                record[last] = value

        return change

    slot = ("groups", 0, "slots", 0)
    yield put(KeyError, "groups"), "graph lacks the field 'groups'"
    yield put(KeyError, "version"), "graph lacks the field 'version'"
    yield put(2, "version"), "version 2 is written by"
    yield put(True, "version"), "version = True is no int"
    yield put({}, "groups"), "groups = {} is no list"
    yield put(3, "groups", 0), r"groups\[0\] is a int"
    yield put(KeyError, "groups", 1, "size"), r"groups\[1\] lacks the field 'size'"
    yield put(KeyError, "groups", 1, "name"), r"groups\[1\] lacks the field 'name'"
    yield put(KeyError, "groups", 0, "exact"), "group 'plain' lacks the field 'exact'"
    yield put(KeyError, "groups", 0, "slots"), "group 'plain' lacks the field 'slots'"
    yield put("offset", "groups", 0, "name"), "two groups are called 'offset'"
    yield put(-4, "groups", 0, "size"), "size = -4 is negative"
    yield (
        put(10**12, "groups", 0, "size"),
        "group 'plain'.*do not fit an axis of length 12",
    )
    yield (
        put(12, "groups", 1, "size"),
        "group 'offset'.*5 to 16 leave params/a/b/kernel",
    )
    yield put(5, "groups", 5, "size"), "group 'scattered'.*of 4 channels.*has 5"
    yield put(["no"], *slot, "path"), "group 'plain'.*no leaf has the path no"
    yield put([], *slot, "path"), "no list of names"
    yield put(2, *slot, "axis"), r"\(2, 12\) has no axis 2"
    yield put("both", *slot, "role"), "'both' is neither"
    yield put([[0], [1, 2]], *slot, "indices"), "not rows of 1 integers"
    yield put([[0], [1], [2], [12]], *slot, "indices"), "0 to 12 leave"
    yield put([[0], [1], [2], [-1]], *slot, "indices"), "-1 to 2 leave"
    yield put([[0], [1], [2], [1.5]], *slot, "indices"), "not rows"
    yield put([[0], [1], [2], [2**80]], *slot, "indices"), "not rows"
    yield put(7, *slot, "indices"), "indices = 7 is no dict"
    yield put([0, 1], *slot, "indices", "steps"), "do not fit"
    yield put([2**61, 1], *slot, "indices", "steps"), "do not fit"
    yield put(2**61, *slot, "indices", "n"), "do not fit"
    yield put([-1, 1], *slot, "indices", "steps"), "-3 to 0 leave"
    yield put([2.5, 1], "leaves", 0, "shape"), r"leaves\[0\]: shape"
    yield put("yes", "leaves", 0, "trained"), "trained = 'yes' is no bool"
    yield put(["x"], "frozen", 0, "path"), r"frozen\[0\]: no leaf has the path x"
    yield put("bytes", "terms", 0, "kind"), "kind = 'bytes' is unknown"
    yield put([[1]], "terms", 0, "extents"), "is not .fixed"
    yield put([[1, [["q", 1]]]], "terms", 0, "extents"), "there is no group 'q'"
    yield put([[1, [[[], 1]]]], "terms", 0, "extents"), "there is no group"


@pytest.mark.parametrize(("change", "message"), list(faults()))
def test_faults_are_named(change, message):
    record = json.loads(graph_to_json(odd()))
    change(record)
    with pytest.raises(GraphError, match=message):
        graph_from_json(json.dumps(record))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, None, b"\xff", "3", "[]"])
def test_text_that_is_no_graph(text):
    with pytest.raises(GraphError, match="not JSON|not a JSON object"):
        graph_from_json(text)


def test_no_damage_raises_anything_else():
    text = graph_to_json(odd())
    rng = np.random.default_rng(1)
    for _ in range(300):
        at = rng.integers(len(text))
        damaged = text[:at] + chr(rng.integers(32, 127)) + text[at + 1 :]
        for changed in (damaged, text[:at]):
            try:
                graph_from_json(changed)
            except GraphError:
                pass


def test_table():
    graph = toygraphs.chain(4, 10)
    frozen = [
        Frozen(("params", f"l{i}", name), axis, 3, "cumsum")
        for i in range(3)
        for name, axis in (("kernel", 0), ("kernel", 1))
    ]
    frozen += [Frozen(("params", "l2", "bias"), 0, 2, "sort")]
    frozen += [Frozen(("params", "l2", "bias"), 0, 2, cause) for cause in EDGES]
    graph = dataclasses.replace(graph, frozen=tuple(frozen))
    keep = graph.full() | {"l1": np.arange(10) < 7}
    assert graph_table(graph, keep).splitlines() == [
        "group     channels  kept  slots  exact",
        "l0               4     4      3  yes",
        "l1              10     7      3  yes",
        "2 groups        14    11      6",
        "",
        "frozen, the first such          modules  indices  cause",
        "params/l0/kernel[0], kernel[1]        3        3  cumsum",
        "params/l2/bias[0]                     1        2  sort",
    ]
    assert "kept" not in graph_table(graph)
    edges = dataclasses.replace(graph, frozen=tuple(frozen[-3:]))
    assert "frozen" not in graph_table(edges)
    assert graph_table(Graph({}, (), ())).splitlines()[-1].startswith("0 groups")


def test_graphs_are_equal_by_value_and_cannot_be_written_to():
    graph = odd()
    again = [
        Graph.from_json(graph.to_json()),
        copy.deepcopy(graph),
        copy.copy(graph),
        pickle.loads(pickle.dumps(graph)),
    ]
    for other in again:
        assert other == graph and hash(other) == hash(graph) and other is not graph
        for group in other.groups.values():
            assert group == graph.groups[group.name]
            for slot in group.slots:
                with pytest.raises(ValueError, match="read-only"):
                    slot.indices[0] = 1
    name, group = next(iter(graph.groups.items()))
    slot = group.slots[0]
    moved = dataclasses.replace(slot, indices=slot.indices[::-1])
    assert moved != slot and graph != "graph" and slot != 0
    slots = (moved, *group.slots[1:])
    groups = {**graph.groups, name: dataclasses.replace(group, slots=slots)}
    assert dataclasses.replace(graph, groups=groups) != graph
    backwards = dict(reversed(graph.groups.items()))
    assert dataclasses.replace(graph, groups=backwards) != graph


def test_a_slot_does_not_share_its_indices():
    indices = np.arange(4)[:, None]
    slot = Slot(KERNEL, 0, indices)
    indices[0] = 3
    assert slot.indices[0] == 0


def test_keeps_as_text():
    keep = {"a": np.array([1, 0, 1], bool), "b/c": np.array([0], bool)}
    assert keep_to_text(keep) == {"a": "101", "b/c": "0"}
    again = keep_from_text(json.loads(json.dumps(keep_to_text(keep))))
    assert list(again) == list(keep)
    for name in keep:
        np.testing.assert_array_equal(again[name], keep[name])
        assert again[name].dtype == bool
    for wrong in (None, ["1"], {"a": [1]}, {"a": "1 0"}, {"a": "12"}, {"a": 101}):
        with pytest.raises(GraphError, match="text of 0 and 1"):
            keep_from_text(wrong)


def test_the_table_says_where_channels_are_sets():
    graph = toygraphs.chain(4, 10)
    group = graph.groups["l0"]
    slots = [
        dataclasses.replace(s, indices=np.arange(4).reshape(2, 2)) for s in group.slots
    ]
    group = dataclasses.replace(group, size=2, slots=tuple(slots))
    graph = dataclasses.replace(graph, groups={**graph.groups, "l0": group})
    table = graph_table(graph).splitlines()
    assert table[-1] == "A channel is a set of several that only go together in: l0 (2)"
