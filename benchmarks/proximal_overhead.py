# SPDX-License-Identifier: Apache-2.0
"""What the group lasso, its proximal step and gates add to a SegNet training step.

    python benchmarks/proximal_overhead.py                    # 0.25 x width, 120 x 160
    python benchmarks/proximal_overhead.py --full --batch 4   # for an accelerator

Times whole jitted training steps (Adam), in turns: one with none of them, and one with
each. The aim is 5 % at most for penalty and proximal step together.
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
from jaxprune.gates import gate, init_gates, proximal_gates
from jaxprune.metric import adam_steps, preconditioned
from jaxprune.pricing import repriced
from jaxprune.sparsity import group_lasso, proximal
from jaxprune.steering import steer

WIDTHS = {False: (16, 32, 64, 128, 128), True: (64, 128, 256, 512, 512)}
SIZE = {False: (120, 160), True: (360, 480)}
CLASSES = 11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="full widths, 360 x 480")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()

    net = models.SegNet(CLASSES, widths=WIDTHS[args.full])
    variables = models.init(net, jax.random.key(0), SIZE[args.full])
    images = jax.random.uniform(jax.random.key(1), (args.batch, *SIZE[args.full], 3))
    labels = jax.random.randint(jax.random.key(2), images.shape[:3], 0, CLASSES)
    graph = jaxprune.trace(net.apply, variables, images)

    own = {"network": variables["params"], "gates": init_gates(graph)}
    plain = {**variables, "params": {**own, "gates": {}}}
    gated = {**variables, "params": own}
    prox = proximal(graph, 1e-4)
    steered = proximal(graph, steer(graph, 0.4, start=1e-4), repriced(graph))
    own_metric = preconditioned(optax.adam(1e-3), graph, 1e-4, steps=adam_steps())
    runs = {
        "plain": _training(net, plain),
        "proximal step": _training(net, plain, prox),
        "steered, repriced": _training(net, plain, steered),
        "in Adam's metric": _training(net, plain, whole=own_metric),
        "penalty": _training(net, plain, penalty=graph),
        "both": _training(net, plain, prox, penalty=graph),
        "gates": _training(net, gated, gates=(graph, proximal_gates(1e-4))),
    }
    runs = {k: (f, (*start, images, labels)) for k, (f, start) in runs.items()}
    times = _time(runs, args.rounds)
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, {SIZE[args.full]}")
    for name, seconds in times.items():
        # Rounds are paired: what slows one step of a round slows its neighbours.
        more = statistics.median(
            a / b - 1 for a, b in zip(seconds, times["plain"], strict=True)
        )
        print(f"{name:17} {1e3 * statistics.median(seconds):8.1f} ms {more:+8.2%}")


def _training(
    net: Any,
    variables: Any,
    last: optax.GradientTransformation | None = None,
    *,
    whole: optax.GradientTransformation | None = None,
    penalty: jaxprune.Graph | None = None,
    gates: tuple[jaxprune.Graph, optax.GradientTransformation] | None = None,
) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """(a jitted training step, what it starts from)."""
    parts = {"network": [optax.adam(1e-3)], "gates": [optax.adam(1e-3)]}
    parts["network"] += [last] if last else []
    parts["network"] = [whole] if whole else parts["network"]
    parts["gates"] += [gates[1]] if gates else []
    tx = {k: optax.chain(*chain) for k, chain in parts.items()}

    @jax.jit
    def step(variables, state, images, labels):
        def loss(params):
            tree = {**variables, "params": params["network"]}
            if gates:
                tree = gate(gates[0], params["gates"], tree)
            logits, new = net.apply(tree, images, train=True, mutable=["batch_stats"])
            targets = jax.nn.one_hot(labels, CLASSES)
            value = optax.softmax_cross_entropy(logits, targets).mean()
            if penalty is not None:
                value += 1e-4 * group_lasso(penalty, params["network"])
            return value, new

        params = variables["params"]
        gradients, new = jax.grad(loss, has_aux=True)(params)
        after, states = {}, {}
        for part in params:
            updates, states[part] = tx[part].update(
                gradients[part], state[part], params[part]
            )
            after[part] = optax.apply_updates(params[part], updates)
        return {"params": after, **new}, states

    params = variables["params"]
    return step, (variables, {k: tx[k].init(params[k]) for k in params})


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
