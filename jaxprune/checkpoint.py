# SPDX-License-Identifier: Apache-2.0
"""Pruned networks on disk, self-describing; and the training states of `store`.

    FOLDER/  arrays/  jaxprune.json  graph.json  manifest.sha256.json

`arrays/` is Orbax's; the rest is JSON: no pickle, no code. The folder is sealed with
checksums and appears under its name only once it is complete.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from jaxprune import (
    folding,
    formats,
    integrity,
    keeps,
    leaves,
    matching,
    remote,
    storage,
    trees,
)
from jaxprune.base import (
    Apply,
    CheckpointError,
    Graph,
    GraphError,
    PyTree,
    check_function,
    key_path,
)
from jaxprune.chains import factorized, is_factorized, takes_factors
from jaxprune.graph_io import (
    graph_from_json,
    graph_to_json,
    keep_from_text,
    keep_to_text,
)
from jaxprune.pruned import Pruned
from jaxprune.slim import slim
from jaxprune.store import Store, open_store

__all__ = [
    "Pruned",
    "Store",
    "dense_network",
    "is_saved",
    "load",
    "open_store",
    "read_card",
    "save",
]

_CARD, _GRAPH = "jaxprune.json", "graph.json"
_PACKAGES = ("jaxprune", "jax", "flax", "optax", "orbax-checkpoint", "numpy")


def save(
    path: str | Path, pruned: Pruned, *, overwrite: bool = False, **more: Any
) -> None:
    """Write a pruned network into a folder that `load` opens by itself.

    more: whatever JSON can hold, kept in `info`; 'network' {'name', 'args'} of a
    shipped network, 'classes'. The folder appears once complete; with `overwrite` the
    one that is there stays until then. In a multi-host run every process calls it.

    path: a folder, or a URL that fsspec knows (s3://, gs://, ...; the extra `remote`).
    What lies at a URL is deleted before it is replaced, and is whole when its marker,
    `jaxprune.partial`, is gone; a save that was cut off can be repeated.

    Raises CheckpointError for what is no Pruned, for a folder that exists, with
    `overwrite` where others' files lie in it, and for what can't be kept; GraphError
    for variables or a keep that do not fit the graph.
    """
    if not isinstance(pruned, Pruned):
        raise CheckpointError(
            f"save takes a Pruned, not a {type(pruned).__name__}: of what was trained "
            "on, jaxprune.Pruned(apply, variables, graph, keep), with the cut's graph "
            "and keep; where nothing is cut, as behind factorize, of "
            "graph = jaxprune.trace(apply, variables, inputs) and graph.full()"
        )
    if remote.is_url(path):
        with remote.written(path, overwrite=overwrite) as folder:
            save(folder, pruned, **more)
        return
    folder = Path(os.path.abspath(path))
    _check_free(folder, overwrite)
    keep = keeps.check_keep(pruned.graph, pruned.keep, concrete=True)
    _check_variables(pruned.graph, keep, pruned.variables)
    records, arrays = leaves.describe(pruned.variables)
    card = {
        "versions": _versions(),
        "keep": keep_to_text(keep),
        "info": {**pruned.info, **more},
        "leaves": records,
    }
    texts = {_CARD: storage.to_json(card, "info"), _GRAPH: graph_to_json(pruned.graph)}
    storage.write(folder, arrays, texts)


def load(
    path: str | Path,
    apply: Apply | None = None,
    *,
    sharding: Any = None,
    like: PyTree | None = None,
) -> Pruned:
    """The network that `save` wrote, bit for bit, with no dense model at hand.

    path: a folder, or a URL that fsspec knows (the extra `remote`), of which a copy is
    made, verified and deleted.
    apply: the dense function that was pruned, for a network that is not shipped; of a
    factorised one, the function that `factorize` was given; of one with folded batch
    norms, the function from before.
    sharding: a Sharding of the arrays, or a Mesh over which they are replicated; the
    default device if None. Variables come back as nested dicts (an nnx state in the
    form of `nnx.to_pure_dict`), or in the containers of `like`, whose shapes do not
    matter.

    Raises CheckpointError that names the missing or damaged file, or what to pass.
    """
    with remote.local(path) as folder:
        card = _read_card(folder)
        if apply is not None:
            check_function(apply)
        else:
            apply = _dense(remote.name_of(path, folder), card.info)
        return _load(folder, card, apply, sharding, like)


def _load(
    folder: Path, card: Pruned, dense: Apply, sharding: Any, like: PyTree
) -> Pruned:
    records = storage.read_record(folder, _CARD, "info", verified=True)["leaves"]
    try:
        # Before anything is read: shapes are what its files say, and cost nothing.
        shapes = storage.shapes_as_saved(records, like)
        _check_variables(card.graph, card.keep, shapes)
    except (CheckpointError, GraphError) as error:
        raise CheckpointError(f"{folder / _CARD}: {error}") from error
    variables = storage.read_as_saved(folder, records, sharding, like)
    try:
        if is_factorized(card.graph) and not takes_factors(dense):
            dense = factorized(dense)
        small = slim(dense, card.graph, card.keep)
        if _is_folded(card.graph, variables):
            small = folding.folded(small, _whole(card.graph, card.keep))
    except GraphError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return card._replace(apply=small, variables=variables)


def read_card(path: str | Path) -> Pruned:
    """A saved network without its function and variables (None): graph, keep, info.

    Verifies the whole folder. Raises CheckpointError as `load` does.
    """
    with remote.local(path) as folder:
        return _read_card(folder)


def _read_card(folder: Path) -> Pruned:
    if (folder / "config.json").exists() and (folder / "final").is_dir():
        raise CheckpointError(f"{folder} is a work folder; load {folder / 'final'}")
    record = storage.read_record(folder, _CARD, "info")
    try:
        graph = graph_from_json(formats.read_text(folder / _GRAPH))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _GRAPH}: {error}") from error
    try:
        bits = keep_from_text(record.get("keep"))
        keep = keeps.check_keep(graph, bits, concrete=True)
    except GraphError as error:
        raise CheckpointError(f"{folder / _CARD}: {error}") from error
    return Pruned(None, None, graph, keep, record["info"])  # type: ignore[arg-type]


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `save` wrote, by its looks."""
    return (folder / _CARD).is_file()


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; choose another or pass overwrite=True")
    if folder.exists() and not is_saved(folder):
        raise CheckpointError(
            f"{folder} is no saved network, so it is not overwritten; choose another"
        )
    if folder.exists():
        integrity.check_own(folder)


def dense_network(path: str | Path, info: Mapping[str, Any]) -> Any:
    """The shipped module, at its dense widths, that a saved network was cut from.

    info: the saved network's. Raises CheckpointError for a network that is not shipped.
    """
    network = info.get("network")
    if not network:
        raise CheckpointError(
            f"{path} is of no network that jaxprune ships: load it in Python, with the "
            "dense function that was pruned, jaxprune.load(path, apply=model.apply)"
        )
    if (
        not isinstance(network, dict)
        or set(network) != {"name", "args"}
        or not isinstance(network["args"], dict)
    ):
        raise CheckpointError(f"{path}: network = {network} is not {{name, args}}")
    from jaxprune import models

    return models.build(network["name"], network["args"])


def _dense(where: str, info: Mapping[str, Any]) -> Apply:
    """The shipped network's function, which says whose fault it is if arrays differ.

    where: the folder or URL, as the user knows it.
    """
    dense = dense_network(where, info).apply

    @functools.wraps(dense)
    def apply(*args: Any, **kwargs: Any) -> Any:
        try:
            return dense(*args, **kwargs)
        except (ScopeParamNotFoundError, ScopeParamShapeError) as error:
            raise CheckpointError(
                f"{where}/{_CARD}: its network = {info['network']} is not the one "
                f"whose arrays it holds: {str(error).splitlines()[0]}"
            ) from error

    return apply


def _is_folded(graph: Graph, variables: PyTree) -> bool:
    flat = jax.tree_util.tree_flatten_with_path(variables)[0]
    return folding.is_folded(graph, [key_path(keys) for keys, _ in flat])


def _whole(graph: Graph, keep: Any, variables: PyTree = None) -> PyTree:
    """What folded variables were like while they held their batch norms."""
    cuts = zip(graph.leaves, matching.kept_indices(graph, keep), strict=True)
    shapes = [matching.cut_shape(leaf, kept) for leaf, kept in cuts]
    return folding.unfolded(graph, shapes, variables)


def _check_variables(graph: Graph, keep: Any, variables: PyTree) -> None:
    # Growing them back is what fails, by the leaf's name, where they do not fit.
    if _is_folded(graph, variables):
        variables = _whole(graph, keep, variables)
    jax.eval_shape(lambda tree: trees.expand(graph, keep, tree), variables)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
