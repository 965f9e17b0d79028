# SPDX-License-Identifier: Apache-2.0
"""Faults: kills, full disks, lost processes, losses that are not finite, exit codes."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tinyrun

from jaxprune import (
    checkpoint,
    cli,
    data,
    disk,
    exits,
    path_io,
    predict,
    report,
    streams,
)
from jaxprune.base import (
    CheckpointError,
    ConfigError,
    Cost,
    DataError,
    DiskError,
    NonFinite,
    PeerError,
)
from jaxprune.data import cache
from jaxprune.steps import Step
from jaxprune.train import folder as folders
from jaxprune.train import loop
from jaxprune.train import step as steps
from jaxprune.train.config import Config, Fit
from jaxprune.train.progress import Progress

ROOT = Path(__file__).parents[1]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
FULL = Path("/dev/full")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The same small programs are compiled over and over: keep them."""
    with tinyrun.compilations(tmp_path_factory.mktemp("compiled")):
        yield


def fit(folder: Path, epochs: float = 4, **fields) -> steps.State:
    """A training of 3 steps an epoch, saved at the end of each."""
    job = tinyrun.job(folder, epochs)
    recipe = Fit(**{**vars(job.fit), **fields})
    job = tinyrun.job(folder, epochs, fit=recipe)
    return loop.train(job, tinyrun.variables(), Progress(folder))


def rows(folder: Path, *leave_out: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    gone = (*tinyrun.TIMED, *leave_out)
    return [{k: v for k, v in json.loads(s).items() if k not in gone} for s in lines]


# Kills.


@pytest.mark.slow
def test_killed_runs_end_in_the_same_network():
    """A few of docs/faults.md's, by the command: its kills at the least."""
    command = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "4"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^4 kills of \d runs: all bit-identical", done.stdout, re.M)


def test_sigterm_outside_of_a_training_ends_with_75():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, exits.resumable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before


# Losses that are not finite.


def poisoned(monkeypatch, *bad: int, order: list[int] | None = None) -> None:
    """Batches of these numbers are NaN; `order`: of the numbers that come instead."""
    made = loop._batches

    def batches(job, start):
        fresh = made(job, 0)
        known = [next(fresh) for _ in range(20)]
        wanted = order or range(20)
        for number in list(wanted)[start:]:
            batch = known[number]
            image = np.float32(batch["image"])
            yield {**batch, "image": image * np.nan if number in bad else image}

    monkeypatch.setattr(loop, "_batches", batches)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """(folder, state) of a training on the batches that are left when 7 and 9 are NaN.

    Saved at steps 3, 6, 9: batch 7, of step 8, takes 6 with it, and 9 takes 8.
    """
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, order=[0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15])
        return folder, fit(folder)


def test_what_led_to_nan_is_skipped(skipped, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 7, 9)
    found = fit(tmp_path, on_nan="skip")
    chex.assert_trees_all_equal(found, skipped[1])
    shown = capsys.readouterr().out
    assert "train: not finite at step 8; back at step 6" in shown
    assert "(2 of 3 times)" in shown
    assert [r["skipped"] for r in rows(tmp_path) if "skipped" in r] == [4, 4]
    assert rows(tmp_path, "skipped") == rows(skipped[0])


def test_stops_change_nothing_of_what_is_skipped(skipped, tmp_path, monkeypatch):
    """Saved by signals in mid-epoch too, before the steps gone back to and behind."""
    poisoned(monkeypatch, 7, 9)
    made, seen = steps.put_batch, []
    for after in (5, 7, 2):

        def put_batch(mesh, batch, after=after):
            seen.append(1)
            if len(batch["image"]) == 8 and len(seen) == after:
                os.kill(os.getpid(), signal.SIGTERM)
            return made(mesh, batch)

        seen.clear()
        monkeypatch.setattr(steps, "put_batch", put_batch)
        with pytest.raises(SystemExit):
            fit(tmp_path, on_nan="skip")
    monkeypatch.setattr(steps, "put_batch", made)
    chex.assert_trees_all_equal(fit(tmp_path, on_nan="skip"), skipped[1])
    assert rows(tmp_path, "skipped") == rows(skipped[0])


def test_rollbacks_have_a_limit_and_may_lead_to_the_start(tmp_path, monkeypatch):
    poisoned(monkeypatch, 1, 4, 5)
    with pytest.raises(NonFinite, match="at step 1 ") as bad:
        fit(tmp_path, on_nan="skip", rollbacks=2)
    # Batches 0 and 1 go, then 2, 3 and 4, then it stops at 5, of step 1.
    assert bad.value.step == 1 and "no checkpoint yet" in str(bad.value)
    assert "on_nan" not in str(bad.value)
    assert checkpoint.open_store(tmp_path / "checkpoints" / "train").latest() is None


@pytest.mark.parametrize("step, saved", [(8, 6), (9, 6), (12, 9)])
def test_a_stop_names_the_last_save_from_which_it_goes_on(
    tmp_path, monkeypatch, capsys, step, saved
):
    """In mid-epoch, at a step that is to be saved, and at the last one."""
    whole = fit(tmp_path / "whole")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned(patch, step - 1)
        told = rf"train: the loss .* at step {step} \(step {saved} is saved\)"
        for _ in range(2):  # the same command goes as far as that, and no further
            with pytest.raises(NonFinite, match=told) as bad:
                fit(folder)
        assert bad.value.step == step
    store = checkpoint.open_store(folder / "checkpoints" / "train")
    assert store.steps() == [saved - 3, saved]
    state, _ = store.restore(saved, whole)
    # What a training of all the steps has at that one, which ends there by itself.
    begun = tinyrun.job(tmp_path / "begun", 4, until=saved)
    expected = loop.train(begun, tinyrun.variables(), Progress(begun.workdir))
    chex.assert_trees_all_equal(state, expected)
    chex.assert_tree_all_finite(state.variables)
    # With a lower rate, or with what led there mended.
    lower = shutil.copytree(folder, tmp_path / "lower")
    capsys.readouterr()
    found = fit(lower, lr=1e-3)
    assert f"train: resumed at step {saved} of 12" in capsys.readouterr().out
    assert int(found.step) == 12
    chex.assert_tree_all_finite(found.variables)
    chex.assert_trees_all_equal(fit(folder), whole)
    assert rows(folder) == rows(tmp_path / "whole")


def overflowed(monkeypatch) -> None:
    """A batch that is NaN has a loss, but an infinite variance, as huge values have."""
    made = steps.make_step

    def make_step(*args, **more):
        inner = made(*args, **more)

        def step(state, batch, *rest):
            bad = jnp.isnan(batch["image"]).any()
            batch = {**batch, "image": jnp.nan_to_num(batch["image"])}
            after, loss = inner(state, batch, *rest)
            stats = after.variables["batch_stats"]
            stats["norm"]["var"] = jnp.where(bad, jnp.inf, stats["norm"]["var"])
            return after, loss

        return step

    monkeypatch.setattr(steps, "make_step", make_step)


def test_what_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """Though the loss be: the steps from 8 on have it, and 9 is to be saved."""
    overflowed(monkeypatch)
    with monkeypatch.context() as patch:
        poisoned(patch, 7)
        told = r"batch_stats/norm/var is not finite at step 9 \(step 6 is saved\)"
        with pytest.raises(NonFinite, match=told):
            fit(tmp_path / "run")
        skipped = fit(tmp_path / "skip", on_nan="skip")
        # Stopped behind step 8, whose state is saved, and gone back from all the same.
        made = steps.put_batch

        def put_batch(mesh, batch):
            if np.isnan(batch["image"]).any():
                os.kill(os.getpid(), signal.SIGTERM)
            return made(mesh, batch)

        patch.setattr(steps, "put_batch", put_batch)
        with pytest.raises(SystemExit):
            fit(tmp_path / "killed", on_nan="skip")
        store = checkpoint.open_store(tmp_path / "killed" / "checkpoints" / "train")
        assert store.latest() == 8
        patch.setattr(steps, "put_batch", made)
        chex.assert_trees_all_equal(fit(tmp_path / "killed", on_nan="skip"), skipped)
    poisoned(monkeypatch, order=[0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14])
    chex.assert_trees_all_equal(fit(tmp_path / "plain"), skipped)


def test_save_every_is_part_of_a_run_that_skips(tmp_path):
    config = Config(train=Fit(on_nan="skip"))
    with folders.claim(config, tmp_path / "run"):
        pass
    other = Config(train=Fit(on_nan="skip"), save_every=7.0)
    with pytest.raises(ConfigError, match="save_every .there 2.0, now 7.0."):
        folders.check_free(other, tmp_path / "run")


# The disk.


def test_a_refused_save_is_named_and_the_next_start_goes_on(tmp_path, monkeypatch):
    """As Orbax tells it: in a text, from a library of C++."""
    from orbax.checkpoint import v1

    whole = fit(tmp_path / "whole", 2)
    made, calls = v1.save, []

    def save(folder, arrays):
        calls.append(folder)
        if len(calls) == 2:
            Path(folder).mkdir()
            (Path(folder) / "half").write_text("of it")
            raise ValueError("OUT_OF_RANGE: ... [os_error_code='28']")
        return made(folder, arrays)

    monkeypatch.setattr(v1, "save", save)
    with pytest.raises(DiskError, match="free some space") as caught:
        fit(tmp_path / "run", 2)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "run" / "checkpoints" / "train" / "6") in str(caught.value)
    chex.assert_trees_all_equal(fit(tmp_path / "run", 2), whole)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_full_disk_is_named_wherever_it_is_met(tmp_path):
    progress = Progress(tmp_path)
    progress.rows = FULL
    with pytest.raises(DiskError, match="/dev/full: cannot be written .*free some"):
        progress.append({"stage": "train", "step": 1, "split": "val"})
    with pytest.raises(DiskError, match="/dev/full: cannot be written"):
        with disk.writing(FULL):
            FULL.write_text("x")
    (tmp_path / "path.jsonl").symlink_to(FULL)
    step = Step(0.0, {"a": np.ones(2, bool)}, Cost(2, 1, 4), 0.5, 0.1)
    with pytest.raises(DiskError, match="path.jsonl: cannot be written"):
        path_io.append(tmp_path / "path.jsonl", step)


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
def test_a_file_that_is_refused_stays_what_it_was(tmp_path):
    file = tmp_path / "config.json"
    disk.write(file, b"before")
    for sync in (True, False):
        (tmp_path / "config.json.partial").symlink_to(FULL)
        with pytest.raises(DiskError, match="config.json: cannot be written"):
            disk.write(file, b"after", sync=sync)
        assert file.read_bytes() == b"before"
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("which", ["overlay", "labels", "uncertainty"])
def test_pictures_on_a_full_disk_are_named_and_whole_or_absent(tmp_path, which):
    def apply(variables, images, train=False, sample=False, rngs=None):
        return images[..., :2]

    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    source, out = tmp_path / "in.png", tmp_path / "out"
    report.save_png(source, noise)
    classes = {"names": ["a", "b"], "colors": [[9, 9, 9]] * 2}
    info = {"classes": classes, "size": [8, 12]}
    net = types.SimpleNamespace(apply=apply, variables={}, info=info)
    frames = [streams.Frame("in", noise)]
    calls = [lambda: predict.write(net, [source], out, labels=True, samples=2)]
    if which != "uncertainty":
        calls.append(lambda: streams.write(net, frames, out, labels=True))
    for call in calls:
        out.mkdir(exist_ok=True)
        name = f"in_{which}.png"
        (out / f"{name}.partial").symlink_to(FULL)
        with pytest.raises(DiskError, match=f"{name}: cannot be written .*free some"):
            list(call())
        assert not list(out.glob(f"{name}*"))


def test_a_file_and_its_name_are_on_the_disk_with_sync(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(disk, "sync_folder", lambda folder: synced.append(folder))
    disk.write(tmp_path / "a", b"x", sync=False)
    assert not synced
    disk.write(tmp_path / "a", b"x")
    assert synced == [tmp_path]


def test_a_row_that_was_cut_short_does_not_spoil_the_next(tmp_path):
    progress = Progress(tmp_path)
    for step in (3, 6):
        progress.append({"stage": "train", "step": step, "split": "val"})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "train", "step": 9, "spl')  # the disk was full here
    progress.rewind("train", 3)
    progress.append({"stage": "train", "step": 6, "split": "val"})
    assert [r["step"] for r in rows(tmp_path)] == [3, 6]


def test_a_read_only_work_folder_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DiskError, match=r"\.lock: cannot be written .*make it writ"):
        with folders.claim(Config(), tmp_path):
            pass


# Data.


def mapped(folder: Path) -> data.Split:
    """The training split of `tinyrun`, from files as the cache has them."""
    split = tinyrun.split("train", 24)
    for name in ("images", "labels"):
        np.save(folder / f"{name}.npy", getattr(split, name))
    found = [np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("images", "labels")]
    return data.Split("train", *found, split.stems, split.classes)


def test_data_files_may_vanish_in_mid_run_but_not_shrink(tmp_path):
    split = mapped(tmp_path)
    batches = data.batches(split, batch=8, seed=0, threads=0)
    first = next(batches)
    (tmp_path / "labels.npy").unlink()  # the pages stay
    assert first["label"].shape == next(batches)["label"].shape
    with open(tmp_path / "images.npy", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match="images.npy: cut short .* repeat the command"):
        list(zip(range(30), batches, strict=False))
    with pytest.raises(DataError, match="images.npy: cut short"):
        next(data.eval_batches(split, 4))
    cache.check_whole(np.zeros(3))


# Exit codes.


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("seed"), 2),
        (CheckpointError("damaged"), 2),
        (OSError(errno.ENOENT, "no such file"), 2),
        (OSError(errno.ENOSPC, "full"), 1),
        (disk.refused(Path("x"), errno.EROFS), 1),
        (caused(DataError("cache"), OSError(errno.ENOSPC, "full")), 1),
        (NonFinite("step 3"), 1),
        (PeerError("lost"), 75),
    ],
    ids=lambda x: f"{type(x).__name__}" if isinstance(x, Exception) else str(x),
)
def test_exit_codes(error, code):
    assert exits.code_of(error) == code


def test_the_command_s_exit_codes(tmp_path):
    """Failed and bad input; a run that is done, or was stopped, `kills.py` checks."""
    (tmp_path / "tiny.py").write_text(
        textwrap.dedent("""
        from jaxprune import train

        def get_config():
            fit = train.Fit(epochs=2, batch=2, optimizer="sgd", lr=1e38)
            return train.Config(
                network=train.Network("segnet_basic", widths=(2,)),
                data=train.Data("synthetic", size=(16, 16), counts=(4, 2, 2)),
                train=fit,
                prune=train.Prune(ratio=0.9, multiple_of=1, min_channels=1),
                retrain=fit,
            )
        """)
    )
    env = {**ENV, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for config, code, said in (
        ("tiny.py", 1, "train: the loss or its gradient is not finite at step 2"),
        ("none.py", 2, "none.py: no such config file"),
    ):
        command = [sys.executable, "-m", "jaxprune", "run", config, "--workdir", "run"]
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert f"error: {said}" in done.stderr
    assert json.loads((tmp_path / "run" / "heartbeat.json").read_text())["step"] <= 2


def test_the_documents_tell_the_codes(capsys):
    text = (ROOT / "docs" / "faults.md").read_text()
    told = {int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
    names = ("DONE", "FAILED", "BAD_INPUT", "RESUMABLE", "INTERRUPTED")
    assert {getattr(exits, name) for name in names} <= told
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert {"--wait", "--tensorboard", "--profile"} <= set(
        re.findall(r"--\w+", capsys.readouterr().out)
    )
