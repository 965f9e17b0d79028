# SPDX-License-Identifier: Apache-2.0
"""CPU seconds to trace networks at full size, and to shrink their variables once.

    python benchmarks/trace.py [NAME ...]

Prints a markdown table. *jaxpr*: JAX's own tracing of the network. *trace*: what
`jaxprune.trace` takes beyond that. *shrink*: the first one in this process of that
network's variables, every second channel of each group going. What `import jaxprune`
loads when the first name of it is used is told apart.
"""

import sys
import time

import jax
import jax.numpy as jnp
import measure
import networks
import numpy as np

import jaxprune as jp
from jaxprune import models

NETWORKS = {
    "ResNet-50": (networks.ResNet50(), (224, 224)),
    "DenseNet-121": (networks.DenseNet121(), (224, 224)),
    "EfficientNet-B0": (networks.EfficientNetB0(), (224, 224)),
    "SegNet": (models.SegNet(11), (360, 480)),
    "SegNet-Basic": (models.SegNetBasic(11), (360, 480)),
    "U-Net": (models.UNet(2), (512, 512)),
}
COLUMNS = (
    *("network", "parameters", "groups", "channels", "equations"),
    *("jaxpr, s", "trace, s", "shrink, s"),
)


def row(name: str) -> str:
    net, size = NETWORKS[name]
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    count = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    if count != networks.PARAMETERS.get(name, count):
        raise SystemExit(f"{name} has {count:,} parameters, not as published")
    program = jax.make_jaxpr(net.apply)(shapes, images)
    run = measure.spent(lambda: jp.trace(net.apply, shapes, images))
    graph = run.result
    variables = jax.tree.map(lambda x: jnp.asarray(np.ones(x.shape, x.dtype)), shapes)
    keep = {n: np.arange(g.size) % 2 == 0 for n, g in graph.groups.items()}
    start = time.process_time()
    jax.block_until_ready(jp.shrink(graph, keep, variables))
    shrink = time.process_time() - start
    return (
        f"| {name} | {count:,} | {len(graph.groups)} | {graph.channels:,} "
        f"| {measure.equations(program):,} | {run.jaxpr:.2f} | {run.beyond:.2f} "
        f"| {shrink:.2f} |"
    )


def main() -> None:
    start = time.process_time()
    jp.trace  # noqa: B018 (names are loaded when they are first used)
    print(f"Loading jaxprune: {time.process_time() - start:.2f} s\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    for name in sys.argv[1:] or NETWORKS:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
