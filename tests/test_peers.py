# SPDX-License-Identifier: Apache-2.0
"""Several processes: one that is lost, stuck, or refused, and the limits of waits."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxprune import cli, peers
from jaxprune.base import ConfigError, PeerError
from jaxprune.train import folder as folders
from jaxprune.train.config import Config

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def two_processes(program, folder):
    """Both of a pair, started on a folder and a free port, with their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", program, str(folder), port]
    how = {"env": ENV, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [subprocess.Popen([*command, str(i)], text=True, **how) for i in (0, 1)]


PAIR = """
import itertools, os, signal, sys, time
from pathlib import Path
import jax
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[3]))
import tinyrun
from jaxprune import peers
from jaxprune.base import ConfigError
from jaxprune.train import folder, loop
from jaxprune.train.config import Config
from jaxprune.train.progress import Progress

work, own = Path(sys.argv[1]), loop._batches


def stands_still(job, start):
    yield from itertools.islice(own(job, start), 5)
    time.sleep(2)  # the fifth step comes to its end
    os.kill(os.getpid(), signal.SIGSTOP)


if jax.process_index() == 1:  # before the step behind which both judge and save
    loop._batches = stands_still
with peers.patience(12):
    try:
        with folder.claim(Config(), work / "taken"):
            pass
    except ConfigError as error:
        print("refused", error, flush=True)
    progress = Progress(work, speaks=jax.process_index() == 0)
    loop.train(tinyrun.job(work, 10_000), tinyrun.variables(), progress)
"""


@pytest.mark.slow
def test_of_two_processes_both_are_refused_and_none_waits_for_ever(tmp_path):
    """A folder that is taken; then a process that stands still."""
    with folders.claim(Config(), tmp_path / "taken"):
        pair = two_processes(PAIR, tmp_path)
        try:
            output = pair[0].communicate(timeout=240)[0]
        finally:
            for process in pair:
                process.kill()
            other = pair[1].communicate()[0]
    assert pair[0].returncode == 75, output
    assert "lost or stuck (no training step within 12 s)" in output
    assert "refused" in output and "refused" in other
    beats = [tmp_path / f"heartbeat{i}.json" for i in ("", ".1")]
    signs = [json.loads(beat.read_text()) for beat in beats]
    assert [(s["process"], s["processes"]) for s in signs] == [(0, 2), (1, 2)]
    assert {s["pid"] for s in signs} == {process.pid for process in pair}


LOST = """
import os, sys
from pathlib import Path
import jax
import numpy as np
import jaxprune as jp
from jax.sharding import NamedSharding, PartitionSpec
from jaxprune import exits, path_io, peers, storage
from jaxprune.steps import Step
from jaxprune.train.step import make_mesh

work, number = Path(sys.argv[1]), int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, number)


def apply(v, x):
    return jax.nn.relu(x @ v["a"]) @ v["b"]


v = {"a": np.arange(32.0).reshape(4, 8), "b": np.ones((8, 4))}
graph = jp.trace(apply, v, np.ones((2, 4)))
keep = {"a": np.arange(8) % 2 == 0}
shares = jax.device_put(v, NamedSharding(make_mesh(), PartitionSpec("data")))
step = Step(0.0, keep, jp.cost(graph, keep), 0.0, 0.0)
path_io.save_variables(graph, work / "path.jsonl", 1, step, shares)
peers.barrier("written")
again = path_io.load_variables(graph, work / "path.jsonl", 1, step, v)
np.testing.assert_array_equal(again["a"], v["a"][:, ::2])
print("read", flush=True)

first = number == 0
own = {"f": np.float64([[-0.0, 1 / 3]]) if first else np.ones((1, 2)), "k": first}
said = peers.first_says({**own, "n": np.int8([number]), "none": np.ones(0)})
assert said["f"].tobytes() == np.float64([[-0.0, 1 / 3]]).tobytes()
assert said["f"].shape == (1, 2) and said["k"] and not said["n"].any()
assert peers.first_says(first) and not peers.first_says(not first)
both = peers.first_says({"shares": shares["a"], "x": np.float32(number)})
assert both["shares"] is shares["a"] and both["x"] == 0
print("agreed", flush=True)

if number == 1:  # dies once the arrays are written, and before it says so
    barrier = peers.barrier
    peers.barrier = lambda name: os._exit(9) if "wrote" in name else barrier(name)
try:
    storage.write(work / "step", {"x": np.ones(4)}, {"step.json": "{}"})
except BaseException as error:
    print(type(error).__name__, error, flush=True)
    exits.at_once(exits.code_of(error))
"""


@pytest.mark.slow
def test_a_process_that_dies_in_a_save_is_a_lost_peer_and_no_bad_input(tmp_path):
    """And what a path keeps of a tree in shares is written by both together."""
    pair = two_processes(LOST, tmp_path)
    try:
        first, second = (process.communicate(timeout=120)[0] for process in pair)
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [75, 9], first + second
    assert "read" in first and "read" in second
    assert "agreed" in first and "agreed" in second
    assert "PeerError another process of this run is lost" in first
    assert not (tmp_path / "step").exists()


def test_what_jax_says_of_a_lost_process_is_named(monkeypatch):
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce: Connection closed")
    with pytest.raises(jax.errors.JaxRuntimeError), peers.told():
        raise lost
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(PeerError, match="Gloo.*start all of them again"), peers.told():
        raise lost
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="memory"), peers.told():
        raise full


def test_waits_are_positive():
    assert cli.main(["run", "none.py", "--wait", "-1"]) == 2
    for bad in (0.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=f"--wait {bad:g}"), peers.patience(bad):
            pass
    with peers.patience(3):
        assert peers.limit() == 3
    assert peers.limit() == peers.WAIT == 600
