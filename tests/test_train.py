# SPDX-License-Identifier: Apache-2.0
"""The loop: losses, resuming bit for bit, tracing once, devices, faults."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tinyrun
from jax.experimental import multihost_utils

import jaxprune as jp
from jaxprune import checkpoint
from jaxprune.base import CheckpointError
from jaxprune.graph_io import bar, graph_to_json
from jaxprune.train import loop, stopping
from jaxprune.train import step as steps
from jaxprune.train.config import Distill, Fit
from jaxprune.train.progress import Progress, clock

PROGRAM = Path(__file__).with_name("tinyrun.py")
ROOT = PROGRAM.parents[1]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The same small programs are compiled over and over: keep them."""
    with tinyrun.compilations(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, final state) of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder)


def fit(folder: Path, epochs: float = 4, **fields) -> steps.State:
    job = tinyrun.job(folder, epochs, **fields)
    return loop.train(job, tinyrun.variables(), Progress(folder))


def rows(folder: Path, *, timed: bool = False) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    leave_out = () if timed else tinyrun.TIMED
    return [
        {k: v for k, v in json.loads(line).items() if k not in leave_out}
        for line in lines
    ]


def start(folder: Path, epochs: float, *more: str, **env: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
    command = [sys.executable, str(PROGRAM), str(folder), str(epochs), *more]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(folder: Path, process: subprocess.Popen) -> None:
    """Until a running process has made a folder."""
    limit = time.monotonic() + 90
    while not folder.exists() and time.monotonic() < limit:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def test_training_learns_and_writes_a_row_a_split_and_epoch(whole):
    folder, state = whole
    found = rows(folder, timed=True)
    assert [(r["split"], r["step"], r["epoch"]) for r in found] == [
        (split, 3 * epoch, float(epoch))
        for epoch in (1, 2, 3, 4)
        for split in ("train", "val")
    ]
    losses = [r["loss"] for r in found if r["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert found[-2]["lr"] < found[0]["lr"] and found[-2]["images_per_s"] > 0
    assert found[-1]["miou"] > found[1]["miou"] and len(found[-1]["per_class_iou"]) == 3
    assert int(state.step) == 12


def test_a_finished_training_is_not_repeated(whole):
    folder, state = whole
    before = (folder / "metrics.jsonl").read_bytes()
    again = fit(folder)
    chex.assert_trees_all_equal(again, state)
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("after", [1, 6, 7, 12])
def test_sigterm_saves_and_the_resumed_run_ends_bit_identical(
    whole, tmp_path, monkeypatch, after
):
    made = steps.put_batch
    seen = []

    def put_batch(mesh, batch):
        seen.append(1)
        if len(batch["image"]) == 8 and len(seen) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(mesh, batch)

    monkeypatch.setattr(steps, "put_batch", put_batch)
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path)
    assert stop.value.code == 75
    monkeypatch.undo()
    resumed = fit(tmp_path)
    chex.assert_trees_all_equal(resumed, whole[1])
    assert rows(tmp_path) == rows(whole[0])


def test_a_kill_at_any_moment_loses_no_more_than_the_last_steps(tmp_path):
    process = start(tmp_path, 8)
    wait_for(tmp_path / "checkpoints" / "train" / "6", process)
    process.kill()
    process.communicate()
    killed = rows(tmp_path)
    resumed, undisturbed = fit(tmp_path, 8), fit(tmp_path / "other", 8)
    chex.assert_trees_all_equal(resumed, undisturbed)
    assert rows(tmp_path) == rows(tmp_path / "other") and len(killed) < 16


@pytest.mark.slow
def test_a_sigterm_to_one_of_two_processes_saves_the_same_step_of_both(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # So many epochs that they do not end before JAX has seen the signal.
    pair = [start(tmp_path, 10_000, port, str(i)) for i in range(2)]
    try:
        wait_for(tmp_path / "checkpoints" / "train" / "3", pair[0])
        pair[1].send_signal(signal.SIGTERM)
        output = [process.communicate(timeout=60)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert [process.returncode for process in pair] == [75, 75], output
    newest = checkpoint.open_store(tmp_path / "checkpoints" / "train").latest()
    assert f"train: saved step {newest}; the same command resumes" in output[0]


def test_several_processes_leave_sigterm_to_jax_and_ask_it_by_rising_numbers(
    monkeypatch,
):
    asked = []
    sync = "reached_preemption_sync_point"
    monkeypatch.setattr(multihost_utils, sync, lambda n: bool(asked.append(n)))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    before = signal.getsignal(signal.SIGTERM)
    for _ in range(2):  # two stages
        with stopping.stoppable() as stop:
            assert signal.getsignal(signal.SIGTERM) is before
            assert not any(stop.asked() for _ in range(3))
    assert len(asked) == 6 and (np.diff(asked) == 1).all()


def test_a_line_tells_no_miou_before_there_is_one(tmp_path, capsys):
    progress = Progress(tmp_path)
    progress.start("train", 0, 20, 8, 4)
    progress.compiled(1)
    progress.step(2, 1.5)
    progress.finish()
    progress.row("val", 8, {"miou": 0.25})
    progress.finish()
    _, before, after = capsys.readouterr().out.splitlines()
    assert "epoch 0.2/2.5, step 2  loss 1.500  " in before and "mIoU" not in before
    assert "  mIoU 0.250 (best 0.250)" in after


def test_one_and_eight_devices_have_the_same_losses(whole, tmp_path):
    flags = "--xla_force_host_platform_device_count=8"
    process = start(tmp_path, 4, XLA_FLAGS=flags)
    output, _ = process.communicate(timeout=120)
    assert "devices 8 step 12" in output, output
    one, eight = rows(whole[0]), rows(tmp_path)
    for a, b in zip(one, eight, strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        if "loss" in a:
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=2e-4)


def test_the_step_and_the_evaluation_are_traced_once(tmp_path, monkeypatch):
    chex.clear_trace_counter()
    make_step, make_evaluate = steps.make_step, steps.make_evaluate
    monkeypatch.setattr(
        steps,
        "make_step",
        lambda *a, **k: chex.assert_max_traces(make_step(*a, **k), n=1),
    )
    monkeypatch.setattr(
        steps,
        "make_evaluate",
        lambda *a, **k: chex.assert_max_traces(make_evaluate(*a, **k), n=1),
    )
    fit(tmp_path, 2)


def test_a_step_adds_no_collective_on_one_device_and_donates_its_state():
    fit_, batch = Fit(), next(iter([tinyrun.split("train", 8)]))
    tx, _ = steps.optimizer(fit_, 10)
    target = steps.Target(255, np.ones(3, np.float32))
    step = steps.make_step(tinyrun.Net().apply, tx, target)
    state = steps.init_state(tinyrun.variables(), tx)
    arrays = {"image": batch.images, "label": batch.labels.astype(np.int32)}
    lowered = jax.jit(step, donate_argnums=0).lower(
        state, arrays, None, jax.random.key(0)
    )
    text = lowered.compile().as_text()
    for word in ("all-reduce", "all-gather", "outfeed", "infeed", "send("):
        assert word not in text
    assert "input_output_alias" in text


def test_a_loss_that_is_not_finite_stops_with_step_and_parameter(tmp_path):
    fit(tmp_path, 4 / 3)  # one epoch, then one step: saved at 3 and 4
    job = tinyrun.job(tmp_path, 4)
    images = job.splits.train.images
    bad = tinyrun.variables()
    kernel = np.array(bad["params"]["last"]["kernel"]) * 1e38
    bad["params"]["last"]["kernel"] = kernel
    assert images.dtype == np.uint8
    graph = jp.trace(job.apply, bad, jnp.zeros((1, *tinyrun.SIZE, 3)), train=False)
    (tmp_path / "graph.json").write_text(graph_to_json(graph))
    with pytest.raises(loop.NonFinite) as caught:
        loop.train(tinyrun.job(tmp_path, 4, stage="retrain"), bad, Progress(tmp_path))
    message = str(caught.value)
    assert "retrain" in message and "step 1 " in message
    assert "no checkpoint yet" in message
    assert "last/kernel (of the group first)" in message


def test_a_damaged_checkpoint_is_an_error_that_names_it(whole, tmp_path):
    fit(tmp_path, 2)
    newest = tmp_path / "checkpoints" / "train" / "6"
    file = max(
        (p for p in (newest / "arrays").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        fit(tmp_path, 2)
    assert str(file) in str(caught.value) and f"delete {newest}" in str(caught.value)
    older = [p for p in newest.parent.iterdir() if p.name.isdigit() and p != newest]
    assert older and "go on from the step before" in str(caught.value)
    assert "fallback" not in str(caught.value)  # which no command takes
    for folder in older:
        shutil.rmtree(folder)
    with pytest.raises(
        CheckpointError, match=f"begin this stage anew, delete {newest}"
    ):
        fit(tmp_path, 2)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_cross_entropy_and_distillation_by_numpy(weight):
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 2, 4, 5, 3))
    labels = rng.choice([0, 1, 2, 255], (2, 4, 5))
    weights = np.array([0.5, 1.0, 3.0])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = norm = 0.0
    for index in np.ndindex(labels.shape):
        if labels[index] != 255:
            total -= weights[labels[index]] * log_p[index][labels[index]]
            norm += weights[labels[index]]
    target = steps.Target(255, weights)
    found = steps.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), target)
    np.testing.assert_allclose(found, total / norm, rtol=1e-5)

    soft = np.exp(teacher / 2) / np.exp(teacher / 2).sum(-1, keepdims=True)
    given = np.exp(logits / 2) / np.exp(logits / 2).sum(-1, keepdims=True)
    kl = 4 * np.mean((soft * np.log(soft / given)).sum(-1))
    found = steps.distillation(jnp.asarray(logits), jnp.asarray(teacher), 2.0)
    np.testing.assert_allclose(found, kl, rtol=1e-5)
    assert Distill(weight).weight == weight


def test_label_smoothing_is_the_mean_over_classes():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 3)))
    labels = jnp.array([[[0, 1], [2, 255]]])
    target = steps.Target(255, np.ones(3))
    plain = steps.cross_entropy(logits, labels, target)
    uniform = -jax.nn.log_softmax(logits).mean(-1)[0].ravel()[:3].mean()
    found = steps.cross_entropy(logits, labels, target, 0.3)
    np.testing.assert_allclose(found, 0.7 * plain + 0.3 * uniform, rtol=1e-5)


def test_soft_jaccard_by_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5, 4))
    labels = rng.choice([0, 1, 2, 4], (2, 4, 5)).astype(np.uint8)  # 3 is nowhere
    counted = labels != 4
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ious = []
    for k in range(3):
        y, q = (labels == k)[counted], p[..., k][counted]
        ious.append((q * y).sum() / (q + y - q * y).sum())
    target = steps.Target(4, np.ones(4))
    found = steps.soft_jaccard(jnp.asarray(logits), jnp.asarray(labels), target)
    np.testing.assert_allclose(found, 1 - np.mean(ious), rtol=1e-5)

    sure = jnp.asarray(1e3 * (labels[..., None] == np.arange(4)))
    assert steps.soft_jaccard(sure, jnp.asarray(labels), target) == 0
    nothing = jnp.full_like(jnp.asarray(labels), 4)
    assert np.isfinite(steps.soft_jaccard(sure, nothing, target))


def test_rates_warm_up_and_fall():
    _, rate = steps.optimizer(Fit(epochs=10, warmup=1, lr=0.5), 100)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)],
        [0, 0.25, 0.5, 0.25, 0],
        atol=1e-6,
    )
    _, rate = steps.optimizer(Fit(schedule="constant", lr=0.5), 100)
    assert rate(0) == rate(100) == 0.5


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("epochs", "steps_"), [(2.0, 100), (0.1, 1), (0.0, 0)])
def test_a_training_may_be_warm_up_alone(schedule, epochs, steps_):
    """As that between two cuts may be, or a first look at a long recipe."""
    fit_ = Fit(epochs=epochs, warmup=epochs, lr=0.5, schedule=schedule)
    _, rate = steps.optimizer(fit_, steps_)
    found = [rate(n) for n in range(steps_)]
    np.testing.assert_allclose(found, np.arange(steps_) * 0.5 / max(steps_, 1), 1e-5)


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_weight_decay_is_of_kernels_alone(name):
    tx, rate = steps.optimizer(
        Fit(optimizer=name, schedule="constant", weight_decay=0.1), 10
    )
    params = {"kernel": jnp.ones((3, 3, 2, 2)), "bias": jnp.ones(2)}
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    )
    np.testing.assert_allclose(updates["kernel"], -0.1 * rate(0), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_muon_orthogonalises_kernels_and_leaves_the_rest_to_adam():
    tx, rate = steps.optimizer(
        Fit(optimizer="muon", schedule="constant", weight_decay=0), 10
    )
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    # The first momentum is the gradient. Its polar factor U V^T, by an exact SVD, has
    # entries of root mean square 1 / sqrt(36); Newton and Schulz's five steps leave
    # singular values between 0.68 and 1.13 (Jordan, 2024).
    u, _, v = np.linalg.svd(np.float64(grads["kernel"]).reshape(36, 8), False)
    found = -np.float64(updates["kernel"]).reshape(36, 8) / rate(0) / 6
    values = np.linalg.svd(found, compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.25
    assert np.sum(found * (u @ v)) / np.linalg.norm(found) / np.sqrt(8) > 0.97
    # The first update of Adam with Nesterov's momentum (Dozat, 2016) is a sign, too.
    signs = (1 + 0.9 * 0.1 / (1 - 0.9**2)) * np.sign(grads["bias"])
    np.testing.assert_allclose(updates["bias"], -rate(0) * signs, rtol=1e-3)


def test_a_carried_optimiser_keeps_its_moments_and_restarts_its_schedule():
    tx, _ = steps.optimizer(Fit(), 10)
    values = {"params": {"kernel": jnp.ones((2, 2))}}
    state = steps.init_state(values, tx)
    for _ in range(3):
        _, opt_state = tx.update(values["params"], state.opt_state, values["params"])
        state = state._replace(opt_state=opt_state)
    other, _ = steps.optimizer(Fit(clip=1.0), 20)
    carried = steps.init_state(values, other, state.opt_state).opt_state
    moments = optax.tree_utils.tree_get(carried, "mu")
    chex.assert_trees_all_equal(moments, optax.tree_utils.tree_get(opt_state, "mu"))
    kinds = [type(part).__name__ for part in carried]
    assert carried[kinds.index("ScaleByScheduleState")].count == 0
    assert carried[kinds.index("ScaleByAdamState")].count == 3


def test_the_average_is_of_the_weights():
    tx, _ = steps.optimizer(Fit(), 100)
    target = steps.Target(255, np.ones(3, np.float32))
    step = jax.jit(steps.make_step(tinyrun.Net().apply, tx, target, average=0.5))
    split = tinyrun.split("train", 8)
    batch = {"image": split.images, "label": split.labels.astype(np.int32)}
    state = steps.init_state(tinyrun.variables(), tx)
    average = jax.tree.map(np.asarray, state.variables)
    for t in range(8):
        state, _ = step(state, batch, None, jax.random.key(0))
        d = min(0.5, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, v, d=d: d * a + (1 - d) * v, average, state[1])
    chex.assert_trees_all_close(state.average, average, rtol=1e-5)


def test_clock():
    assert [clock(5), clock(65), clock(3725)] == ["0:05", "1:05", "1:02:05"]


def test_bar():
    assert [bar(x) for x in (0, 0.26, 1)] == ["░" * 10, "███░░░░░░░", "█" * 10]
    assert bar(0.5, 4) == "██░░"
