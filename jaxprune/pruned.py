# SPDX-License-Identifier: Apache-2.0
"""`Pruned`: a smaller network with all that is needed to run, cut, save or grow it.

And what its `info` says of images, which is read from files, and checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxprune import formats
from jaxprune.base import Apply, ConfigError, Graph, Keep, PyTree

NO_INFO: Mapping[str, Any] = MappingProxyType({})


class Pruned(NamedTuple):
    """What `prune` and `load` return, and `save` takes.

    `apply` runs on the shrunk `variables`; `graph` is the dense network's, and `keep`
    {group: bool[C]} says which of its channels stayed. `info` is what JSON can hold;
    its entry 'network' {'name', 'args'} lets `load` rebuild a shipped network.
    """

    apply: Apply
    variables: PyTree
    graph: Graph
    keep: Keep
    info: Mapping[str, Any] = NO_INFO


def image_size(
    info: Mapping[str, Any] | None, where: str, way: str = "--size HxW"
) -> tuple[int, int]:
    """(H, W) of the images that a network was trained on, as its `info` says.

    Raises ConfigError, with the name and the way out, where it says none or no size.
    """
    size = (info or {}).get("size")
    if size is None:
        raise ConfigError(f"{where} names no image size; give one: {way}")
    match size:
        case [height, width] if all(type(n) is int and n > 0 for n in size):
            return height, width
    raise ConfigError(f"{where}: size = {size!r:.80} is not [H, W]; give one: {way}")


def check_room(size: tuple[int, int], batch: int) -> None:
    """Raise ConfigError for float images that this machine's memory does not hold."""
    height, width = size
    needed, most = 4 * 3 * height * width * batch, formats.memory()
    if needed > most:
        raise ConfigError(
            f"{batch} image(s) of {height}x{width} are {needed:,} bytes, and there is "
            f"memory for {most:,}; give a smaller --size, or --batch"
        )
