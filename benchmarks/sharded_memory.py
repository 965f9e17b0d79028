# SPDX-License-Identifier: Apache-2.0
"""Host memory of tracing, cutting and saving a tree of a billion parameters in shares.

    python benchmarks/sharded_memory.py [--parameters N]

Kernels of 8192 x 8192 in float32, each split over 8 simulated devices; a random 5,728
channels of each 8,192 stay, a number that 8 divides. Prints markdown: the peak of each
stage beyond what was held before it, sampled each 2 ms, in GiB and as a fraction of the
tree.
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

# Before JAX starts.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from scaling import Peak

import jaxprune as jp
from jaxprune.pruned import Pruned
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps
from jaxprune.train.config import Scale

WIDTH, GIB = 8192, 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=10**9)
    count = -(-parser.parse_args().parameters // WIDTH**2)
    names = [f"{i:02d}" for i in range(count)]
    kernel = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    shapes = dict.fromkeys(names, kernel)

    def apply(params: Any, x: Any) -> Any:
        for name in names:
            x = jax.nn.relu(x @ params[name])
        return x

    layout = steps.layout_of(Scale("fsdp"))
    (place,) = set(layouts.shardings(layout, shapes).values())
    drawn = jax.jit(
        lambda key: jax.random.uniform(key, kernel.shape), out_shardings=place
    )
    tree = {
        n: drawn(key)
        for n, key in zip(names, jax.random.split(jax.random.key(0), count))
    }
    jax.block_until_ready(tree)
    total = sum(x.nbytes for x in tree.values())
    print(f"{count * WIDTH**2:,} parameters, {total / GIB:.2f} GiB\n")
    print("| | result, GiB | peak beyond what was held, GiB | of the tree |")
    print("| --- | ---: | ---: | ---: |")

    def stage(name: str, run: Any, size: Any) -> Any:
        gc.collect()
        with Peak() as peak:
            result = jax.block_until_ready(run())
        above = peak.most - peak.start
        cells = f"{size(result) / GIB:.2f} | {above / GIB:.2f} | {above / total:.0%}"
        print(f"| {name} | {cells} |", flush=True)
        return result

    def traced() -> jp.Graph:
        return jp.trace(apply, tree, jax.ShapeDtypeStruct((1, WIDTH), jnp.float32))

    def held(small: Any) -> int:
        return sum(s.data.nbytes for x in small.values() for s in x.addressable_shards)

    graph = stage("trace", traced, lambda _: 0)
    rng = np.random.default_rng(0)
    keep = {n: rng.permutation(g.size) < 5728 for n, g in graph.groups.items()}
    small = stage("cut", lambda: jp.shrink(graph, keep, tree), held)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pruned"
        pruned = Pruned(apply, small, graph, keep)
        stage("save", lambda: jp.save(path, pruned), lambda _: held(small))


if __name__ == "__main__":
    main()
