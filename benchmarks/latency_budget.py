# SPDX-License-Identifier: Apache-2.0
"""Cuts networks to budgets of milliseconds and of FLOPs, and times what is left.

    python benchmarks/latency_budget.py [--size 120,160] [--batch 1] [--repeats 30]

Prints a markdown table: what stays of the FLOPs, of the milliseconds of the products
that `jaxprune.timings` measured, and of the whole network's, all networks in turns.
Untrained ones: no time depends on weights.
"""

import argparse
import datetime
import os
import platform

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune.budget import measure, sizes

NETWORKS = {
    "SegNet": lambda: jp.models.SegNet(11, widths=(16, 32, 64, 128, 128)),
    "DeepLabv3+": lambda: jp.models.DeepLabV3Plus(11),
}
RATIOS = (0.8, 0.6, 0.4)


def shares(graph, keep, table):
    """(of the FLOPs, of the milliseconds of the products) that stay."""
    kept = jnp.array([int(k.sum()) for k in keep.values()])
    dense = jp.cost(graph).flops
    whole, left = (float(measure(graph, table, n)) for n in (sizes(graph), kept))
    return jp.cost(graph, keep).flops / dense, left / whole


def rows(name, model, images, repeats):
    variables = model.init(jax.random.key(0), images, train=False)
    graph = jp.trace(model.apply, variables, images, train=False)
    table = jp.timings(model.apply, graph, variables, images, train=False)
    scores = jp.score(jp.chain(jp.magnitude(), jp.normalize()), graph, variables)
    networks, told = {"dense": (model.apply, variables)}, {}
    for ratio in RATIOS:
        for budget in (jp.latency(ratio, table), jp.flops(ratio)):
            keep = jp.select(graph, scores, budget, multiple_of="auto")
            which = ("latency" if budget.kind is table else "flops", ratio)
            networks[which] = (
                jp.slim(model.apply, graph, keep),
                jp.shrink(graph, keep, variables),
            )
            told[which] = shares(graph, keep, table)
    speeds = jp.bench(networks, images, repeats=repeats, train=False)
    dense = speeds["dense"].percentile(50)
    yield f"| {name} | dense | 100% | 100% | {dense:.1f} | 100% |"
    for (kind, ratio), (flops, products) in told.items():
        ms = speeds[kind, ratio].percentile(50)
        yield (
            f"| {name} | {kind}({ratio}) | {flops:.0%} | {products:.0%} | {ms:.1f} "
            f"| {ms / dense:.0%} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="120,160", help="H,W")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    images = jnp.zeros((args.batch, *map(int, args.size.split(",")), 3))
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, "
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {args.batch}\n"
    )
    print("| network | budget | FLOPs | ms of its products | ms | of the dense |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, make in NETWORKS.items():
        for line in rows(name, make(), images, args.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
