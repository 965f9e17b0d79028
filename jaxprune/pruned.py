# SPDX-License-Identifier: Apache-2.0
"""`Pruned`: a smaller network with all that is needed to run, cut, save or grow it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxprune.base import Apply, Graph, Keep, PyTree

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
