# SPDX-License-Identifier: Apache-2.0
"""`export`: a pruned network as one StableHLO program, weights and all.

    FOLDER/  model.stablehlo  export.json  manifest.sha256.json

`model.stablehlo` runs with JAX alone: `jax.export.deserialize(bytes).call(images)`. JAX
promises to read it for six months; `jaxprune.save` is the archive.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxprune import integrity
from jaxprune.base import CheckpointError, ConfigError, GraphError
from jaxprune.folding import fold_batch_norm
from jaxprune.int8 import quantize_weights
from jaxprune.pruned import Pruned
from jaxprune.trace import struct

_PROGRAM, _CARD = "model.stablehlo", "export.json"


def export(
    pruned: Pruned,
    path: str | os.PathLike,
    *inputs: Any,
    shapes: Sequence[str | None] = (),
    constraints: Sequence[str] = (),
    platforms: Sequence[str] | None = None,
    fold: bool = False,
    weights: Literal["float", "int8"] = "float",
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Write `pruned.apply(pruned.variables, *inputs, **kwargs)` as a program.

    inputs: arrays or jax.ShapeDtypeStruct, whose shapes the program takes. shapes: for
    each input in turn, None or a shape with symbols, 'b, 360, 480, 3' for any batch,
    'b, 32*h, 32*w, 3' for any size in multiples of 32. platforms: 'cpu', 'cuda',
    'tpu' ..., of which one program may serve several; the present one by default. fold:
    batch norms inside the kernels before them (`fold_batch_norm`). weights: 'int8', a
    quarter of the bytes, a scale for each channel (`quantize_weights`). constraints: of
    the symbols, 'h >= 2'. Returns the folder's path.

    Raises CheckpointError for a path that is taken, or without the package flatbuffers;
    ConfigError for other weights;
    GraphError for shapes that do not fit the inputs, or that the network cannot take.
    """
    folder = Path(os.path.abspath(path))
    if folder.exists() and not (overwrite and (folder / _PROGRAM).is_file()):
        hint = (
            "pass overwrite=True" if (folder / _PROGRAM).is_file() else "name another"
        )
        raise CheckpointError(f"{folder} exists; {hint}")
    if importlib.util.find_spec("flatbuffers") is None:
        raise CheckpointError(
            "jax.export needs the package flatbuffers: pip install 'jaxprune[export]'"
        )
    if weights not in ("float", "int8"):
        raise ConfigError(f"export(weights={weights!r}): 'float' or 'int8'")
    structs = [struct(x) for x in inputs]
    if fold:
        thin = fold_batch_norm(pruned.apply, pruned.variables, *structs, **kwargs)
        pruned = pruned._replace(apply=thin.apply, variables=thin.variables)
    if weights == "int8":
        small = quantize_weights(pruned.apply, pruned.variables, *structs, **kwargs)
        pruned = pruned._replace(apply=small.apply, variables=small.variables)
    try:
        specs = _symbolic(structs, shapes, constraints)
        run = jax.jit(lambda *images: pruned.apply(pruned.variables, *images, **kwargs))
        program = jax.export.export(run, platforms=platforms)(*specs)
        content = program.serialize()
    except (ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphError(
            f"export with shapes {list(shapes) or [s.shape for s in structs]}: "
            f"{lines[0]}"
        ) from error
    card = {
        "inputs": [f"{s.dtype}[{', '.join(map(str, s.shape))}]" for s in specs],
        "outputs": [str(a) for a in program.out_avals],
        "platforms": list(program.platforms),
        "weights": weights,
        "weight_bytes": sum(x.nbytes for x in jax.tree.leaves(pruned.variables)),
        "jax": jax.__version__,
        "info": dict(pruned.info),
    }
    partial = integrity.begin(folder)
    (partial / _PROGRAM).write_bytes(content)
    (partial / _CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
    integrity.commit(partial, folder)
    return folder


def load_export(path: str | os.PathLike) -> Callable[..., Any]:
    """The program that `export` wrote, as a function of the inputs, jitted by JAX.

    Raises CheckpointError that names the missing or damaged file; the function raises
    GraphError for inputs of other shapes or dtypes than the program takes.
    """
    folder = integrity.resolve(Path(os.path.abspath(path)))
    integrity.verify(folder)
    file = folder / _PROGRAM
    try:
        program = jax.export.deserialize(bytearray(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    takes = ", ".join(str(aval) for aval in program.in_avals)

    def run(*inputs: Any) -> Any:
        try:
            return program.call(*inputs)
        except (ValueError, TypeError) as error:
            seen = ", ".join(str(jax.typeof(jax.numpy.asarray(x))) for x in inputs)
            raise GraphError(f"{file} takes {takes}, and was given {seen}") from error

    return run


def _symbolic(
    structs: Sequence[Any], shapes: Sequence[str | None], constraints: Sequence[str]
) -> list[Any]:
    if len(shapes) > len(structs):
        raise ValueError(f"{len(shapes)} shapes for {len(structs)} inputs")
    scope = jax.export.SymbolicScope(constraints)
    given = [*shapes, *(None for _ in structs)]
    return [
        jax.ShapeDtypeStruct(
            jax.export.symbolic_shape(text, scope=scope, like=s.shape), s.dtype
        )
        if text
        else s
        for text, s in zip(given, structs, strict=False)
    ]
