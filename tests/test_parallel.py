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
gates = jp.init_gates(graph)


def penalised(variables, images, **kw):
    return net.apply(jp.gate(graph, gates, variables), images, **kw)


found = {}
for name, apply, last in (
    ("plain", net.apply, []),
    ("proximal", net.apply, [jp.proximal(graph, 1e-3)]),
    ("gates", penalised, [jp.proximal(graph, 1e-3)]),
):
    tx = optax.chain(optax.adam(1e-3), *last)
    step = steps.make_step(apply, tx, target)
    state = jax.device_put(steps.init_state(variables, tx), steps.replicated(mesh))
    compiled = jax.jit(step).lower(state, batch, None, jax.random.key(0)).compile()
    text = compiled.as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found[name] = [
        len(re.findall(rf"= .*({kinds})(-start)?\\\\(", text)),
        len(re.findall(r"(infeed|outfeed|send|recv|host-compute)\\\\(", text)),
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
    collectives, transfers = eight["found"]["plain"]
    assert collectives > 0
    assert transfers == 0
    for name in ("proximal", "gates"):
        assert eight["found"][name][0] <= collectives
        assert eight["found"][name][1] == 0
    assert one["found"]["plain"][0] == 0
    assert eight["keep"] == one["keep"]
