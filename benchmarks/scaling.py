# SPDX-License-Identifier: Apache-2.0
"""How time and memory grow: with equations, with channels, and to a billion parameters.

    python benchmarks/scaling.py equations|channels|shrink [--least N] [--most N]

Prints markdown. Seconds are CPU seconds, memory is the peak beyond what was held
before; *jaxpr* is JAX's own tracing, the others are beyond it. The slope is that of a
straight line through the logarithms of the upper half of the sizes: 1 is linear.
"""

import argparse
import gc
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np

import jaxprune as jp
from jaxprune import matching

EQUATIONS = (300, 1_000, 3_000, 10_000, 20_000)
CHANNELS = (256, 1_024, 4_096, 16_384, 65_536)
HEADER = ("jaxpr, s", "trace, s", "trace, MiB", "plan, s", "plan, MiB")
MIB = 2**20


def struct(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p["bias"]


# Blocks of width 8; each returns what the next one takes.


def chain(p: Any, x: Any) -> Any:
    return jax.nn.relu(dense(p["a"], x))


def residual(p: Any, x: Any) -> Any:
    return x + dense(p["b"], jax.nn.relu(dense(p["a"], x)))


def branching(p: Any, x: Any) -> Any:
    both = [jax.nn.relu(dense(p["a"], x)), jax.nn.relu(dense(p["b"], x))]
    return dense(p["join"], jnp.concatenate(both, axis=-1))


BLOCKS = {"chain": chain, "residual": residual, "branching": branching}


def stack(kind: str, count: int) -> tuple[Callable[..., Any], Any, Any]:
    """`count` blocks between two dense layers: apply, variables, input."""
    layer = {"kernel": struct(8, 8), "bias": struct(8)}
    block = {"a": layer, "b": layer, "join": {**layer, "kernel": struct(16, 8)}}
    wanted = {"chain": "a", "residual": "ab", "branching": ("a", "b", "join")}[kind]
    params = {f"{i:05d}": {k: block[k] for k in wanted} for i in range(count)}
    params = {"first": layer, **params, "last": {**layer, "kernel": struct(8, 8)}}

    def apply(params: Any, x: Any) -> Any:
        x = dense(params["first"], x)
        for i in range(count):
            x = BLOCKS[kind](params[f"{i:05d}"], x)
        return dense(params["last"], x)

    return apply, params, struct(1, 8)


def wide(channels: int) -> tuple[Callable[..., Any], Any, Any]:
    """A residual sum, a layer norm and a concatenation of `channels` channels."""
    c = channels
    params = {
        "first": {"kernel": struct(16, c), "bias": struct(c)},
        "block": {"kernel": struct(c, c), "bias": struct(c)},
        "norm": {"scale": struct(c), "bias": struct(c)},
        "side": {"kernel": struct(c, c), "bias": struct(c)},
        "last": {"kernel": struct(2 * c, 10), "bias": struct(10)},
    }

    def apply(params: Any, x: Any) -> Any:
        x = dense(params["first"], x)
        x = x + jax.nn.relu(dense(params["block"], x))
        mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
        x = (x - mean) * jax.lax.rsqrt(square - mean * mean + 1e-6)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        x = jnp.concatenate([x, jax.nn.relu(dense(params["side"], x))], axis=-1)
        return dense(params["last"], x)

    return apply, params, struct(1, 16)


def curve(label: str, nets: Sequence[tuple[int, Any]]) -> None:
    """Print a table with one row a network, and the slope of each column."""
    print(f"\n| {label} | groups | {' | '.join(HEADER)} |")
    print("| ---: |" + " ---: |" * (1 + len(HEADER)))
    sizes, rows = [], []
    for size, (apply, params, x) in nets:
        groups, figures = measured(apply, params, x)
        sizes.append(size)
        rows.append(figures)
        cells = " | ".join(f"{v:.3g}" for v in figures)
        print(f"| {size:,} | {groups} | {cells} |", flush=True)
    if len(rows) > 3:
        line, half = np.log(sizes), len(rows) // 2
        slopes = np.polyfit(line[half:], np.log(np.maximum(rows, 1e-6))[half:], 1)[0]
        print(f"| slope | | {' | '.join(f'{s:.2f}' for s in slopes)} |")


def measured(apply: Callable[..., Any], params: Any, x: Any) -> tuple[int, list[float]]:
    """Groups, and the figures of `HEADER`."""

    def trace() -> jp.Graph:
        return jp.trace(apply, params, x)

    def cut() -> Any:
        return jax.eval_shape(jp.slim(apply, graph, keep), small, x)

    trace()  # what JAX keeps of traced functions is there from now on
    timed = measure.spent(trace)
    graph = timed.result
    keep = {n: np.arange(g.size) % 2 == 0 for n, g in graph.groups.items()}
    small = jax.eval_shape(lambda v: jp.shrink(graph, keep, v), params)
    planned = measure.spent(cut)
    figures = [timed.jaxpr, timed.beyond, measure.spent(trace, memory=True).peak]
    figures += [planned.plan, measure.spent(cut, memory=True).plan_peak]
    return len(graph.groups), [
        v / MIB if "MiB" in name else v for name, v in zip(HEADER, figures)
    ]


def by_equations(sizes: Sequence[int], kinds: Sequence[str]) -> None:
    for kind in kinds:
        one, two = (
            measure.equations(jax.make_jaxpr(apply)(params, x))
            for apply, params, x in (stack(kind, 1), stack(kind, 2))
        )
        blocks = [max(1, round((n - 2 * one + two) / (two - one))) for n in sizes]
        nets = [(one + (n - 1) * (two - one), stack(kind, n)) for n in blocks]
        curve(f"equations, {kind}", nets)


def by_channels(most: int) -> None:
    curve("channels of an axis", [(c, wide(c)) for c in CHANNELS if c <= most])


class Peak:
    """The most resident memory since it was entered, in bytes, sampled each 2 ms."""

    def __enter__(self) -> "Peak":
        self.start = self.most = resident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, resident())

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        self._thread.join()


def touch(size: int) -> None:
    """Have the system find this much memory now, not while a clock runs."""
    np.empty(size, np.uint8).fill(0)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def shrink(parameters: int) -> None:
    """`jp.shrink` of jax arrays against numpy's copy of what is kept."""
    layers = max(2, round(parameters / WIDTH**2))
    names = [f"{i:02d}" for i in range(layers)]

    def apply(params: Any, x: Any) -> Any:
        for name in names:
            x = jax.nn.relu(x @ params[name])
        return x

    square = dict.fromkeys(names, struct(WIDTH, WIDTH))
    graph = jp.trace(apply, square, struct(1, WIDTH))
    count = layers * WIDTH**2
    total, leaf = count * 4, WIDTH**2 * 4
    print(f"\n{layers} kernels of {WIDTH} x {WIDTH}: {count:,} parameters")
    columns = ("kept", "new, GiB", "shrink, s", "copy, s", "ratio", "indexed, s")
    print(f"\n| {' | '.join(columns)} | above, leaves |")
    print("| --- |" + " ---: |" * 6)
    old = {n: jnp.full((WIDTH, WIDTH), 1.0, jnp.float32) for n in names}
    jax.block_until_ready(old)
    touch(total)
    for label, rule in KEEPS.items():
        keep = {n: rule(np.arange(g.size)) for n, g in graph.groups.items()}
        gc.collect()
        with Peak() as peak:
            start = time.process_time()
            new = jax.block_until_ready(jp.shrink(graph, keep, old))
            seconds = time.process_time() - start
        size = sum(x.nbytes for x in new.values())
        above = (peak.most - peak.start - size) / leaf
        arrays = [np.asarray(x) for x in new.values()]
        start = time.process_time()
        for x in arrays:
            x.copy()
        copy = time.process_time() - start
        start = time.process_time()
        indexed(graph, keep, old)
        plain = time.process_time() - start
        print(
            f"| {label} | {size / 2**30:.2f} of {total / 2**30:.2f} | {seconds:.2f} "
            f"| {copy:.2f} | {seconds / copy:.1f} | {plain:.2f} | {above:.2f} |",
            flush=True,
        )
        del new, arrays


def indexed(graph: jp.Graph, keep: Any, old: Any) -> None:
    """The plainest NumPy of the same: rows, then columns, by index."""
    kept = dict(
        zip([leaf.path[0] for leaf in graph.leaves], matching.kept_indices(graph, keep))
    )
    for name, x in old.items():
        array = np.asarray(x)
        for axis, indices in enumerate(kept[name]):
            if indices is not None:
                array = np.take(array, indices, axis)


WIDTH = 8192
KEEPS = {
    "first half of each group": lambda i: i < len(i) // 2,
    "every second channel": lambda i: i % 2 == 0,
    "a random half": lambda i: np.random.default_rng(0).permutation(i) % 2 == 0,
    "a random 9 in 10": lambda i: np.random.default_rng(0).permutation(i) % 10 > 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("equations", "channels", "shrink"))
    parser.add_argument("--least", type=int, default=0, help="the smallest size")
    parser.add_argument("--kind", choices=BLOCKS, help="of equations: this one alone")
    parser.add_argument("--most", type=int, default=10**9, help="the largest size")
    options = parser.parse_args()
    if options.what == "equations":
        sizes = [n for n in EQUATIONS if options.least <= n <= options.most]
        by_equations(sizes, [options.kind] if options.kind else list(BLOCKS))
    else:
        {"channels": by_channels, "shrink": shrink}[options.what](options.most)


if __name__ == "__main__":
    main()
