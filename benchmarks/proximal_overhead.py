# SPDX-License-Identifier: Apache-2.0
"""What share of a SegNet training step the group lasso and its proximal step take.

    python benchmarks/proximal_overhead.py                    # 0.25 x width, 120 x 160
    python benchmarks/proximal_overhead.py --full --batch 4   # for an accelerator

Times a jitted training step (Adam) with neither, and in turns with it the penalty's
value and the proximal step on their own, which is more than they cost inside the step,
where XLA fuses them with the optimiser. The aim is 5 % at most.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

import jaxprune
from jaxprune import models
from jaxprune.sparsity import group_lasso, proximal

WIDTHS = {False: (16, 32, 64, 128, 128), True: (64, 128, 256, 512, 512)}
SIZE = {False: (120, 160), True: (360, 480)}
CLASSES = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="full widths, 360 x 480")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    net = models.SegNet(CLASSES, widths=WIDTHS[args.full])
    variables = models.init(net, jax.random.key(0), SIZE[args.full])
    images = jax.random.uniform(jax.random.key(1), (args.batch, *SIZE[args.full], 3))
    labels = jax.random.randint(jax.random.key(2), images.shape[:3], 0, CLASSES)
    graph = jaxprune.trace(net.apply, variables, images)

    params, tx = variables["params"], optax.adam(1e-3)
    updates = jax.tree.map(lambda x: 1e-3 * x, params)
    runs = {
        "training step": (
            _training_step(net, tx),
            (variables, tx.init(params), images, labels),
        ),
        "proximal step": (_proximal_step(graph), (params, updates)),
        "penalty": (jax.jit(lambda p: group_lasso(graph, p)), (params,)),
    }
    times = {name: statistics.median(t) for name, t in _time(runs, args.rounds).items()}
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, {SIZE[args.full]}")
    for name, seconds in times.items():
        share = seconds / times["training step"]
        print(f"{name:16} {1e3 * seconds:10.3f} ms {share:8.2%} of the step")


def _training_step(net: Any, tx: optax.GradientTransformation) -> Callable[..., Any]:
    @jax.jit
    def step(variables, state, images, labels):
        def loss(params):
            tree = {**variables, "params": params}
            logits, new = net.apply(tree, images, train=True, mutable=["batch_stats"])
            targets = jax.nn.one_hot(labels, CLASSES)
            return optax.softmax_cross_entropy(logits, targets).mean(), new

        params = variables["params"]
        gradients, new = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return {"params": optax.apply_updates(params, updates), **new}, state

    return step


def _proximal_step(graph: jaxprune.Graph) -> Callable[..., Any]:
    tx = proximal(graph, 1e-4)

    @jax.jit
    def step(params, updates):
        return tx.update(updates, tx.init(params), params)[0]

    return step


def _time(runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of `rounds` calls, the functions called in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, (function, arguments) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if i:  # The first call compiles.
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
