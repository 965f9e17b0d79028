# SPDX-License-Identifier: Apache-2.0
"""Runs killed at random instants, and whether each still ends in the same network.

    python benchmarks/kills.py                          # 200 kills
    python benchmarks/kills.py --kills 4 --seed 1       # a few, as the tests do

One run (train, path, cut, retrain, evaluate, report) goes undisturbed, of a network of
three convolutions, with batch norm and dropout, on augmented frames of noise. Others
are killed, by SIGKILL and SIGTERM as the seed decides, and started again until they
end. A kill falls at a random instant of the stage that has seen the fewest so far.
Compared are the SHA-256 of the final network's arrays, its keep, the path, the
evaluation and all rows of metrics.jsonl, but for times. Every start is `jaxprune run`
in a process of its own, forked from this one, which has imported all and touched no
device.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Compiling takes longer than running here.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", f"--xla_cpu_multi_thread_eigen=false {QUICK}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from orbax.checkpoint import v1  # noqa: E402, F401

import jaxprune as jp  # noqa: E402
from jaxprune import cli, data, models, path, report  # noqa: E402
from jaxprune.train import compare, cut, stages  # noqa: E402

STAGES = ("start", "train", "path", "cut", "retrain", "evaluate", "save", "report")
TIMED = ("time", "images_per_s", "host_bytes", "device_bytes")
LIMIT = 900.0  # seconds; a run that takes longer hangs
CONFIG = """
from jaxprune import data, train

def get_config():
    fit = train.Fit(epochs=2, batch=4, lr=0.01, ema=0.9)
    return train.Config(
        data=train.Data("synthetic", size=(8, 12), augment=data.Augment(colour=0.1)),
        train=fit,
        prune=train.Prune(
            "path", ratio=0.3, multiple_of=1, min_channels=1, block=0.15, batches=1,
            statistics=2, carry_optimizer=True,
        ),
        retrain=fit,
        distill=train.Distill(0.5),
        evaluate=train.Evaluate(every=2, batch=4, repeats=0, samples=3),
        save_every=0.75,
    )
"""


CLASSES = data.Classes(("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))


class Net(nn.Module):
    """Two convolutions with batch norm and dropout, one to the classes."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images
        for name in ("first", "second"):
            x = nn.Conv(6, (3, 3), name=name)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Conv(len(CLASSES), (3, 3), name="last")(x)


def frames(name: str) -> data.Split:
    """Frames whose classes show in their colours."""
    count = {"train": 16, "val": 6, "test": 6}[name]
    rng = np.random.default_rng(count)
    labels = rng.integers(0, len(CLASSES), (count, 8, 12)).astype(np.uint8)
    images = rng.integers(0, 80, (count, 8, 12, 3)) + 120 * np.eye(3)[labels]
    stems = tuple(f"{name}{i}" for i in range(count))
    return data.Split(name, images.astype(np.uint8), labels, stems, CLASSES)


def ship() -> None:
    """As if that network were shipped, and those frames a source of data."""
    stages.load_split = lambda _, name, **more: frames(name)  # type: ignore
    models.build = lambda *args: Net()  # type: ignore


class Child(NamedTuple):
    """A run that was started: its process, and the pipe that tells its stages."""

    pid: int
    marks: int
    log: Path


class Ended(NamedTuple):
    """The stage that a run was last in, and how it ended: an exit code, or -signal."""

    stage: str
    code: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--each", type=int, default=8, help="kills of one run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxprune-kills-") as root:
        sys.exit(campaign(Path(root), args.kills, args.each, args.seed))


def campaign(root: Path, kills: int, each: int, seed: int) -> int:
    """Kill so many times, print the table; 0 where all runs ended the same."""
    ship()
    config = root / "tiny.py"
    config.write_text(CONFIG)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    durations = undisturbed(config, root / "undisturbed")
    wanted = fingerprint(root / "undisturbed")
    same: list[bool] = []
    found: collections.Counter = collections.Counter()
    draw = random.Random(seed)
    while sum(found.values()) < kills:
        folder = root / "killed"
        left = min(each, kills - sum(found.values()))
        disturbed(config, folder, left, draw, durations, found)
        mine = fingerprint(folder)
        same.append(mine == wanted)
        if mine != wanted:
            print("other:", [k for k in wanted if mine.get(k) != wanted[k]])
        shutil.rmtree(folder)
        told = f"{sum(found.values())} kills of {len(same)} runs, {sum(same)} the same"
        print(f"{table(found)}\n{told}\n", file=sys.stderr, flush=True)
    print(table(found))
    alike = "all bit-identical" if all(same) else f"{same.count(False)} NOT the same"
    print(f"\n{sum(found.values())} kills of {len(same)} runs: {alike}")
    return 0 if all(same) else 1


def undisturbed(config: Path, folder: Path) -> dict[str, float]:
    """A run that nothing disturbs; the seconds of its stages."""
    child = start(config, folder)
    seconds: dict[str, float] = collections.defaultdict(float)
    before, at = time.monotonic(), "start"
    for stage in marks(child, time.monotonic() + LIMIT):
        now = time.monotonic()
        seconds[at] += now - before
        before, at = now, stage or at
    seconds[at] += time.monotonic() - before
    check(child, wait(child, at), (0,))
    return dict(seconds)


def disturbed(
    config: Path,
    folder: Path,
    kills: int,
    draw: random.Random,
    durations: dict[str, float],
    found: collections.Counter,
) -> None:
    """A run that is killed so many times, or fewer where it ends before."""
    reached = 0
    for _ in range(kills):
        child = start(config, folder)
        # A stage ahead that has seen few, by the signal that it has seen less.
        ahead = STAGES[min(reached, len(STAGES) - 2) :]
        seen = {s: sum(found[s, n] for n in SIGNALS) + draw.random() for s in ahead}
        target = min(ahead, key=seen.__getitem__)
        number = min(SIGNALS, key=lambda n: found[target, n] + draw.random() / 2)
        ended = killed(child, target, draw.random() * durations[target], number)
        reached = max(reached, STAGES.index(ended.stage))
        if ended.code == 0:  # it was quicker
            durations[target] *= 0.7
            return
        check(child, ended, EXPECTED[number])
        found[ended.stage, number] += 1
        # A resumed stage has less to do, and machines are now quick, now slow.
        durations[target] *= 1.1 if ended.stage == target else 0.7
    child = start(config, folder)
    check(child, wait(child, last_mark(child)), (0,))


SIGNALS = (signal.SIGKILL, signal.SIGTERM)
EXPECTED = {signal.SIGKILL: (-9,), signal.SIGTERM: (75,)}


def killed(child: Child, target: str, delay: float, number: int) -> Ended:
    """Send a signal `delay` seconds after a run has entered a stage, or a later one."""
    until, stage = time.monotonic() + LIMIT, "start"
    due: list[float | None] = [None]
    for mark in marks(child, until, lambda: due[0]):
        if mark is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)
            return wait(child, stage)
        stage = mark
        if due[0] is None and STAGES.index(mark) >= STAGES.index(target):
            due[0] = time.monotonic() + delay
    return wait(child, stage)


def last_mark(child: Child) -> str:
    stage = "start"
    for mark in marks(child, time.monotonic() + LIMIT):
        stage = mark or stage
    return stage


def marks(
    child: Child, until: float, alarm: Callable[[], float | None] = lambda: None
) -> Iterator[str | None]:
    """The stages that a run enters, until it ends; None when the alarm's time is up."""
    while True:
        due = alarm()
        limit = max(0.0, min(until, due if due is not None else until))
        ready, _, _ = select.select(
            [child.marks], [], [], max(0.0, limit - time.monotonic())
        )
        if ready:
            if not (byte := os.read(child.marks, 1)):
                return
            yield STAGES[byte[0]]
        elif due is not None and time.monotonic() >= due:
            yield None
        elif time.monotonic() >= until:
            os.kill(child.pid, signal.SIGKILL)
            fail(child, f"hangs: no end in {LIMIT:g} s")


def start(config: Path, folder: Path) -> Child:
    """`jaxprune run`, forked."""
    log = folder.with_suffix(".log")
    reading, writing = os.pipe()
    pid = forked(lambda: command(config, folder, log, writing))
    os.close(writing)
    return Child(pid, reading, log)


def command(config: Path, folder: Path, log: Path, marks: int) -> int:
    """In the child: the command, with its output in a file and a byte a stage."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def marked(stage: str, of: Any, name: str) -> None:
        inner = getattr(of, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            here = stage
            if name == "train":  # args[0] is its job
                here = args[0].stage
            os.write(marks, bytes([STAGES.index(here)]))
            return inner(*args, **kwargs)

        setattr(of, name, outer)

    marked("start", stages, "check")
    marked("", stages, "train")
    marked("path", path, "prune_path")
    marked("cut", cut, "apply_cut")
    marked("evaluate", compare, "evaluate_stage")
    marked("save", stages, "save_network")
    marked("report", report, "write")
    return cli.main(["run", str(config), "--workdir", str(folder)])


def forked(function: Callable[[], int]) -> int:
    """The pid of a child that runs a function and ends with what it returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX: no thread of it runs yet
        pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        code = function()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: Child, stage: str) -> Ended:
    os.close(child.marks)
    _, status = os.waitpid(child.pid, 0)
    return Ended(stage, os.waitstatus_to_exitcode(status))


def check(child: Child, ended: Ended, codes: tuple[int, ...]) -> None:
    if ended.code not in codes:
        fail(child, f"ended with {ended.code} in {ended.stage!r}, not {codes}")


def fail(child: Child, why: str) -> None:
    print(child.log.read_text()[-4000:])
    sys.exit(why)


def fingerprint(folder: Path) -> dict[str, str]:
    """SHA-256 of all that a run ends with, by a child of its own."""
    reading, writing = os.pipe()

    def tell() -> int:
        os.write(writing, json.dumps(contents(folder)).encode())
        return 0

    pid = forked(tell)
    os.close(writing)
    with open(reading, "rb") as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def contents(folder: Path) -> dict[str, str]:
    """{what: SHA-256} of a finished run."""
    final = jp.load(folder / "final")
    arrays = hashlib.sha256()
    for keys, x in jax.tree_util.tree_leaves_with_path(final.variables):
        arrays.update(f"{jax.tree_util.keystr(keys)} {x.dtype} {x.shape}".encode())
        arrays.update(np.asarray(x).tobytes())
    keep = {n: np.flatnonzero(k).tolist() for n, k in sorted(final.keep.items())}
    rows = [json.loads(s) for s in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    texts = {
        "keep": json.dumps(keep),
        "metrics": json.dumps(rows),
        **{
            name: (folder / name).read_text()
            for name in ("evaluation.json", "prune.json", "path/1.jsonl")
        },
        "report": str((folder / "report" / "index.html").exists()),
    }
    sums = {k: hashlib.sha256(text.encode()).hexdigest() for k, text in texts.items()}
    return {"arrays": arrays.hexdigest(), **sums}


def table(found: collections.Counter) -> str:
    """Kills by stage and signal, as Markdown."""
    lines = ["| stage | SIGKILL | SIGTERM |", "| --- | ---: | ---: |"]
    for stage in STAGES:
        cells = " | ".join(str(found[stage, n]) for n in SIGNALS)
        lines.append(f"| {stage} | {cells} |")
    totals = " | ".join(str(sum(found[s, n] for s in STAGES)) for n in SIGNALS)
    return "\n".join([*lines, f"| all | {totals} |"])


if __name__ == "__main__":
    main()
