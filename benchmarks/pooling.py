# SPDX-License-Identifier: Apache-2.0
"""Times pooling with locations against two common forms of it.

    python benchmarks/pooling.py [--shape 8,180,240,64] [--repeats 15]

Prints a markdown table: milliseconds, and their ratio to ours. "one-hot" finds
locations by argmax over the window and un-pools by a one-hot product; "reduce_window"
pools by `flax.linen.max_pool` and takes the locations from its derivative.
"""

import argparse
import datetime
import os
import platform
import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models import pooling


def ours(x):
    y, code = pooling.max_pool(x)
    return pooling.unpool(y, code, x.shape[1:3])


def one_hot(x):
    b, h, w, c = x.shape
    windows = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
    windows = windows.reshape(b, h // 2, w // 2, c, 4)
    code = jnp.argmax(windows, axis=-1)
    y = jnp.take_along_axis(windows, code[..., None], axis=-1)
    placed = jax.nn.one_hot(code, 4, dtype=x.dtype) * y
    placed = placed.reshape(b, h // 2, w // 2, c, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return placed.reshape(b, h, w, c)


def reduce_window(x):
    y, pull = jax.vjp(lambda v: nn.max_pool(v, (2, 2), (2, 2)), x)
    return pull(y)[0]


def milliseconds(functions, x, repeats):
    """The fastest of calls taken in turn, so that all see the same machine."""
    compiled = [jax.jit(f).lower(x).compile() for f in functions]
    times = [[] for _ in functions]
    for repeat in range(repeats + 2):
        for f, kept in zip(compiled, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(f(x))
            if repeat >= 2:
                kept.append(1e3 * (time.perf_counter() - start))
    return [min(kept) for kept in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8,180,240,64", help="B,H,W,C, H and W even")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    shape = tuple(int(n) for n in args.shape.split(","))
    x = jax.random.normal(jax.random.key(0), shape)
    forms = {"ours": ours, "one-hot": one_hot, "reduce_window": reduce_window}

    def backward(form):
        return jax.grad(lambda v: jnp.sum(jnp.square(form(v))))

    forward_ms = milliseconds(forms.values(), x, args.repeats)
    both_ms = milliseconds([backward(f) for f in forms.values()], x, args.repeats)
    device = jax.devices()[0]
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, "
        f"{device.device_kind}, JAX {jax.__version__}, float32 {list(shape)}\n"
    )
    print("| pool and un-pool | forward ms | ratio | forward + backward ms | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, a, b in zip(forms, forward_ms, both_ms, strict=True):
        ratios = a / forward_ms[0], b / both_ms[0]
        print(f"| {name} | {a:.1f} | {ratios[0]:.2f} | {b:.1f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
