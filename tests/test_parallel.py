# SPDX-License-Identifier: Apache-2.0
"""Law 8: on a mesh, pruning adds neither collectives nor host transfers to a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json
import re
from collections import Counter

import jax
import numpy as np
import optax

import jaxprune as jp
from jaxprune import models
from jaxprune.train import step as steps

net = models.build("segnet", {"num_classes": 3, "widths": [4, 4, 4, 4, 4]})
variables = models.init(net, jax.random.key(0), (16, 16))
images = jax.ShapeDtypeStruct((8, 16, 16, 3), np.float32)
graph = jp.trace(net.apply, variables, images, train=False)
mesh = steps.make_mesh()
rng = np.random.default_rng(0)
batch = steps.put_batch(
    mesh,
    {
        "image": rng.integers(0, 255, (8, 16, 16, 3), np.uint8),
        "label": rng.integers(0, 3, (8, 16, 16)),
    },
)
target = steps.Target(3, np.ones(4, np.float32))
folded = {"gates": jp.init_gates(graph), "network": variables["params"]}
half = {n: np.arange(g.size) % 2 == 0 for n, g in graph.groups.items()}


def masked(variables, images, **kw):
    return net.apply(jp.mask(graph, half, variables), images, **kw)


def gated(variables, images, **kw):
    params = variables["params"]
    own = {**variables, "params": params["network"]}
    return net.apply(jp.gate(graph, params["gates"], own), images, **kw)


def chained(*last):
    return optax.chain(optax.adam(1e-3), *last)


class Penalised:  # the step's loss is of logits: the penalty's gradient joins its own
    @staticmethod
    def init(params):
        return optax.EmptyState()

    @staticmethod
    def update(updates, state, params):
        lasso = jax.grad(lambda p: jp.group_lasso(graph, p))(params)
        return jax.tree.map(lambda u, g: u + 1e-3 * g, updates, lasso), state


found = {}
for name, apply, tx in (
    ("plain", net.apply, chained()),
    ("lasso", net.apply, optax.chain(Penalised, optax.adam(1e-3))),
    ("proximal", net.apply, chained(jp.proximal(graph, 1e-3))),
    ("mask", masked, chained(jp.proximal(graph, 1e-3))),
    ("gates", gated, chained(jp.proximal_gates(1e-3, key="gates"))),
    (
        "steered",
        net.apply,
        jp.preconditioned(
            optax.adam(1e-3),
            graph,
            jp.steer(graph, 0.5, rate=1e-3),
            jp.repriced(graph),
            steps=jp.adam_steps(),
        ),
    ),
    (
        "steered gates",
        gated,
        jp.preconditioned_gates(
            optax.adam(1e-3),
            jp.steer(graph, 0.5, rate=1e-3),
            jp.repriced(graph, gates=True),
            steps=jp.adam_steps(),
            key="gates",
        ),
    ),
)[: None if jax.device_count() > 1 else 1]:
    step = steps.make_step(apply, tx, target)
    start = {**variables, "params": folded} if "gates" in name else variables
    state = jax.device_put(steps.init_state(start, tx), steps.replicated(mesh))
    jitted = jax.jit(step)
    text = jitted.lower(state, batch, None, jax.random.key(0)).compile().as_text()
    for _ in range(2):
        state, loss = jitted(state, batch, None, jax.random.key(0))
    assert np.isfinite(loss), name
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found[name] = [
        Counter(re.findall(rf"= .*?({kinds})(?:-start)?\\\\(", text)),
        len(re.findall(r"(infeed|outfeed|send|recv|host-compute)\\\\(", text)),
        jitted._cache_size(),
    ]
keep = jp.select(graph, jp.score(jp.magnitude(), graph, variables), jp.flops(0.5))
kept = {n: "".join("01"[int(c)] for c in k) for n, k in keep.items()}
print(json.dumps({"devices": jax.device_count(), "found": found, "keep": kept}))
"""


def run(devices: int) -> dict:
    flags = f"--xla_force_host_platform_device_count={devices}"
    quick = "--xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": f"{flags} {quick}", "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    text = PROGRAM.replace("\\\\(", "\\(")
    done = subprocess.run(
        [sys.executable, "-c", text], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_pruning_adds_no_collective_and_the_keep_is_the_same() -> None:
    eight, one = run(8), run(1)
    assert (eight["devices"], one["devices"]) == (8, 1)
    plain, _, _ = eight["found"]["plain"]
    assert set(plain) == {"all-reduce"}  # of gradients, batch statistics, the loss
    assert len(eight["found"]) == 7
    for kinds, *rest in eight["found"].values():
        # Masked channels may have reductions that XLA finds to be of zeros.
        assert set(kinds) == set(plain) and kinds["all-reduce"] <= plain["all-reduce"]
        assert rest == [0, 1]  # no host transfer, one trace
    assert one["found"]["plain"][0] == {}
    assert eight["keep"] == one["keep"]
