# SPDX-License-Identifier: Apache-2.0
"""Training states by step: no damage and no kill goes unseen."""

import functools
import os
import re
import shutil
import signal
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from saved import assert_identical, damages, start, state

from jaxprune import checkpoint, disk, integrity
from jaxprune.base import CheckpointError


@pytest.fixture(scope="module")
def saved_steps(tmp_path_factory):
    store = checkpoint.open_store(tmp_path_factory.mktemp("store") / "train")
    for step in (10, 20):
        store.save(step, state(step), {"miou": step / 100, "next": [step, None]})
    return store.directory


def test_state_comes_back_as_it_was(saved_steps):
    store = checkpoint.open_store(saved_steps)
    tree, meta = store.restore(None, state())
    assert_identical(tree, state(20))
    assert meta == {"miou": 0.2, "next": [20, None], "step": 20} == store.meta(20)
    assert store.steps() == [10, 20] and store.latest() == 20
    assert_identical(store.restore(10, state())[0], state(10))


def test_state_comes_back_from_shapes_alone(tmp_path):
    store = checkpoint.open_store(tmp_path / "s")
    tree = {k: v for k, v in state(3).items() if k != "host"}
    store.save(0, tree)
    template = jax.eval_shape(lambda: {k: v for k, v in state().items() if k != "host"})
    again, _ = store.restore(0, template)
    assert_identical(again, tree)
    assert isinstance(again["opt"][1].inner_state[0], optax.ScaleByAdamState)
    assert isinstance(again["key"], jax.Array)


def test_numbers_take_the_form_of_the_template(tmp_path):
    store = checkpoint.open_store(tmp_path / "s")
    store.save(1, {"step": np.int64(5), "best": 0.25, "count": jnp.int32(3), "n": 4})
    template = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "best": np.float32(0),
        "count": 0,
        "n": np.zeros((), np.int16),
    }
    tree, _ = store.restore(1, template)
    wanted = {
        "step": jnp.int32(5),
        "best": np.float32(0.25),
        "count": 3,
        "n": np.array(4, np.int16),
    }
    assert_identical(tree, wanted)
    store.save(2, {"step": np.int64(2**40), "best": 0.25, "count": 3, "n": 4})
    with pytest.raises(CheckpointError, match="step: saved is 1099511627776"):
        store.restore(2, template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"a": {"b": jnp.ones(3), "c": jnp.ones(1)}}, "a/c of the template is not in"),
        ({}, "a/b of the checkpoint is not in the template"),
        ({"a": {"b": jnp.ones(4)}}, r"a/b: saved is float32\[3\].* has float32\[4\]"),
        ({"a": {"b": jnp.ones(3, jnp.int8)}}, r"a/b: saved is float32.* int8\[3\]"),
        ({"a": {"b": jax.random.key(0)}}, "a/b: saved is float32.* uint32.*fry"),
        ({"a": {"b": 1.0}}, r"a/b: saved is \[3\], the template has \[\]"),
        ({"a": [jnp.ones(3)]}, r"a/\[0\] of the template"),
    ],
)
def test_template_that_does_not_fit(tmp_path, template, message):
    store = checkpoint.open_store(tmp_path)
    store.save(1, {"a": {"b": jnp.ones(3)}})
    with pytest.raises(CheckpointError, match=message):
        store.restore(1, template)


@pytest.mark.parametrize(
    ("tree", "meta", "message"),
    [
        ({"a": {"b": "text"}}, {}, r"\['a'\]\['b'\]: a str can't be kept"),
        ({"a": np.array(["x"])}, {}, "a ndarray can't be kept"),
        ({(1, 2): jnp.ones(2)}, {}, "keys are strings or integers, not tuple"),
        ({}, {"f": print}, r"meta\['f'\] can't be kept as JSON"),
    ],
)
def test_what_cannot_be_kept_leaves_no_trace(tmp_path, tree, meta, message):
    store = checkpoint.open_store(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        store.save(1, tree, meta)
    assert store.steps() == [] and os.listdir(tmp_path) == []


def test_steps_kept(tmp_path):
    store = checkpoint.open_store(tmp_path / "s", keep_last=2, keep_best="miou")
    for step, miou in enumerate([0.1, 0.9, 0.3, float("nan"), 0.2]):
        store.save(step, {"x": jnp.ones(1)}, {"miou": miou})
    assert store.steps() == [1, 3, 4]
    every = checkpoint.open_store(tmp_path / "t", keep_last=None)
    for step in range(3):
        every.save(step, {}, {})
    assert every.steps() == [0, 1, 2]
    assert every.restore(2, {}) == ({}, {"step": 2})


def test_the_best_step_is_found_without_reading_arrays(tmp_path, monkeypatch):
    store = checkpoint.open_store(tmp_path, keep_last=1, keep_best="miou")
    for step, miou in enumerate([0.9, 0.1, 0.2]):
        store.save(step, {"x": jnp.ones(9)}, {"miou": miou})
    hashed = []
    digest = integrity._digest
    monkeypatch.setattr(
        integrity, "_digest", lambda f, **k: (hashed.append(f), digest(f, **k))[1]
    )
    store.save(3, {"x": jnp.ones(9)}, {"miou": 0.3})
    assert store.steps() == [0, 3]
    assert hashed and all(".3.partial" in str(file) for file in hashed)
    (tmp_path / "0" / "step.json").write_text("damaged")
    store.save(4, {"x": jnp.ones(9)}, {"miou": 0.2})
    assert store.steps() == [3, 4]


def test_wrong_steps_and_folders(tmp_path, saved_steps):
    store = checkpoint.open_store(saved_steps)
    with pytest.raises(CheckpointError, match="no step 15; there are: 10, 20"):
        store.restore(15, state())
    with pytest.raises(CheckpointError, match="no step; there are: none"):
        checkpoint.open_store(tmp_path / "new").restore(None, state(), fallback=True)
    assert checkpoint.open_store(tmp_path / "new").latest() is None
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="is no whole number"):
        store.save(-1, {})
    with pytest.raises(CheckpointError, match="20: the step exists"):
        store.save(20, state(20))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        checkpoint.open_store(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.Store(tmp_path / "file" / "s").save(1, {})
    with pytest.raises(CheckpointError, match="keep_last = 0"):
        checkpoint.open_store(tmp_path, keep_last=0)


def test_a_step_is_replaced_if_forced_or_damaged(tmp_path):
    store = checkpoint.open_store(tmp_path)
    store.save(1, {"x": jnp.zeros(2)})
    store.save(1, {"x": jnp.ones(2)}, force=True)
    assert_identical(store.restore(1, {"x": jnp.ones(2)})[0], {"x": jnp.ones(2)})
    (tmp_path / "1" / "step.json").write_text("{}")
    store.save(1, {"x": jnp.full(2, 2.0)})
    assert_identical(store.restore(1, {"x": jnp.ones(2)})[0], {"x": jnp.full(2, 2.0)})
    assert os.listdir(tmp_path) == ["1"]


def test_every_damage_of_a_step_is_named_and_survived(saved_steps, tmp_path, caplog):
    shutil.copytree(saved_steps, tmp_path / "copy")
    store = checkpoint.open_store(tmp_path / "copy")
    like = state()
    for number, file in enumerate(damages(store.directory / "20")):
        message = re.escape(str(file)) + ".*; step 10 is intact"
        with pytest.raises(CheckpointError, match=message):
            store.restore(None, like)
        if number % 40 == 0:
            caplog.clear()
            tree, meta = store.restore(None, like, fallback=True)
            assert meta["step"] == 10 and str(file) in caplog.text
            assert_identical(tree, state(10))
    for step in (10, 20):
        (store.directory / str(step) / integrity.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no step before it is intact"):
        store.restore(None, like, fallback=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("replace", [False, True])
def test_death_at_any_moment_leaves_a_complete_state(tmp_path, monkeypatch, replace):
    """Die at the n-th change of the disk, for every n; nothing is cleaned up then."""
    like, calls = {"x": jnp.zeros(2)}, {"left": 0}

    def dying(f):
        @functools.wraps(f)
        def wrapped(*args, **kwargs):
            if calls["left"] == 0:
                raise Killed
            calls["left"] -= 1
            return f(*args, **kwargs)

        return wrapped

    step, deaths = (1 if replace else 2), 0
    for n in range(40):
        store = checkpoint.open_store(tmp_path / f"{replace}{n}", keep_last=1)
        store.save(1, {"x": jnp.ones(2)})
        with monkeypatch.context() as patch:
            calls["left"] = n
            for owner, name in [
                (Path, "rename"),
                (Path, "mkdir"),
                (Path, "write_text"),
                (shutil, "rmtree"),
                (integrity, "_seal"),
                (disk, "sync_folder"),
                (integrity, "_digest"),
            ]:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                store.save(step, {"x": jnp.full(2, 2.0)}, force=True)
                done = True
            except Killed:
                done, deaths = False, deaths + 1
        tree, meta = store.restore(None, like)
        value = float(tree["x"][0])
        assert value in (1.0, 2.0) and (replace or meta["step"] == value)
        assert not done or value == 2.0
        store.save(3, {"x": jnp.full(2, 3.0)})
        assert sorted(os.listdir(store.directory)) == ["3"]
        if done:
            break
    assert done and deaths >= 8


WRITER = """
import sys, jax.numpy as jnp
from jaxprune import checkpoint
store = checkpoint.open_store(sys.argv[1])
step = (store.latest() or 0) + 1
while True:
    store.save(step, {"a": jnp.full((64, 64), step), "b": jnp.arange(9) + step})
    print(step, flush=True)
    step += 1
"""


def test_kill_leaves_the_latest_complete_step(tmp_path):
    store = checkpoint.open_store(tmp_path)
    like = {"a": jnp.zeros((64, 64), jnp.int32), "b": jnp.zeros(9, jnp.int32)}
    for delay in (0.004, 0.03):
        with start(WRITER, tmp_path) as process:
            reported = int(process.stdout.readline())
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
        reported = int(rest[-1]) if rest else reported
        tree, meta = store.restore(None, like)
        assert meta["step"] in (reported, reported + 1)
        chex.assert_trees_all_equal(
            tree,
            {"a": jnp.full((64, 64), meta["step"]), "b": jnp.arange(9) + meta["step"]},
        )


def test_every_folder_of_a_step_is_on_the_disk_before_it_gets_its_name(
    tmp_path, monkeypatch
):
    synced = []
    sync = disk.sync_folder
    monkeypatch.setattr(disk, "sync_folder", lambda p: (synced.append(p), sync(p)))
    checkpoint.open_store(tmp_path).save(1, state(0))
    partial, folder = tmp_path / ".1.partial", tmp_path / "1"
    inner = {p.relative_to(folder) for p in folder.rglob("*") if p.is_dir()}
    assert len(inner) > 1
    assert {p.relative_to(partial) for p in synced[:-2]} == inner
    assert synced[-2:] == [partial, tmp_path]
