# SPDX-License-Identifier: Apache-2.0
"""What a run tells watchers: heartbeats, memory, TensorBoard's events, traces."""

import json
import os
import socket
import struct
import time
from pathlib import Path

import jax
import pytest
import tinyrun

from jaxprune import cli
from jaxprune.base import ConfigError
from jaxprune.train import loop, stages, vitals
from jaxprune.train.config import Config
from jaxprune.train.progress import Progress


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(folder, seconds when it began) of a training of 6 steps, two of them traced."""
    folder, began = tmp_path_factory.mktemp("watched"), time.time()
    job = tinyrun.job(folder, 2)
    loop.train(job, tinyrun.variables(), Progress(folder, profile=2))
    return folder, began


def test_a_heartbeat_tells_who_and_where(watched):
    folder, began = watched
    sign = json.loads((folder / "heartbeat.json").read_text())
    assert began - 1 <= sign["time"] <= time.time() + 1
    here = {"pid": os.getpid(), "host": socket.gethostname(), "stage": "train"}
    assert here | {"process": 0, "processes": 1} == {
        k: v for k, v in sign.items() if k not in ("time", "step")
    }
    assert 0 <= sign["step"] <= 6


def test_heartbeats_are_seldom_whole_and_never_the_end_of_a_run(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(vitals.time, "monotonic", lambda: now[0])
    heart = vitals.Heartbeat(tmp_path)
    seen = []
    for step, later in enumerate((0, 1, 3.9, 0.2, 1)):
        now[0] += later
        heart.beat("train" if step < 4 else "prune", step)
        seen.append(json.loads(heart.file.read_text())["step"])
    assert seen == [0, 0, 0, 3, 4]  # 5 s are over; another stage
    assert [f.name for f in tmp_path.iterdir()] == ["heartbeat.json"]
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    vitals.Heartbeat(tmp_path / "nowhere").beat("train", 1)
    vitals.Heartbeat(tmp_path).beat("train", 1)
    assert json.loads((tmp_path / "heartbeat.3.json").read_text())["process"] == 3


def test_rows_of_training_tell_memory(watched, monkeypatch):
    lines = (watched[0] / "metrics.jsonl").read_text().splitlines()
    train = [r for r in map(json.loads, lines) if r["split"] == "train"]
    assert len(train) == 2
    for row in train:
        assert 2**25 < row["host_bytes"] < 2**40 and row["device_bytes"] is None

    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 7, "bytes_in_use": 5}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert vitals.memory()["device_bytes"] == vitals.peak() == 7


def test_a_trace_of_steps_is_written(watched):
    traces = list((watched[0] / "profile" / "train").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    trace = vitals.Trace(Path("unused"), 0)
    trace.begin("train")
    trace.step()
    trace.end()


def test_tensorboard_s_events_are_the_rows(tmp_path):
    pytest.importorskip("tensorboardX")
    progress = Progress(tmp_path, tensorboard=True)
    progress.rewind("train", 0)
    place = {"stage": "train", "split": "train"}
    progress.append({**place, "step": 3, "loss": 0.5, "device_bytes": None})
    progress.append({**place, "step": 6, "loss": 0.25})
    progress.rewind("train", 3)
    progress.append({**place, "step": 6, "loss": 0.125, "per_class_iou": [1.0]})
    last = {"stage": "evaluate", "step": 0, "split": "test", "network": "dense"}
    progress.append({**last, "miou": 0.75})
    progress.close()
    found = {stage: events(tmp_path / "tensorboard" / stage) for stage in STAGES}
    assert found["train"] == [(3, "train/loss", 0.5), (6, "train/loss", 0.125)]
    assert found["evaluate"] == [(0, "test/dense/miou", 0.75)]


STAGES = ("train", "evaluate")


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) as TensorBoard shows them: a restart ends what is behind it.

    Records are a length, its checksum, the event, its checksum (TFRecord).
    """
    from tensorboardX.proto import event_pb2

    found: list[tuple[int, str, float]] = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == event.session_log.START:
                found = [e for e in found if e[0] < event.step]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_tensorboard_that_is_not_there_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(vitals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "jaxprune\[tensorboard\]"'):
        stages.run(Config(), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_the_flags_reach_the_run(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "jaxprune.train.run", lambda config, workdir, **more: seen.update(more)
    )
    monkeypatch.setattr("jaxprune.report.write", lambda workdir: workdir)
    (tmp_path / "c.py").write_text(
        "from jaxprune import train\nget_config = train.Config"
    )
    argv = ["run", str(tmp_path / "c.py"), "--tensorboard", "--profile", "5"]
    assert cli.main(argv) == 0
    assert seen == {"tensorboard": True, "profile": 5}
