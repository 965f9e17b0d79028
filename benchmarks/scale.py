# SPDX-License-Identifier: Apache-2.0
"""The same run on 1 to 8 devices of 1 to 4 processes: losses, keep, cut, collectives.

    python benchmarks/scale.py [--devices 1,2,4,8] [--processes 1,2,4]

Devices are simulated on the host's processor; several processes find each other by
`jax.distributed` on loopback. Each run trains a small network for 6 steps of one global
batch, scores and cuts it, and retrains what is left for 3, with weights in float64 (the
pixels' own weights are float32). Prints markdown, a row a run.

    python benchmarks/scale.py --worker '{"folder": ..., "shard": "fsdp", ...}'

is one process of such a run; its last line is JSON.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jaxprune as jp
from jaxprune import data
from jaxprune.sharded import fetched
from jaxprune.slim import slim
from jaxprune.train import Config, Data, Evaluate, Fit, Prune, Scale, cut
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps
from jaxprune.train.loop import Job, Splits, train
from jaxprune.train.progress import Progress

ROOT = Path(__file__).parents[1]
SIZE = (8, 16)
CLASSES = data.Classes(("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
ASKED = {
    "folder": "",
    "shard": "none",
    "accumulate": 1,
    "devices": 1,
    "processes": 1,
    "process": 0,
    "port": 0,
    "method": "criterion",
    "dtype": "float64",
    "counted": True,
}


class Net(nn.Module):
    """Convolution, batch norm, ReLU, dropout, twice, and to the classes."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images
        for name, side in (("first", 3), ("second", 1)):
            x = nn.Conv(16, (side, side), name=name)(x)
            norm = nn.BatchNorm(use_running_average=not train, name=f"{name}_norm")
            x = nn.Dropout(0.1, deterministic=not train)(nn.relu(norm(x)))
        return nn.Conv(len(CLASSES), (1, 1), name="last")(x)


class Told(Progress):
    """Progress that keeps the loss of every step."""

    losses: list[float]

    def step(self, done: int, loss: float) -> None:
        self.losses.append(loss)
        super().step(done, loss)


def frames(name: str, count: int, seed: int) -> data.Split:
    """Frames whose classes show in their colours, and rows that do not count."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), (count, *SIZE)).astype(np.uint8)
    images = rng.integers(0, 80, (count, *SIZE, 3)) + 120 * np.eye(3)[labels]
    for i, label in enumerate(labels):
        label[: i % 5] = CLASSES.ignore
    stems = tuple(f"{name}{i}" for i in range(count))
    return data.Split(name, images.astype(np.uint8), labels, stems, CLASSES)


def collectives(text: str) -> dict[str, int]:
    """How many of each kind a compiled program's text holds."""
    found = re.findall(rf"= .*?({'|'.join(KINDS)})(?:-start)?\(", text)
    return dict(sorted(collections.Counter(found).items()))


def step_text(job: Job, graph: jp.Graph, variables: Any, penalty: bool) -> str:
    """The compiled training step, with a penalty's proximal step behind it or not."""
    layout = steps.layout_of(job.config.scale)

    def around(tx: Any) -> Any:
        import optax

        return optax.chain(tx, jp.proximal(graph, 1e-4)) if penalty else tx

    tx, _ = steps.optimizer(job.fit, job.total, around)
    state = steps.begin(layout, variables, tx)
    target = steps.Target(CLASSES.ignore, np.ones(len(CLASSES) + 1, np.float32))
    accumulate = job.config.scale.accumulate
    step = steps.make_step(
        job.apply, tx, target, accumulate=accumulate, layout=layout, average=0.9
    )
    rows = job.fit.batch // jax.process_count()
    batch = {
        "image": np.zeros((rows, *SIZE, 3), np.uint8),
        "label": np.zeros((rows, *SIZE), np.int32),
    }
    batch = steps.put_batch(layout.mesh, batch)
    places = layouts.shardings(layout, state), steps.replicated(layout.mesh)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=places)
    return jitted.lower(state, batch, None, jax.random.key(0)).compile().as_text()


def worker(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One process of one run: what it found."""
    asked = {**ASKED, **asked}
    jax.config.update("jax_enable_x64", asked["dtype"] == "float64")
    if asked["processes"] > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{asked['port']}", asked["processes"], asked["process"]
        )
    folder = Path(asked["folder"])
    fit = Fit(epochs=2, batch=16, optimizer="sgd", lr=0.1, schedule="constant", ema=0.9)
    config = Config(
        data=Data("synthetic", size=SIZE, augment=data.Augment(colour=0.2)),
        train=fit,
        retrain=dataclasses.replace(fit, epochs=1),
        prune=Prune(
            method=asked["method"],
            ratio=0.5,
            multiple_of=1,
            min_channels=2,
            batches=2,
            statistics=0,
        ),
        scale=Scale(asked["shard"], asked["accumulate"]),
        evaluate=Evaluate(every=2, batch=8),
    )
    splits = Splits(frames("train", 48, 0), frames("val", 8, 1), frames("test", 8, 2))
    progress = Told(folder, speaks=False)
    progress.losses = []
    net = Net()
    images = np.zeros((1, *SIZE, 3), np.float32)
    start = net.init(jax.random.key(7), images)
    start = jax.tree.map(lambda x: np.asarray(x, asked["dtype"]), start)
    graph = jp.trace(net.apply, start, images, train=False)
    job = Job("train", net.apply, fit, config, splits, folder)
    dense = train(job, start, progress)
    layout = steps.layout_of(config.scale)
    retrain = dataclasses.replace(job, stage="retrain", fit=config.retrain)
    keep, small, _ = cut.prune_stage(retrain, graph, dense, progress)
    retrain = dataclasses.replace(retrain, apply=slim(net.apply, graph, keep))
    train(retrain, small, progress)
    # Of weights that are the same everywhere, so that the cut's bits are comparable.
    shrunk = jp.shrink(graph, keep, layouts.put(layout, start))
    held = jax.tree.leaves(dense)
    return {
        "devices": jax.device_count(),
        "losses": progress.losses,
        "keep": digest(keep[n] for n in sorted(keep)),
        "widths": [int(k.sum()) for k in keep.values()],
        "cut": digest(fetched(x) for x in jax.tree.leaves(shrunk)),
        "share": sum(_here(x) for x in held) / sum(x.nbytes for x in held),
        "collectives": [
            collectives(step_text(job, graph, start, penalty))
            for penalty in ((False, True) if asked["counted"] else ())
        ],
    }


def _here(x: Any) -> int:
    return x.addressable_data(0).nbytes if isinstance(x, jax.Array) else x.nbytes


def digest(arrays: Any) -> str:
    """The start of a SHA-256 over the bytes, shapes and types of arrays."""
    total = hashlib.sha256()
    for x in arrays:
        total.update(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return total.hexdigest()[:12]


def launch(folder: Path, *, devices: int = 1, processes: int = 1, **asked: Any) -> Any:
    """A run on so many devices in all, of so many processes; what the first found.

    Raises RuntimeError with the output of a process that failed or found other things.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    quick = "--xla_backend_optimization_level=0 --xla_cpu_multi_thread_eigen=false"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {quick}"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    folder.mkdir(parents=True, exist_ok=True)
    shared = {"folder": str(folder), "processes": processes, "port": port, **asked}
    started = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                json.dumps({**shared, "process": i}),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(started, ended, strict=True):
        if process.returncode:
            raise RuntimeError(errors)
    found = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    if any(one != found[0] for one in found):
        raise RuntimeError(f"processes found different things: {found}")
    return found[0]


def table(devices: list[int], processes: list[int]) -> None:
    """Run all and print a row each."""
    heads = ["devices", "processes", "state", "largest difference of a loss", "keep"]
    heads += ["cut", "a device holds", "collectives", "with a penalty"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}", flush=True)
    first = None
    for shard in ("none", "fsdp"):
        for count in devices:
            for several in processes:
                if several > count or (shard, count) == ("fsdp", 1):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    found = launch(
                        Path(folder),
                        devices=count,
                        processes=several,
                        shard=shard,
                        counted=several == 1,
                    )
                first = first or found
                a, b = np.array(first["losses"]), np.array(found["losses"])
                state = {"none": "whole", "fsdp": "in shares"}[shard]
                cells = [count, several, state, f"{np.max(np.abs(b / a - 1)):.1e}"]
                cells += [found["keep"], found["cut"], f"{found['share']:.1%}"]
                counted = [
                    ", ".join(f"{n} {k}" for k, n in kinds.items()) or "none"
                    for kinds in found["collectives"]
                ]
                cells += counted or ["-"] * 2
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--worker", help="one process of a run, as JSON")
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(json.loads(options.worker))))
    else:
        counts = [
            [int(n) for n in getattr(options, w).split(",")]
            for w in ("devices", "processes")
        ]
        table(*counts)


if __name__ == "__main__":
    main()
