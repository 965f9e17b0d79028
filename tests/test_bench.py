# SPDX-License-Identifier: Apache-2.0
"""`bench`: what it counts and writes; never how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import cli, exits, trees
from jaxprune.base import ConfigError
from jaxprune.bench import as_markdown, bench_saved, write


def test_percentiles_are_those_of_the_calls():
    speed = jp.Speed(np.arange(1.0, 102.0), 0.5, None)
    assert [speed.percentile(q) for q in (0, 50, 90, 100)] == [1, 51, 91, 101]


def test_every_network_is_called_as_often_and_compiled_once():
    traced = []

    def network(name):
        def apply(v, x, train):
            traced.append((name, train))
            return jnp.tanh(x @ v["a"])

        return apply, {"a": jnp.ones((3, 5))}

    networks = {"dense": network("dense"), "pruned": network("pruned")}
    found = jp.bench(networks, jnp.ones((4, 3)), repeats=7, train=False)
    assert traced == [("dense", False), ("pruned", False)]
    assert list(found) == ["dense", "pruned"]
    for speed in found.values():
        assert speed.ms.shape == (7,)
        assert (speed.ms > 0).all() and speed.compile_s > 0
        assert speed.memory_bytes is None or speed.memory_bytes >= 4 * 5 * 4
        assert speed.peak_bytes is None or speed.peak_bytes >= 4 * 5 * 4
        assert speed.variables_bytes == 3 * 5 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    net = jp.models.build("segnet_basic", {"num_classes": 3, "widths": [4, 4, 4, 4]})
    x = jnp.zeros((1, 16, 16, 3))
    variables = net.init(jax.random.key(0), x)
    pruned = jp.prune(net.apply, variables, x, budget=jp.flops(0.5), train=False)
    network = {"name": "segnet_basic", "args": {"num_classes": 3, "widths": [4] * 4}}
    path = tmp_path_factory.mktemp("bench") / "net"
    jp.save(path, pruned, network=network)
    return path


def test_the_command_writes_table_and_json(folder, tmp_path, capsys):
    file = tmp_path / "bench.json"
    argv = ["bench", str(folder), "--size", "16x16", "--batch", "1,2"]
    assert cli.main([*argv, "--repeats", "3", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert capsys.readouterr().out.strip() == as_markdown(result)
    rows = [(row["batch"], row["network"]) for row in result["rows"]]
    assert rows == [(1, "dense"), (1, "pruned"), (2, "dense"), (2, "pruned")]
    page = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    for field in {*result, *result["rows"][0]}:  # the page says what each one is
        assert f"`{field}`" in page
    assert all(
        row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] for row in result["rows"]
    )


def test_what_is_missing_is_named(folder, tmp_path, capsys):
    with pytest.raises(ConfigError, match="no image size; give one: --size"):
        bench_saved(folder)
    with pytest.raises(ConfigError, match="--json .*nowhere"):
        write({}, tmp_path / "nowhere" / "x.json")
    for options, said in (
        ({"repeats": 0}, r"repeats=0\): must be 1"),
        ({"batches": ()}, r"batches=\(\)\): must be"),
        ({"batches": (1, 0)}, r"batches=\(1, 0\)\): must be"),
        ({"size": (1 << 20, 1 << 20)}, "8 image.* of 1048576x1048576 .*memory for"),
    ):
        with pytest.raises(ConfigError, match=said):
            bench_saved(folder, **options)
    with pytest.raises(ConfigError, match="repeats=0"):
        jp.bench({"net": (lambda v, x: x, {})}, jnp.ones(3), repeats=0)
    assert cli.main(["bench", str(tmp_path)]) == exits.BAD_INPUT
    assert "manifest.sha256.json: missing" in capsys.readouterr().err


def test_bytes_are_counted_where_the_leaves_lie(monkeypatch):
    tree = {"a": np.ones(3), "b": 2.0, "c": jnp.ones(2, jnp.bfloat16)}
    assert trees.nbytes(tree) == 24 + 4 + 4
    monkeypatch.setattr(trees.jnp, "asarray", pytest.fail)
    assert trees.nbytes({"a": np.ones(3)}) == 24
