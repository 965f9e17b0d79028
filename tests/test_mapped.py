# SPDX-License-Identifier: Apache-2.0
"""shard_map: the law, its gradients and the costs, on four devices and two axes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxprune as jp

auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto)


def mapped(f, ins, outs, checked):
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=checked)


def network(mean, gather, total, places):
    def normed(v, x):
        y = jax.nn.relu(x @ v["a"])
        y = (y - mean(y)) * jax.lax.rsqrt(mean(y**2) + 1.0) * v["s"]
        y = jax.nn.relu(y @ v["b"])
        return y + places(), gather(y)

    def columns(v, y):
        return total(jax.nn.relu(y @ v["w1"]) @ v["w2"])

    return normed, columns


def sharded(checked):
    def mean(y):
        return jax.lax.pmean(y.mean(0), "data")

    def gather(y):
        return jax.lax.all_gather(y, "data", axis=1).sum((0, 1))[None]

    normed, columns = network(
        mean,
        gather,
        lambda y: jax.lax.psum(y, "model"),
        lambda: 0.0 * jax.lax.axis_index("data"),
    )

    def apply(v, x):
        first = {k: v[k] for k in ("a", "s", "b")}
        ins, outs = (P(), P("data")), (P("data"), P("data"))
        y, z = mapped(normed, ins, outs, checked)(first, x)
        ins = {"w1": P(None, "model"), "w2": P("model")}, P("data")
        last = {k: v[k] for k in ins[0]}
        y = mapped(columns, ins, P("data"), checked)(last, y)
        return y @ v["c"], z @ v["d"]

    return apply


def plain(v, x):
    def same(y):
        return y

    normed, columns = network(lambda y: y.mean(0), same, same, lambda: 0.0)
    y, z = normed(v, x)
    return columns(v, y) @ v["c"], z.sum(0)[None].repeat(2, 0) @ v["d"]


rng = np.random.default_rng(0)
shapes = {"a": (3, 8), "s": (8,), "b": (8, 6), "w1": (6, 4), "w2": (4, 5)}
shapes |= {"c": (5, 2), "d": (6, 2)}
variables = {k: rng.normal(size=s) for k, s in shapes.items()}
x = rng.normal(size=(4, 3))
found = []
for checked in (True, False):
    apply = sharded(checked)
    graph = jp.trace(apply, variables, x)
    sizes = {n: g.size for n, g in graph.groups.items()}
    keep = {n: np.arange(k) % 2 == 0 for n, k in sizes.items()}
    small = jp.shrink(graph, keep, variables)

    def loss(f):
        return jax.jit(jax.grad(lambda v: sum(jnp.sum(jnp.sin(y)) for y in f(v, x))))

    wanted = loss(apply)(jp.mask(graph, keep, variables))
    wanted = jp.shrink(graph, keep, wanted)
    given = loss(jp.slim(apply, graph, keep))(small)
    gradients = [float(np.abs(wanted[k] - given[k]).max()) for k in wanted]
    dense = jp.trace(plain, variables, x)
    row = {
        "sizes": sizes,
        "error": jp.verify(apply, graph, keep, variables, x),
        "gradients": max(gradients),
        "plain": float(np.abs(apply(variables, x)[0] - plain(variables, x)[0]).max()),
        "flops": [
            int(jp.cost(g, {**g.full(), **keep}).flops) for g in (graph, dense)
        ],
        "frozen": [[f.path[0], f.count, f.cause] for f in graph.frozen],
    }
    found.append(row)
print(json.dumps(found))
"""


def test_programs_that_every_device_runs_on_its_shard():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu"},
    )
    assert not done.returncode, done.stderr
    for row in json.loads(done.stdout.splitlines()[-1]):
        # The columns that lie over devices stay; all else can go.
        assert row["sizes"] == {"a": 8, "b": 6, "w2": 5}
        stuck = [f for f in row["frozen"] if "shard_map" in f[2]]
        assert [f[:2] for f in stuck] == [["w1", 4], ["w2", 4]]
        assert max(row["error"], row["gradients"], row["plain"]) < 1e-12
        assert row["flops"][0] == row["flops"][1]
