# SPDX-License-Identifier: Apache-2.0
"""The names that `import jaxprune` offers, gathered; see `jaxprune/__init__.py`."""

from typing import TYPE_CHECKING

from jaxprune import base, data
from jaxprune.base import Cost, Frozen, Graph, Group, Leaf, Slot
from jaxprune.bench import Speed, bench
from jaxprune.budget import Budget, bytes, channels, flops, params
from jaxprune.checkpoint import Pruned, load, save
from jaxprune.cost import cost
from jaxprune.criteria import (
    Criterion,
    Evidence,
    chain,
    ema,
    normalize,
    per_cost,
    score,
)
from jaxprune.export import export, load_export
from jaxprune.features import activation, reconstruction, reconstruction_error
from jaxprune.folding import Folded, fold_batch_norm
from jaxprune.gates import (
    accelerated_gates,
    gate,
    gates_to_keep,
    init_gates,
    preconditioned_gates,
    proximal_gates,
)
from jaxprune.int8 import Quantized, quantize_weights
from jaxprune.keeps import compose
from jaxprune.latency import Timings, latency, timings
from jaxprune.layerwise import lasso_select
from jaxprune.lowrank import Factorized, factorize, factorized
from jaxprune.measures import (
    bn_scale,
    fisher,
    geometric_median,
    lamp,
    magnitude,
    measured,
    random,
    taylor,
)
from jaxprune.metric import adam_steps, preconditioned
from jaxprune.modules import to_nnx
from jaxprune.onnx_export import export_onnx
from jaxprune.path import prune_path
from jaxprune.pricing import adaptive, flops_weights, repriced
from jaxprune.prune import prune
from jaxprune.reconstruct import reconstruct
from jaxprune.rules import register_rule
from jaxprune.search import best_of, particle_filter
from jaxprune.select import select
from jaxprune.slim import slim, verify
from jaxprune.sparsity import dead, group_lasso, proximal
from jaxprune.steering import steer
from jaxprune.steps import Path, Step
from jaxprune.trace import trace
from jaxprune.trees import expand, mask, shrink, shrink_graph
from jaxprune.weights import keep_zeros, nonzero_cost, prune_weights

if TYPE_CHECKING:  # at run time, `jaxprune` imports them when they are first used
    from jaxprune import models, report, train

__all__ = [
    "Budget",
    "Cost",
    "Criterion",
    "Evidence",
    "Factorized",
    "Folded",
    "Frozen",
    "Graph",
    "Group",
    "Leaf",
    "Path",
    "Pruned",
    "Quantized",
    "Slot",
    "Speed",
    "Step",
    "Timings",
    "accelerated_gates",
    "activation",
    "adam_steps",
    "adaptive",
    "base",
    "bench",
    "best_of",
    "bn_scale",
    "bytes",
    "chain",
    "channels",
    "compose",
    "cost",
    "data",
    "dead",
    "ema",
    "expand",
    "export",
    "export_onnx",
    "factorize",
    "factorized",
    "fisher",
    "flops",
    "flops_weights",
    "fold_batch_norm",
    "gate",
    "gates_to_keep",
    "geometric_median",
    "group_lasso",
    "init_gates",
    "keep_zeros",
    "lamp",
    "lasso_select",
    "latency",
    "load",
    "load_export",
    "magnitude",
    "mask",
    "measured",
    "models",
    "nonzero_cost",
    "normalize",
    "params",
    "particle_filter",
    "per_cost",
    "preconditioned",
    "preconditioned_gates",
    "proximal",
    "proximal_gates",
    "prune",
    "prune_path",
    "prune_weights",
    "quantize_weights",
    "random",
    "reconstruct",
    "reconstruction",
    "reconstruction_error",
    "register_rule",
    "report",
    "repriced",
    "save",
    "score",
    "select",
    "shrink",
    "shrink_graph",
    "slim",
    "steer",
    "taylor",
    "timings",
    "to_nnx",
    "trace",
    "train",
    "verify",
]
