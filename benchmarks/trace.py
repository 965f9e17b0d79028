# SPDX-License-Identifier: Apache-2.0
"""Seconds to trace the shipped networks at full size, from shapes alone.

    python benchmarks/trace.py

Prints a markdown table: the first trace, which includes JAX's own tracing of the
network, and that alone, so that the ratio is what the analysis adds.
"""

import time

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune import models

NETWORKS = {
    "SegNet": (models.SegNet(11), (360, 480)),
    "SegNet-Basic": (models.SegNetBasic(11), (360, 480)),
    "U-Net": (models.UNet(2), (512, 512)),
}


def main() -> None:
    print("| network | groups | channels | jaxpr alone, s | trace, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (net, size) in NETWORKS.items():
        images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        variables = jax.eval_shape(net.init, jax.random.key(0), images)
        start = time.perf_counter()
        jax.make_jaxpr(net.apply)(variables, images)
        middle = time.perf_counter()
        graph = jp.trace(net.apply, variables, images)
        end = time.perf_counter()
        print(
            f"| {name} | {len(graph.groups)} | {graph.channels:,} "
            f"| {middle - start:.2f} | {end - middle:.2f} |"
        )


if __name__ == "__main__":
    main()
