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
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import subprocess
import sys
import time
import tomllib
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import public_page
from flax import linen, nnx

import jaxprune as jp
from jaxprune import trees

SMALL = 1e-4  # errors above are looked at in float64 too
TABLE = Path(__file__).with_suffix(".toml")
# Packages that the networks' files import, but the networks do not need.
STAND_INS = """
    bm3d clu cv2 datasets grain imageio matplotlib ott pandas penzai tensorboard
    tensorflow tensorflow_addons tensorflow_datasets tensorflow_hub
    tensorflow_probability tensorflow_text torch torchvision wandb
""".split()


def table() -> dict[str, dict[str, Any]]:
    """{repository and name: entry} of the table, each with its repository's fields."""
    entries = {}
    for repository, fields in tomllib.loads(TABLE.read_text()).items():
        shared = dict(
            repository=repository,
            commit=fields["commit"],
            folders=fields.get("folders", [""]),
            old_nnx=fields.get("old_nnx", False),
        )
        for entry in fields["networks"]:
            entries[f"{repository} {entry['name']}"] = shared | entry
    return entries


# Old code on new libraries


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of those names, whatever is asked of them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _stand_in  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return mock.MagicMock(name=name, unsafe=True)


def _old_names() -> None:
    """Names that JAX and Flax had when some of the networks were written."""
    jax.tree_map = jax.tree.map
    jax.random.KeyArray = jnp.DeviceArray = jax.Array
    reshape = jnp.reshape
    jnp.reshape = lambda x, *s, **k: reshape(x, *s, **_renamed(k, newshape="shape"))
    pad = jnp.pad
    jnp.pad = lambda x, *s, **k: pad(x, *s[:2], **k)
    jnp.linspace = functools.partial(_linspace, jnp.linspace)
    for name in ("nn", "optim"):
        module = types.ModuleType(f"flax.{name}")
        module.__getattr__ = _stand_in  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
        setattr(flax, name, module)


def _renamed(arguments: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in arguments.items()}


def _linspace(traced: Any, *args: Any, **kwargs: Any) -> Any:
    """Depths' drop rates are read as numbers, which a traced array does not allow."""
    try:
        return np.linspace(*args, **kwargs)
    except jax.errors.TracerArrayConversionError:
        return traced(*args, **kwargs)


# One network


def build(entry: Mapping[str, Any], clones: Path) -> tuple[Any, Any, Any, Any]:
    """(apply, variables as shapes, inputs as shapes, static keyword arguments)."""
    root = clones / entry["repository"].replace("/", "+")
    for folder in entry["folders"]:
        sys.path.insert(0, str(root / folder))
    sys.meta_path.insert(0, _StandIns())
    _old_names()
    scope = dict(vars(importlib.import_module(entry["module"])))
    scope |= dict(jax=jax, jnp=jnp, np=np, nn=linen, nnx=nnx, partial=functools.partial)
    scope |= dict(array=_array, image=_image, key=jax.random.key(0))
    scope |= dict(abstractly=_abstractly)
    inputs = eval(f"[{entry.get('inputs', 'image(64)')}]", scope)
    static = eval(entry.get("call", "{}"), scope)

    def make() -> Any:
        return eval(entry["make"], scope | {"rngs": nnx.Rngs(0)})

    if "rngs=rngs" in entry["make"]:
        apply, variables = _nnx(make, entry.get("eager", False))
    else:
        net = make()
        names = ("params", "dropout", "sample", "noise", "stochastic_depth", "rng")
        keys = {name: jax.random.key(i) for i, name in enumerate(names)}
        init = functools.partial(net.init, keys, **static)
        apply, variables = net.apply, jax.eval_shape(init, *inputs)
    return apply, variables, inputs, static


def _abstractly(make: Callable[[], Any]) -> Any:
    """What make returns, without the arrays that it draws on the way."""
    made: list[Any] = []
    jax.eval_shape(lambda: made.append(make()))
    return made[0]


def _array(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _image(size: int, channels: int = 3) -> jax.ShapeDtypeStruct:
    return _array((1, size, size, channels))


def _nnx(make: Callable[[], Any], eager: bool) -> tuple[Any, Any]:
    net = make() if eager else nnx.eval_shape(make)
    net.eval()
    definition, keys, variables = nnx.split(net, nnx.RngState, ...)
    keys = jax.tree.map(_key_or_zero, keys)

    def apply(state: Any, *args: Any, **kwargs: Any) -> Any:
        return nnx.merge(definition, keys, state)(*args, **kwargs)

    return apply, variables


def _key_or_zero(x: Any) -> Any:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(x.shape, x.dtype)


def _double(x: Any) -> Any:
    single = x.dtype == jnp.float32
    return jax.ShapeDtypeStruct(x.shape, jnp.float64) if single else x


def fill(tree: Any, seed: int = 0) -> Any:
    """Random values of moderate size for shapes: half of them cut, signals still pass.

    Kernels are normal with variance 3 / fan-in, variances and scales lie around 1.
    """
    rng = np.random.default_rng(seed)

    def values(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path).lower()
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        draw = rng.standard_normal(x.shape).astype(np.float32)
        if "var" in name.replace("variables", ""):
            draw = rng.uniform(0.5, 1.5, x.shape)
        elif len(x.shape) >= 2:
            draw *= np.sqrt(3 / max(1, np.prod(x.shape[:-1])))
        elif any(word in name for word in ("scale", "gamma", "weight")):
            draw = 1 + 0.1 * draw
        else:
            draw *= 0.02
        return jnp.asarray(draw, x.dtype)

    return jax.tree_util.tree_map_with_path(values, tree)


def draw_inputs(inputs: Any, seed: int) -> Any:
    """Noise of a colour, so that pooled outputs move too; integers below 10."""
    rng = np.random.default_rng(seed)

    def values(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 10, x.shape), x.dtype)
        hue = rng.standard_normal(x.shape[-1:])
        return jnp.asarray(hue + rng.standard_normal(x.shape), x.dtype)

    return jax.tree.map(values, inputs)


def measure(entry: Mapping[str, Any], clones: Path) -> dict[str, Any]:
    """A row of the study; its `stage` says how far the network got."""
    row: dict[str, Any] = {"stage": "build"}
    try:
        apply, variables, inputs, more = build(entry, clones)
        if jax.config.jax_enable_x64:
            variables, inputs = jax.tree.map(_double, (variables, inputs))
        start = time.process_time()
        jax.make_jaxpr(functools.partial(apply, **more))(variables, *inputs)
        row |= {"jaxpr_s": time.process_time() - start, "stage": "trace"}
        graph, row["trace_s"] = _timed_trace(apply, variables, inputs, more)
        row |= {"groups": len(graph.groups), **channels(graph), "stage": "law"}
        row |= law(apply, graph, fill(variables), inputs, more)
        row["stage"] = "done"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        if row["stage"] != "build" or "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
    return row


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
        move, scale = np.abs(a - b).max(), np.abs(a).max()
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
