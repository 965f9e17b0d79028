# SPDX-License-Identifier: Apache-2.0
"""Things to save, and ways to harm what was saved, for the checkpoints' tests."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import toygraphs

import jaxprune as jp
from jaxprune import checkpoint
from jaxprune.pruned import Pruned

GRAPH = toygraphs.chain(4, 6)
KEEP = GRAPH.full() | {"l0": np.array([1, 0, 1, 1], bool)}


def small_network(**info) -> Pruned:
    variables = jp.shrink(GRAPH, KEEP, toygraphs.variables(GRAPH))
    apply = jp.slim(toygraphs.apply, GRAPH, KEEP)
    return Pruned(apply, variables, GRAPH, KEEP, info)


def assert_identical(a, b):
    """Same structure, types, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def state(seed=0):
    params = {
        "conv": {"kernel": jnp.arange(6.0).reshape(2, 3) + seed, "bias": jnp.ones(3)}
    }
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(1e-3), {"conv": {"kernel": True, "bias": False}}),
        optax.ema(0.9, accumulator_dtype=jnp.bfloat16),
    )
    return {
        "params": params,
        "opt": tx.init(params),
        "key": jax.random.key(seed),
        "rbg": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
        "host": [
            np.int64(2**40 + seed),
            np.arange(3.0),
            np.float64(1e-300),
            7,
            True,
            0.1,
        ],
        "nothing": (None, jnp.zeros((0, 4), jnp.int8)),
        "dtypes": {
            name: jnp.asarray([0, 1, 1], name)
            for name in ("bfloat16", "float16", "int8", "uint32", "bool", "complex64")
        }
        | {"int4": jnp.array([-8, 7], jnp.int4), "f8": jnp.ones(5, jnp.float8_e4m3fn)},
    }


def damages(folder):
    """Each file: bits flipped at four places; cut; emptied; grown; gone."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = file.read_bytes()
        changed = [data + b"\0", None]
        if data:
            changed += [data[: len(data) // 2], data[:-1], b""]
        for at in sorted({0, len(data) // 3, len(data) // 2, len(data) - 1} - {-1}):
            if data:
                flipped = bytes([data[at] ^ (1 << at % 7)])
                changed.append(data[:at] + flipped + data[at + 1 :])
        for new in changed:
            if new is None:
                file.unlink()
            else:
                file.write_bytes(new)
            yield file
            file.write_bytes(data)


def start(code, *args, **env):
    root = str(Path(checkpoint.__file__).parents[1])
    path = os.pathsep.join([root, str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | env,
        stdout=subprocess.PIPE,
        text=True,
    )
