# SPDX-License-Identifier: Apache-2.0
"""Training on under a penalty before the cut: the group lasso, or gates."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

from jaxprune import gates, pricing, sparsity
from jaxprune.base import Apply, Graph, PyTree
from jaxprune.train import step as steps
from jaxprune.train.loop import Job, train
from jaxprune.train.progress import Progress
from jaxprune.trees import mask


def sparsify(
    job: Job, graph: Graph, dense: steps.State, progress: Progress
) -> tuple[PyTree, PyTree]:
    """(variables, optimiser state) of the dense network after `lasso_epochs`.

    The method's proximal steps come behind the optimiser's (docs/method.md). A
    channel that they have brought to 0 is 0 in the variables throughout.
    """
    prune, fit = job.config.prune, job.config.train
    fit = dataclasses.replace(fit, epochs=prune.lasso_epochs, lr=fit.lr / 4, warmup=0.0)
    job = dataclasses.replace(job, stage=prune.method, fit=fit, teacher=None)
    _, rate = steps.optimizer(fit, job.total)
    weights = pricing.flops_weights(graph)

    def strength(n: Any) -> Any:
        return prune.strength * rate(n)

    if prune.method == "gates":
        proximal = _on_gates(gates.proximal_gates(strength, weights))
        apply = _gated(job.apply, graph)
        job = dataclasses.replace(job, apply=apply, proximal=proximal)
        state = train(job, _with_gates(graph, dense.average), progress)
        alive = gates.gates_to_keep(state.variables["params"]["gates"])
        trained = _folded(graph, state.average)
    else:
        proximal = sparsity.proximal(graph, strength, weights)
        carried = dense.opt_state if prune.carry_optimizer else None
        job = dataclasses.replace(job, proximal=proximal, carried=carried)
        state = train(job, dense.average, progress)
        alive = sparsity.dead(graph, state.variables)
        trained = state.average
    # What has died is not yet 0 in the moving average.
    return mask(graph, alive, trained), state.opt_state


# Gates are trained among the params: {'network': params, 'gates': {group: float[C]}}.


def _with_gates(graph: Graph, variables: PyTree) -> PyTree:
    params = {"network": variables["params"], "gates": gates.init_gates(graph)}
    return {**variables, "params": params}


def _folded(graph: Graph, variables: PyTree) -> PyTree:
    """The network's own variables, which compute what the gated ones do."""
    params = variables["params"]
    return gates.gate(
        graph, params["gates"], {**variables, "params": params["network"]}
    )


def _gated(apply: Apply, graph: Graph) -> Apply:
    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        return apply(_folded(graph, variables), *inputs, **kwargs)

    return run


def _on_gates(
    proximal: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """`proximal` for the gates; the network's own params pass."""

    def init(params: PyTree) -> Any:
        return proximal.init(params["gates"])

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        known = None if params is None else params["gates"]
        gates, state = proximal.update(updates["gates"], state, known)
        return {**updates, "gates": gates}, state

    return optax.GradientTransformation(init, update)
