# SPDX-License-Identifier: Apache-2.0
"""A training of seconds, cut in the middle, on whatever devices there are.

Run as a program it prints what `found` returns, and with more than one device what
becomes of arrays in shares, as JSON: `python tests/scalerun.py FOLDER SHARD [PORT I
COUNT]`, with a port and a number as one of COUNT processes.
"""

import collections
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tinyrun
from jax.sharding import NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune import checkpoint, data, sharded
from jaxprune.slim import slim
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps
from jaxprune.train.config import Scale

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
TARGET = steps.Target(tinyrun.CLASSES.ignore, np.array([1.0, 2.0, 0.5, 1.0]))
WIDTHS = (3, 64, 48, 3)


def apply(variables: Any, images: Any, train: bool = False, **kwargs: Any) -> Any:
    """Three 1x1 convolutions, ReLU between them; called as a linen network is."""
    x, params = images, variables["params"]
    for name in sorted(params):
        x = jax.nn.relu(x) @ params[name]["kernel"] + params[name]["bias"]
    return (x, {}) if "mutable" in kwargs else x


def variables(dtype: Any = np.float64) -> dict:
    """Always the same ones."""
    rng = np.random.default_rng(0)

    def layer(before: int, after: int) -> dict:
        kernel = rng.standard_normal((before, after)) / np.sqrt(before)
        return {"kernel": kernel.astype(dtype), "bias": np.zeros(after, dtype)}

    pairs = itertools.pairwise(WIDTHS)
    return {"params": {f"layer{i}": layer(*pair) for i, pair in enumerate(pairs)}}


def collectives(jitted: Any, *args: Any) -> dict[str, int]:
    """How many of each kind the compiled program holds."""
    text = jitted.lower(*args).compile().as_text()
    return collections.Counter(re.findall(rf"= .*?({KINDS})(?:-start)?\(", text))


def found(folder: Path, shard: str) -> dict:
    """Losses of 3 steps, a cut, and 2 steps more; the keep; the cut; what is where."""
    layout = steps.layout_of(Scale(shard))
    tx = optax.adam(1e-3)
    graph = jp.trace(apply, variables(), np.zeros((1, *tinyrun.SIZE, 3)))
    process = jax.process_index(), jax.process_count()
    split = tinyrun.split("train", 32)
    batches = data.batches(split, batch=16, seed=0, process=process, threads=0)
    key, losses, kinds = jax.random.key(0), [], []

    def trained(run: Any, state: Any, count: int) -> Any:
        step = steps.make_step(run, tx, TARGET, average=0.9, layout=layout)
        places = layouts.shardings(layout, state), steps.replicated(layout.mesh)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=places)
        for _ in range(count):
            batch = steps.put_batch(layout.mesh, next(batches))
            if not kinds:
                kinds.append(collectives(jitted, state, batch, None, key))
            state, loss = jitted(state, batch, None, key)
            losses.append(float(loss))
        return state

    state = trained(apply, steps.begin(layout, variables(), tx), 3)
    scores = jp.score(jp.magnitude(), graph, state.variables)
    keep = jp.select(graph, scores, jp.params(0.5))
    # Of weights that are the same on all devices, so that bits can be compared.
    cut = jp.shrink(graph, keep, layouts.put(layout, variables()))
    small = state._replace(
        **{f: jp.shrink(graph, keep, getattr(state, f)) for f in state._fields[1:]}
    )
    store = checkpoint.open_store(folder / "states")
    store.save(3, small)
    places = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small
    )
    restored, _ = store.restore(3, places)
    same = [
        bool(jnp.array_equal(a, b)) and a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(small), strict=True)
    ]
    trained(slim(apply, graph, keep), layouts.owned(layout, small), 2)
    return {
        "losses": losses,
        "keep": {n: "".join("01"[int(c)] for c in k) for n, k in keep.items()},
        "cut": digest(cut),
        "kinds": kinds[0],
        "restored": all(same),
        "share": share(state),
        "small": share(small),
    }


def digest(tree: Any) -> str:
    """A SHA-256 of the bytes of all arrays."""
    arrays = [sharded.fetched(x) for x in jax.tree.leaves(tree)]
    whole = b"".join(str(x.shape).encode() + x.tobytes() for x in arrays)
    return hashlib.sha256(whole).hexdigest()


def share(tree: Any) -> float:
    """The fraction of a tree's bytes that each device holds."""
    held = jax.tree.leaves(tree)
    return sum(x.addressable_data(0).nbytes for x in held) / sum(x.nbytes for x in held)


def places() -> list[dict]:
    """Arrays in shares, cut and grown again: where they lie, what a device holds."""
    mesh = steps.make_mesh()
    rng = np.random.default_rng(0)
    rows = []
    for shape, axis, counts in (
        ((256, 128), 0, (64, 64)),  # still divides
        ((256, 128), 0, (100, 64)),  # another axis does
        ((256, 128), 0, (101, 63)),  # none does
        ((256, 128), 1, (None, 64)),  # the cut axis is the one in shares
        ((3, 3, 64, 32), 2, (None, None, 16, 7)),
        ((64,), 0, (24,)),
    ):
        whole = rng.standard_normal(shape).astype(np.float32)
        spec = PartitionSpec(*[None] * axis, "data")
        x = jax.device_put(whole, NamedSharding(mesh, spec))
        kept = [
            None if n is None else np.sort(rng.permutation(size)[:n])
            for size, n in zip(shape, counts)
        ]
        y = sharded.taken(x, kept)
        index = np.ix_(*(np.arange(s) if k is None else k for s, k in zip(shape, kept)))
        back = np.zeros(shape, np.float32)
        back[index] = whole[index]
        again = sharded.taken(y, sharded.grown(kept, shape))
        axes = {a: k.astype(np.int32) for a, k in enumerate(kept) if k is not None}
        taker = sharded._taker(x.sharding, y.sharding, x.ndim, tuple(axes))
        memory = taker.lower(x, axes).compile().memory_analysis()
        rows.append(
            {
                "right": bool((np.asarray(y) == whole[index]).all()),
                "back": bool((np.asarray(again) == back).all()),
                "axis": [a for a, n in enumerate(y.sharding.spec) if n],
                "held": max(s.data.nbytes for s in y.addressable_shards) / y.nbytes,
                "temporary": memory.temp_size_in_bytes / x.nbytes,
            }
        )
    return rows


def main() -> None:
    """Print what was found on the last line."""
    jax.config.update("jax_enable_x64", True)  # sums in another order agree to 1e-6
    folder, shard = Path(sys.argv[1]), sys.argv[2]
    if len(sys.argv) > 3:
        port, number, count = map(int, sys.argv[3:])
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    result = {"devices": jax.device_count(), **found(folder, shard)}
    if jax.device_count() > 4:
        result["places"] = places()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
