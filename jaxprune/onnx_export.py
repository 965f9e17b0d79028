# SPDX-License-Identifier: Apache-2.0
"""`export_onnx`: a pruned network as one ONNX file, checked in onnxruntime.

The conversion is jax2onnx's. It is given the network's program, equation by equation,
because it replaces Flax's layers by its own while it looks at a function.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune import disk, remote
from jaxprune import jaxpr as jx
from jaxprune.base import CheckpointError, GraphError
from jaxprune.export import with_norms_folded
from jaxprune.pruned import Pruned
from jaxprune.slim import relative_error
from jaxprune.trace import struct


def export_onnx(
    pruned: Pruned,
    path: str | os.PathLike,
    *inputs: Any,
    tolerance: float = 1e-4,
    fold: bool = False,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Write `pruned.apply(pruned.variables, *inputs, **kwargs)` as an ONNX file.

    inputs: arrays or jax.ShapeDtypeStruct; the file takes these shapes and no others.
    It is run once in onnxruntime on random numbers, and is written only if every output
    is JAX's within `tolerance` of its largest number. fold: as of `export`. Returns the
    path.

    Raises CheckpointError for a path that is taken or a URL, and without the packages,
    telling how to install them; ConfigError where `fold` finds nothing to fold;
    GraphError for a program that jax2onnx cannot convert, and for answers that differ;
    DiskError where the disk is full or read-only.
    """
    if remote.is_url(path):
        raise CheckpointError(f"{path}: write the file here, and copy it there")
    file = Path(os.path.abspath(path))
    if file.exists() and not overwrite:
        raise CheckpointError(
            f"{file} exists; name another or pass overwrite=True (--overwrite)"
        )
    jax2onnx, runtime = _package("jax2onnx"), _package("onnxruntime")
    structs = [struct(x) for x in inputs]
    if fold:
        pruned = with_norms_folded(pruned, *structs, **kwargs)
    program, _ = jx.trace(
        lambda *images: pruned.apply(pruned.variables, *images, **kwargs), *structs
    )

    def plain(*images: Any) -> Any:
        return tuple(_run(program, images))

    rng = np.random.default_rng(0)
    given = [_drawn(rng, s) for s in structs]
    try:
        model = jax2onnx.to_onnx(plain, structs).SerializeToString()
        session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        got = session.run(None, dict(zip(names, given, strict=True)))
    except Exception as error:  # whatever the libraries say, of whatever class
        lines = str(error).strip().splitlines() or [""]
        raise GraphError(
            f"this network does not go through jax2onnx and onnxruntime: "
            f"{type(error).__name__}: {lines[0]}"
        ) from error
    want = jax.jit(plain)(*given)
    worst = max(
        relative_error(np.asarray(a), b) for a, b in zip(want, got, strict=True)
    )
    if not worst <= tolerance:
        raise GraphError(
            f"in onnxruntime the network answers otherwise than in JAX: {worst:.2g} of "
            f"the largest number, where {tolerance:.2g} is allowed; no file is written"
        )
    with disk.writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    disk.write(file, model)
    return file


def _drawn(rng: np.random.Generator, struct: jax.ShapeDtypeStruct) -> np.ndarray:
    """Numbers below 1; whole ones are small, as they may count the rows of a table."""
    if jax.numpy.issubdtype(struct.dtype, jax.numpy.inexact):
        return np.asarray(rng.random(struct.shape), struct.dtype)
    below = 2 if struct.dtype == bool else 8
    return np.asarray(rng.integers(0, below, struct.shape), struct.dtype)


def _run(program: jx.Program, args: Any) -> list[Any]:
    env, read = program.begun(args)
    for eqn in program.eqns:
        outs = jx.bind(eqn, *map(read, eqn.invars))
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in program.outvars]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CheckpointError(
            f"export_onnx needs {name}: pip install 'jaxprune[onnx]', then, because it "
            "asks for an older Orbax than it needs, pip install --no-deps jax2onnx"
        ) from error
