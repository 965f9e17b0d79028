# SPDX-License-Identifier: Apache-2.0
"""`export`: a pruned network as one StableHLO program, weights and all.

    FOLDER/  model.stablehlo  export.json  manifest.sha256.json

`export.json`, version 1: {version, jaxprune, jax, inputs, outputs, platforms, weights
('float' or 'int8'), weight_bytes, info}; version 0 named neither itself nor the
jaxprune that wrote it.

`model.stablehlo` runs with JAX alone: `jax.export.deserialize(bytes).call(images)`. JAX
promises to read it for six months; `jaxprune.save` is the archive.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.errors import InconclusiveDimensionOperation

from jaxprune import disk, formats, integrity, remote, storage
from jaxprune.base import CheckpointError, ConfigError, GraphError, key_path
from jaxprune.folding import fold_batch_norm, is_folded
from jaxprune.int8 import quantize_weights
from jaxprune.pruned import Pruned, check_room, image_size
from jaxprune.trace import struct
from jaxprune.trees import nbytes

VERSION = 1
_PROGRAM, _CARD = "model.stablehlo", "export.json"
_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# What XLA calls to run Python of the process that exported it.
_CALLBACK = re.compile(rb"python_\w*callback")


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
) -> Path | str:
    """Write `pruned.apply(pruned.variables, *inputs, **kwargs)` as a program.

    path: a folder, or a URL, as of `save`.
    inputs: arrays or jax.ShapeDtypeStruct, whose shapes the program takes. shapes: for
    each input in turn, None or a shape with symbols, 'b, 360, 480, 3' for any batch,
    'b, 32*h, 32*w, 3' for any size in multiples of 32. platforms: 'cpu', 'cuda',
    'rocm', 'tpu', of which one program may serve several; the present one by default.
    fold: batch norms inside the kernels before them (`fold_batch_norm`). weights:
    'int8', a quarter of the bytes, a scale for each channel (`quantize_weights`).
    constraints: of the symbols, 'h >= 2'. Returns the folder's path, or the URL.

    Raises CheckpointError for a path that is taken, with `overwrite` where others'
    files lie in it, without the package flatbuffers, and for `info` that JSON can't
    hold; ConfigError for other weights or platforms, and where `fold` finds nothing to
    fold; GraphError for shapes that do not fit the inputs, or that the network cannot
    take; DiskError where the disk is full or read-only.
    """
    _check(platforms, weights, shapes=shapes, constraints=constraints)
    if remote.is_url(path):
        with remote.written(path, overwrite=overwrite) as place:
            export(
                pruned,
                place,
                *inputs,
                shapes=shapes,
                constraints=constraints,
                platforms=platforms,
                fold=fold,
                weights=weights,
                **kwargs,
            )
        return str(path)
    folder = Path(os.path.abspath(path))
    if folder.exists() and not (overwrite and (folder / _PROGRAM).is_file()):
        taken = (folder / _PROGRAM).is_file()
        hint = "pass overwrite=True (--overwrite)" if taken else "name another"
        raise CheckpointError(f"{folder} exists; {hint}")
    if folder.exists():
        integrity.check_own(folder)
    if importlib.util.find_spec("flatbuffers") is None:
        raise CheckpointError(
            "jax.export needs the package flatbuffers: pip install 'jaxprune[export]'"
        )
    structs = [struct(x) for x in inputs]
    if fold:
        pruned = with_norms_folded(pruned, *structs, **kwargs)
    if weights == "int8":
        small = quantize_weights(pruned.apply, pruned.variables, *structs, **kwargs)
        pruned = pruned._replace(apply=small.apply, variables=small.variables)
    try:
        specs = _symbolic(structs, shapes, constraints)
        run = jax.jit(lambda *images: pruned.apply(pruned.variables, *images, **kwargs))
        program = jax.export.export(run, platforms=platforms)(*specs)
        content = program.serialize()
    except (ValueError, TypeError, InconclusiveDimensionOperation) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise GraphError(
            f"export with shapes {list(shapes) or [s.shape for s in structs]}: "
            f"{lines[0]}"
        ) from error
    card = {
        "version": VERSION,
        "jaxprune": formats.writer_here(),
        "inputs": _described(specs),
        "outputs": [str(a) for a in program.out_avals],
        "platforms": list(program.platforms),
        "weights": weights,
        "weight_bytes": nbytes(pruned.variables),
        "jax": jax.__version__,
        "info": dict(pruned.info),
    }
    text = storage.to_json(card, "info")
    with disk.writing(folder), integrity.whole(folder) as partial:
        (partial / _PROGRAM).write_bytes(content)
        (partial / _CARD).write_text(text, encoding="utf-8")
    return folder


def images_of(
    pruned: Pruned, name: str, *, size: tuple[int, int] | None = None, batch: int = 1
) -> jax.ShapeDtypeStruct:
    """float32 [B, H, W, 3], the input of a network that is called `name`.

    size: the training size by default. Raises ConfigError where there is none, and for
    images that memory does not hold.
    """
    size = size or image_size(pruned.info, name)
    check_room(size, batch)
    return jax.ShapeDtypeStruct((batch, *size, 3), jax.numpy.float32)


def with_norms_folded(pruned: Pruned, *inputs: Any, **kwargs: Any) -> Pruned:
    """The network by `fold_batch_norm`; itself, where that was done before.

    Raises ConfigError where nothing is folded: who asks for it would have a slower
    network than they think. What has no batch norms looks like what is called in
    training mode, so it is refused, too.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(pruned.variables)
    if is_folded(pruned.graph, [key_path(keys) for keys, _ in flat]):
        return pruned
    thin = fold_batch_norm(pruned.apply, pruned.variables, *inputs, **kwargs)
    for path, cause in thin.left.items() if not thin.merged else ():
        raise ConfigError(
            f"fold=True folds nothing: {path} is left ({cause}); export without it"
        )
    if not thin.merged:
        raise ConfigError(
            "fold=True folds nothing: there is no batch norm by running statistics. "
            "One that takes the statistics of its batch is none: pass train=False, or "
            "call nnx's eval(). Where the network has none at all, export without fold"
        )
    return pruned._replace(apply=thin.apply, variables=thin.variables)


def load_export(path: str | os.PathLike) -> Callable[..., Any]:
    """The program that `export` wrote, as a function of the inputs, jitted by JAX.

    path: a folder, or a URL that fsspec knows (the extra `remote`). The
    program may compute, and nothing else. Raises CheckpointError that names the missing
    or damaged file, or a program that calls back into Python; the function raises
    GraphError, with JAX's reason, for inputs of other shapes or dtypes than the program
    takes, and on a platform that it was not exported for.
    """
    with remote.local(path) as folder:
        return _load(folder, remote.name_of(path, folder))


def _load(folder: Path, where: str) -> Callable[..., Any]:
    integrity.verify(folder)
    for name in (_CARD, _PROGRAM):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; this is no export")
    inputs = _read_card(folder / _CARD)
    file = folder / _PROGRAM
    try:
        content = file.read_bytes()
        if _CALLBACK.search(content):
            raise CheckpointError(f"{file}: it calls Python, which is not run")
        program = jax.export.deserialize(bytearray(content))
        found = _described(program.in_avals)
    except CheckpointError:
        raise
    except Exception as error:  # flatbuffers raises whatever its offsets lead to
        raise CheckpointError(f"{file}: no program: {error!r:.200}") from error
    if found != inputs:
        raise CheckpointError(f"{file} takes {found}, {_CARD} says {inputs}")
    takes = ", ".join(found)

    def run(*inputs: Any) -> Any:
        try:
            return program.call(*inputs)
        except (ValueError, TypeError) as error:
            seen = ", ".join(_described([struct(x) for x in inputs]))
            reason = str(error).strip().partition("\n")[0]
            raise GraphError(
                f"{where}/{_PROGRAM} takes {takes}, and was given {seen}: {reason}"
            ) from error

    return run


def _check(platforms: Any, weights: Any, **texts: Any) -> None:
    """Raise ConfigError for arguments that JAX would take for others, or not name."""
    if weights not in ("float", "int8"):
        raise ConfigError(f"export(weights={weights!r}): 'float' or 'int8'")
    for name, given in texts.items():
        if isinstance(given, str):
            raise ConfigError(f"export({name}={given!r}): write a list, [{given!r}]")
    known = platforms is None or (
        isinstance(platforms, list | tuple)
        and platforms
        and all(name in _PLATFORMS for name in platforms)
    )
    if not known:
        raise ConfigError(
            f"export(platforms={platforms!r}): write a list of some of "
            f"{', '.join(_PLATFORMS)}, such as ['cpu', 'cuda']"
        )


def _read_card(file: Path) -> list[str]:
    """The inputs that a card names."""
    card = integrity.read_json(file)
    if not isinstance(card, dict):
        raise CheckpointError(f"{file}: no JSON object")
    version, writer = card.get("version", 0), card.get("jaxprune")
    read = formats.reader(_READERS, version, str(file), CheckpointError, writer)
    return read(file, card)


def _read_1(file: Path, card: dict[str, Any]) -> list[str]:
    inputs = card.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(x, str) for x in inputs):
        raise CheckpointError(f"{file}: inputs is no list of shapes")
    return inputs


_READERS = {0: _read_1, 1: _read_1}


def _described(structs: Sequence[Any]) -> list[str]:
    return [f"{s.dtype}[{', '.join(map(str, s.shape))}]" for s in structs]


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
