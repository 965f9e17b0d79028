# SPDX-License-Identifier: Apache-2.0
"""A training job of seconds: a net of two convolutions, frames of coloured noise.

Run as a program it trains the job in the folder that it is given, for tests that kill
it or give it other devices: `python tests/tinyrun.py FOLDER EPOCHS [PORT I]`, with a
port and a number as one of two processes.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import data, models
from jaxprune.train import stages
from jaxprune.train.config import Config, Data, Evaluate, Fit
from jaxprune.train.loop import Job, Splits, train
from jaxprune.train.progress import Progress

SIZE = (8, 12)
# What of a row of metrics.jsonl differs from run to run.
TIMED = ("time", "images_per_s", "host_bytes", "device_bytes")
COUNTS = {"train": 24, "val": 5, "test": 5}
CLASSES = data.Classes(("a", "b", "c"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)))


class Net(nn.Module):
    """Convolution, batch norm, ReLU, dropout, convolution to the classes."""

    dropout: float = 0.1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(6, (3, 3), name="first")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Conv(len(CLASSES), (3, 3), name="last")(x)


def split(name: str, count: int, seed: int = 0) -> data.Split:
    """Frames whose classes show in their colours; a border that does not count."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(CLASSES), (count, *SIZE)).astype(np.uint8)
    images = rng.integers(0, 80, (count, *SIZE, 3)) + 120 * np.eye(3)[labels]
    labels[:, 0] = CLASSES.ignore
    stems = tuple(f"{name}{i}" for i in range(count))
    return data.Split(name, images.astype(np.uint8), labels, stems, CLASSES)


def job(folder: Path, epochs: float = 4, **fields: object) -> Job:
    """A training of `epochs` epochs of 3 steps each, in `folder`."""
    fit = Fit(epochs=epochs, batch=8, lr=1e-2, ema=0.9)
    config = Config(
        name="tiny",
        data=Data("synthetic", size=SIZE, augment=data.Augment(colour=0.2)),
        train=fit,
        evaluate=Evaluate(every=1),
        save_every=1.0,
    )
    splits = Splits(*(split(n, c, i) for i, (n, c) in enumerate(COUNTS.items())))
    folder.mkdir(parents=True, exist_ok=True)
    values = {"stage": "train", "apply": Net().apply, "fit": fit, "config": config}
    return Job(**{**values, "splits": splits, "workdir": folder, **fields})


def variables() -> dict:
    """Initial variables, always the same ones."""
    net = Net()
    return net.init(jax.random.key(7), jnp.zeros((1, *SIZE, 3)), train=False)


def ship(monkeypatch: Any, splits: Splits) -> None:
    """As if the tiny network were shipped, and its frames a source of data."""
    monkeypatch.setattr(
        stages, "load_split", lambda _, name, **more: getattr(splits, name)
    )
    monkeypatch.setattr(models, "build", lambda *args: Net())
    monkeypatch.setattr(models, "init", lambda *args: variables())
    monkeypatch.setattr(models, "rebuild", lambda net, variables: net)


@contextlib.contextmanager
def compilations(folder: Path) -> Iterator[None]:
    """Compiled programs are kept in a folder meanwhile."""
    values = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.02,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def main() -> None:
    """Train in the folder that the first argument names; print devices and state."""
    folder = Path(sys.argv[1])
    if len(sys.argv) > 3:
        address, number = f"127.0.0.1:{sys.argv[3]}", int(sys.argv[4])
        jax.distributed.initialize(address, num_processes=2, process_id=number)
    progress = Progress(folder, speaks=jax.process_index() == 0)
    state = train(job(folder, float(sys.argv[2])), variables(), progress)
    print("devices", jax.device_count(), "step", int(state.step))


if __name__ == "__main__":
    main()
