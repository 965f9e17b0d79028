# SPDX-License-Identifier: Apache-2.0
"""One device or many, whole or in shares, a batch at once or in parts: the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scalerun
import tinyrun
from scipy import special

from jaxprune.base import ConfigError
from jaxprune.train import config as configs
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps

PROGRAM = Path(scalerun.__file__)
ROOT = PROGRAM.parents[1]


def start(folder: Path, shard: str, devices: int, *more: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    flags = f"--xla_force_host_platform_device_count={devices}"
    quick = "--xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": f"{flags} {quick}", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), shard, *more],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one device finds."""
    with jax.enable_x64(True):
        return scalerun.found(tmp_path_factory.mktemp("one"), "none")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """What eight devices find that hold an eighth of the state each."""
    return ended(start(tmp_path_factory.mktemp("eight"), "fsdp", 8))


def the_same(one: dict, many: dict) -> None:
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-6)
    assert many["keep"] == one["keep"] and many["cut"] == one["cut"]
    assert any("0" in bits for bits in one["keep"].values())


def test_a_state_in_shares_trains_cuts_and_is_restored_as_a_whole_one(one, eight):
    assert eight["devices"] == 8
    the_same(one, eight)
    assert eight["restored"] and one["restored"]
    # All but the step, and what is of 3 classes: an eighth.
    assert 1 / 8 <= eight["share"] < 1.05 / 8 and one["share"] == 1
    assert eight["small"] < 1.6 / 8  # one group's width is odd now


def test_a_step_in_shares_gathers_parameters_and_reduces_gradients(eight):
    kinds = eight["kinds"]
    assert set(kinds) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert kinds["all-gather"] <= 5  # the kernels and biases that are split


def test_what_lies_in_shares_is_cut_and_grown_there(eight):
    rows = eight["places"]
    assert all(row["right"] and row["back"] for row in rows)
    # The axis stays, or the largest that divides takes its place, or none does.
    assert [row["axis"] for row in rows] == [[0], [1], [], [1], [2], [0]]
    assert [row["held"] for row in rows] == [1 / 8, 1 / 8, 1, 1 / 8, 1 / 8, 1 / 8]
    # No device puts an array of several axes together.
    assert max(row["temporary"] for row in rows[:5]) < 2.5 / 8


def test_two_processes_see_the_same_as_one(one, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pair = [start(tmp_path, "fsdp", 1, port, str(i), "2") for i in range(2)]
    try:
        first, second = map(ended, pair)
    finally:
        for process in pair:
            process.kill()
            process.wait()
    assert first == second and first["devices"] == 2
    the_same(one, first)
    assert first["restored"] and first["share"] < 0.51


# Batches in parts.


def batch(rows: int = 8) -> dict:
    """Frames that count more and less, and of every fourth not a pixel does."""
    split = tinyrun.split("train", rows)
    labels = split.labels.astype(np.int32)
    for i, label in enumerate(labels):
        label[1 + 2 * (i % 4) :] = tinyrun.CLASSES.ignore
    return {"image": np.asarray(split.images), "label": labels}


def stepped(accumulate: int, batch: dict, **more) -> tuple:
    """(state after a step of plain gradients at rate 1, loss)."""
    tx = optax.sgd(1.0)
    run = scalerun.apply
    step = steps.make_step(run, tx, scalerun.TARGET, accumulate=accumulate, **more)
    state = steps.init_state(scalerun.variables(), tx)
    return jax.jit(step)(state, batch, scalerun.variables(), jax.random.key(0))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole(accumulate):
    more = {
        "smoothing": 0.1,
        "distill": configs.Distill(0.3),
        "teacher": scalerun.apply,
    }
    with jax.enable_x64(True):
        whole, parts = stepped(1, batch(), **more), stepped(accumulate, batch(), **more)
        assert parts[1].dtype == np.float64
        chex.assert_trees_all_close(parts, whole, rtol=1e-10, atol=1e-12)


def test_the_loss_of_parts_is_the_weighted_mean_over_all_pixels():
    given, params = batch(), scalerun.variables()["params"]
    x = given["image"].astype(np.float32).astype(np.float64) / 255
    for name in sorted(params):
        x = np.maximum(x, 0) @ params[name]["kernel"] + params[name]["bias"]
    labels = given["label"]
    counted = labels != tinyrun.CLASSES.ignore
    safe = np.where(counted, labels, 0)
    weights = np.where(counted, scalerun.TARGET.weights[safe], 0)
    picked = np.take_along_axis(x, safe[..., None], -1)[..., 0]
    losses = weights * (special.logsumexp(x, axis=-1) - picked)
    with jax.enable_x64(True):
        loss = float(stepped(4, given)[1])
    np.testing.assert_allclose(loss, losses.sum() / weights.sum(), rtol=1e-6)
    parts = [np.arange(i, 8, 4) for i in range(4)]
    means = [losses[p].sum() / max(weights[p].sum(), 1e-6) for p in parts]
    assert abs(np.mean(means) / loss - 1) > 0.1


def test_batch_statistics_are_updated_by_one_part_after_the_other():
    net, given = tinyrun.Net(dropout=0.0), batch()
    tx = optax.sgd(0.0)
    target = scalerun.TARGET
    step = steps.make_step(net.apply, tx, target, accumulate=2)
    state = steps.init_state(tinyrun.variables(), tx)
    after, _ = jax.jit(step)(state, given, None, jax.random.key(0))
    wanted = tinyrun.variables()
    for i in range(2):
        images = jnp.float32(given["image"][i::2]) / 255
        _, new = net.apply(wanted, images, train=True, mutable=["batch_stats"])
        wanted = {**wanted, **new}
    found = after.variables["batch_stats"]
    chex.assert_trees_all_close(found, wanted["batch_stats"], rtol=1e-5)


def test_parts_are_of_every_nth_row():
    x = np.arange(12).reshape(6, 2)
    parts = layouts.parts(None, {"x": x}, 3)["x"]
    np.testing.assert_array_equal(parts, [x[0::3], x[1::3], x[2::3]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": configs.Scale(accumulate=3)}, r"scale.accumulate = 3: must .* div"),
        ({"scale": configs.Scale(accumulate=0)}, r"scale.accumulate = 0: must be pos"),
        (
            {
                "scale": configs.Scale("fsdp"),
                "prune": configs.Prune(method="svd", multiple_of=1),
            },
            r"scale.shard = 'fsdp': must be 'none' where the method is 'svd'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        configs.check(configs.Config(**fields))
