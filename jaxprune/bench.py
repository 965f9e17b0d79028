# SPDX-License-Identifier: Apache-2.0
"""How fast a network is where it runs: dense against pruned, in one process.

Calls are timed one by one, from the call to the last number of its answer; those of the
two networks take turns, so that both meet the same machine.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import checkpoint, formats
from jaxprune.base import Apply, ConfigError, PyTree
from jaxprune.pruned import check_room, image_size
from jaxprune.trees import nbytes

_PERCENTILES = (50, 90, 99)


class Speed(NamedTuple):
    """One network at one input. ms: float64[calls], of each call, in order.

    compile_s: seconds to trace and compile. memory_bytes: what the compiled program
    holds at most beside its arguments, as XLA plans it; None where it does not tell.
    peak_bytes: with its arguments, at the moment when that is most. variables_bytes: of
    the network's own arrays.
    """

    ms: np.ndarray
    compile_s: float
    memory_bytes: int | None
    peak_bytes: int | None = None
    variables_bytes: int = 0

    def percentile(self, q: float) -> float:
        """Milliseconds within which q percent of the calls ended."""
        return float(np.percentile(self.ms, q))


def bench(
    networks: Mapping[str, tuple[Apply, PyTree]],
    *inputs: Any,
    repeats: int = 30,
    **kwargs: Any,
) -> dict[str, Speed]:
    """Time networks {name: (apply, variables)} on the same inputs, one after another.

    inputs: arrays; kwargs are static (`train=False`). Each apply is jitted and called
    once before the clock starts. Raises ConfigError for no repeats.
    """
    _check_repeats(repeats)
    ready = {}
    for name, (apply, variables) in networks.items():
        start = time.perf_counter()
        lowered = jax.jit(lambda v, x, f=apply: f(v, *x, **kwargs)).lower(
            variables, inputs
        )
        run = lowered.compile()
        seconds = time.perf_counter() - start
        jax.block_until_ready(run(variables, inputs))
        ready[name] = run, variables, seconds
    ms: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, (run, variables, _) in ready.items():
            start = time.perf_counter()
            jax.block_until_ready(run(variables, inputs))
            ms[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: Speed(np.array(ms[name]), seconds, *_memory(run), nbytes(variables))
        for name, (run, variables, seconds) in ready.items()
    }


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ConfigError(f"bench(repeats={repeats}): must be 1 or more")


def bench_saved(
    folder: str | Path,
    *,
    batches: Sequence[int] = (1, 8),
    size: tuple[int, int] | None = None,
    repeats: int = 30,
) -> dict[str, Any]:
    """Time a saved network of images against the dense one that it was cut from.

    size: (H, W); the training size by default. The dense one has random weights, of
    which no time depends. Returns what JSON can hold: 'device', 'jax', 'size' and
    'rows', a batch and a network each. Raises CheckpointError as `load` does, for a
    network that is not shipped too (call `bench` with its function), and ConfigError
    where no size is given and the network's file names none, for images that memory
    does not hold, and for no batches or repeats.
    """
    if not batches or min(batches) < 1:
        raise ConfigError(
            f"bench(batches={batches}): must be numbers from 1 on, (1, 8)"
        )
    _check_repeats(repeats)
    pruned = checkpoint.load(folder)
    net = checkpoint.dense_network(folder, pruned.info)
    at = size or image_size(pruned.info, str(folder))
    check_room(at, max(batches))
    images = jnp.zeros((1, *at, 3))
    networks = {
        "dense": (net.apply, net.init(jax.random.key(0), images)),
        "pruned": (pruned.apply, pruned.variables),
    }
    rows = []
    for batch in batches:
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.random((batch, *at, 3), np.float32))
        found = bench(networks, images, repeats=repeats, train=False)
        rows += [_row(name, batch, speed) for name, speed in found.items()]
    device = jax.devices()[0]
    return {
        "version": 1,
        "jaxprune": formats.writer_here(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "jax": jax.__version__,
        "size": list(at),
        "repeats": repeats,
        "device_peak_bytes": _device_peak(),
        "rows": rows,
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """What `bench_saved` returns as a table."""
    heights = "x".join(map(str, result["size"]))
    head = ["network", "batch", *(f"p{q}, ms" for q in _PERCENTILES)]
    head += ["images/s", "compile, s", "memory, MB", "weights, MB"]
    lines = [
        f"{heights} on {result['device']}, jax {result['jax']}, "
        f"{result['repeats']} calls each",
        "",
        f"| {' | '.join(head)} |",
        f"| --- |{' ---: |' * (len(head) - 1)}",
    ]
    for row in result["rows"]:
        memory = row["memory_bytes"]
        cells = [row["network"], str(row["batch"])]
        cells += [f"{row[f'p{q}_ms']:.1f}" for q in _PERCENTILES]
        cells += [f"{row['images_per_s']:.1f}", f"{row['compile_s']:.1f}"]
        cells.append("-" if memory is None else f"{memory / 1e6:.1f}")
        cells.append(f"{row['variables_bytes'] / 1e6:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def check_writable(file: Path) -> None:
    """Raise ConfigError for a file that `write` could not write, and leave it alone."""
    new = not file.exists()
    try:
        with file.open("a", encoding="utf-8"):
            pass
        if new:
            file.unlink()
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}") from error


def write(result: Mapping[str, Any], file: Path) -> None:
    """The result as JSON. Raises ConfigError where the file can't be written."""
    try:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {file}: {error.strerror}") from error


def _row(name: str, batch: int, speed: Speed) -> dict[str, Any]:
    return {
        "network": name,
        "batch": batch,
        **{f"p{q}_ms": round(speed.percentile(q), 4) for q in _PERCENTILES},
        "images_per_s": round(1e3 * batch / float(speed.ms.mean()), 3),
        "compile_s": round(speed.compile_s, 3),
        "memory_bytes": speed.memory_bytes,
        "peak_bytes": speed.peak_bytes,
        "variables_bytes": speed.variables_bytes,
    }


def _memory(run: Any) -> tuple[int | None, int | None]:
    """Bytes that a compiled program plans: temporaries and outputs; all at its peak."""
    plan = run.memory_analysis()
    if plan is None:
        return None, None
    peak = getattr(plan, "peak_memory_in_bytes", None)
    return int(plan.temp_size_in_bytes + plan.output_size_in_bytes), peak


def _device_peak() -> int | None:
    """The most bytes that this process has held on the device; None where unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")
