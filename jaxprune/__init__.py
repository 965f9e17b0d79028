# SPDX-License-Identifier: Apache-2.0
"""jaxprune: structural pruning of JAX networks, as a program transformation."""

from jaxprune.base import Graph
from jaxprune.cost import cost
from jaxprune.slim import slim, verify
from jaxprune.trace import trace
from jaxprune.trees import compose, expand, mask, shrink, shrink_graph
