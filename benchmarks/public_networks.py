# SPDX-License-Identifier: Apache-2.0
"""Traces and cuts public Flax networks that were written without jaxprune in mind.

    python benchmarks/public_networks.py --clones DIR --out docs/public_networks.md

DIR holds the repositories of `public_networks.toml` at the commits named there, each in
a folder `owner+name`. Each network is built as its repository defines it, gets random
variables, and runs in a process of its own; one that fails does not end the study.
Results are kept in `--results`, JSON lines: what stands there is not run again.
"""

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import public_page
from public_build import build, doubled, draw_inputs, fill, table

import jaxprune as jp
from jaxprune import trees

SMALL = 1e-4  # errors above are looked at in float64 too


# One network


def measure(entry: Mapping[str, Any], clones: Path) -> dict[str, Any]:
    """A row of the study; its `stage` says how far the network got."""
    row: dict[str, Any] = {"stage": "build"}
    try:
        apply, variables, inputs, more = build(entry, clones)
        if jax.config.jax_enable_x64:
            variables, inputs = doubled((variables, inputs))
        jp.trace(lambda v, x: v["w"] * x, {"w": np.ones(2)}, np.ones(2))  # imports
        start = time.process_time()
        jaxpr = jax.make_jaxpr(functools.partial(apply, **more))(variables, *inputs)
        row |= {"jaxpr_s": time.process_time() - start, "stage": "trace"}
        row["primitives"] = sorted(primitives(jaxpr))
        graph, row["trace_s"] = _timed_trace(apply, variables, inputs, more)
        row |= {"groups": len(graph.groups), **channels(graph), "stage": "law"}
        loose = jp.trace(apply, variables, *inputs, exact=False, **more)
        row["prunable_loosely"] = channels(loose)["prunable"]
        values = fill(variables, entry.get("unit", False), entry.get("spread", 1.0))
        row |= law(apply, graph, values, inputs, more)
        row["stage"] = "done"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        if row["stage"] != "build" or "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
    return row


def primitives(program: Any) -> set[str]:
    """Names of the primitives of a jaxpr and of those that it calls."""
    found = set()
    for eqn in getattr(program, "jaxpr", program).eqns:
        found.add(eqn.primitive.name)
        for value in eqn.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                    found |= primitives(one)
    return found


def _timed_trace(
    apply: Any, variables: Any, inputs: Any, more: Any
) -> tuple[Any, float]:
    """The graph, and the seconds of `trace` beyond those of `make_jaxpr`."""

    def again(*args: Any) -> Any:
        return apply(*args, **more)

    start = time.process_time()
    graph = jp.trace(apply, variables, *inputs, **more)
    middle = time.process_time()
    jax.make_jaxpr(again)(variables, *inputs)
    end = time.process_time()
    return graph, max(0.0, 2 * middle - start - end)


def channels(graph: Any) -> dict[str, Any]:
    """Output channels of convolution kernels, the prunable ones, the others' causes."""
    kernels = {
        leaf.path: (len(leaf.shape) - 1, leaf.shape[-1])
        for leaf in graph.leaves
        if len(leaf.shape) >= 4 and leaf.path[-1] in ("kernel", "weight", "w")
    }
    prunable = sum(
        slot.indices.size
        for group in graph.groups.values()
        for slot in group.slots
        if kernels.get(slot.path, (None, 0))[0] == slot.axis
    )
    causes: collections.Counter[str] = collections.Counter()
    for f in graph.frozen:
        if kernels.get(f.path, (None, 0))[0] == f.axis:
            causes[str(f.cause)] += f.count
    total = sum(count for _, count in kernels.values())
    if rest := total - prunable - causes.total():
        causes["a single channel"] += rest
    return {"convolution": total, "prunable": prunable, "causes": dict(causes)}


def law(apply: Any, graph: Any, variables: Any, inputs: Any, more: Any) -> Any:
    """|slim - masked| against how far the masked output moves with the input."""
    if not graph.groups:
        return {"law_error": None}
    rng = np.random.default_rng(0)
    keep = {n: rng.random(g.size) < 0.5 for n, g in graph.groups.items()}
    for kept in keep.values():
        kept[0] |= not kept.any()
    masked = trees.mask(graph, keep, variables)
    small = trees.shrink(graph, keep, variables)
    slimmed = jp.slim(apply, graph, keep)
    one, two = draw_inputs(inputs, 1), draw_inputs(inputs, 2)
    dense = jax.jit(functools.partial(apply, **more))
    want, other = dense(masked, *one), dense(masked, *two)
    got = jax.jit(functools.partial(slimmed, **more))(small, *one)
    error, moved, size = 0.0, 0.0, 0.0
    for a, b, c in zip(*map(jax.tree.leaves, (want, other, got)), strict=True):
        if not jnp.issubdtype(jnp.result_type(a), jnp.inexact) or not np.size(a):
            continue
        a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
        if not np.isfinite([a, b]).all():
            raise FloatingPointError("the masked network's output is not finite")
        move, scale = np.abs(a - b).max(), np.abs(a).max()
        if not np.isfinite(c).all():
            raise FloatingPointError("the cut network's output is not finite")
        error = max(error, float(np.abs(a - c).max() / (move or scale or 1.0)))
        moved, size = max(moved, float(move)), max(size, float(scale))
    flops = jp.cost(graph, keep).flops / max(1, jp.cost(graph).flops)
    return {"law_error": error, "moved": moved, "size": size, "flops": float(flops)}


# All of them


def run_all(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    file = arguments.results
    lines = file.read_text().splitlines() if file.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for title in table():
        done = rows.get(title, {}).get("stage") == "done"
        if arguments.only not in title or (done and not arguments.again):
            continue
        rows[title] = {"name": title, **run(title, arguments)}
        print(json.dumps(rows[title]), flush=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in rows.values()))
    return rows


def run(title: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The network's row; where the error is not small, that in float64 besides."""
    row = _in_process(title, arguments)
    if (row.get("law_error") or 0.0) > SMALL:
        double = _in_process(title, arguments, JAX_ENABLE_X64="1")
        row["double_error"] = double.get("law_error")
    return row


def _in_process(title: str, arguments: argparse.Namespace, **more: str) -> Any:
    command = [sys.executable, __file__, "--one", title]
    command += ["--clones", str(arguments.clones)]
    strict = "0" if table()[title]["old_nnx"] else "1"
    environment = {**os.environ, "FLAX_PYTREE_MODULE": strict, **more}
    limit = arguments.seconds
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"stage": "time", "error": f"more than {limit} s"}
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"stage": "crash", "error": f"exit {done.returncode}: {tail[:300]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clones", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, default="public_networks.jsonl")
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--seconds", type=int, default=300, help="limit of a network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        warnings.simplefilter("ignore")
        entry = table()[arguments.one]
        print(json.dumps(measure(entry, arguments.clones.resolve())))
        return
    rows = run_all(arguments)
    if arguments.out:
        arguments.out.write_text(public_page.page(rows, table()), encoding="utf-8")


if __name__ == "__main__":
    main()
