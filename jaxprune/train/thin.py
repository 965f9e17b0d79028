# SPDX-License-Identifier: Apache-2.0
"""The prune stage of low rank: kernels become chains, to a budget of the network."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxprune import checkpoint
from jaxprune.base import Apply, Graph, PyTree, path_str
from jaxprune.budget import Budget
from jaxprune.cost import cost
from jaxprune.lowrank import Factorized, check_reachable, factorize
from jaxprune.pruned import Pruned
from jaxprune.select import alignment
from jaxprune.trace import trace
from jaxprune.train import choose, cut
from jaxprune.train import step as steps
from jaxprune.train.config import Config, Prune
from jaxprune.train.folder import write_json
from jaxprune.train.loop import Job
from jaxprune.train.progress import Progress

_FILE = "prune.json"


def check_budget(config: Config, apply: Apply, graph: Graph, variables: PyTree) -> None:
    """Raise BudgetError, telling the least, where no ranks of the method meet it.

    variables: of the dense network; their shapes count.
    """
    check_reachable(
        apply,
        graph,
        variables,
        cut.images_of(config),
        train=False,
        **_asked(config.prune),
    )


def _asked(prune: Prune) -> dict[str, Any]:
    """What of `factorize` the config says."""
    auto = prune.multiple_of == "auto"
    return {
        "method": prune.method,
        "budget": Budget(prune.budget, prune.ratio),  # type: ignore[arg-type]
        "multiple_of": alignment() if auto else prune.multiple_of,
    }


def thin_stage(
    job: Job, graph: Graph, dense: steps.State, progress: Progress
) -> Pruned:
    """Factorise the dense network, `job.apply`, to the budget, or load what was.

    job: of the retraining, but for its apply. The result lies in checkpoints/prune, a
    saved network; prune.json tells of it. Its graph is the factorised network's.
    """
    folder = job.workdir / "checkpoints" / "prune"
    if checkpoint.is_saved(folder) and (job.workdir / _FILE).exists():
        progress.note("prune: done already")
    else:
        thin = _thinned(job, graph, dense.average, progress)
        checkpoint.save(folder, thin, overwrite=True)
    return checkpoint.load(folder, job.apply)


def _thinned(job: Job, graph: Graph, variables: PyTree, progress: Progress) -> Pruned:
    config, prune = job.config, job.config.prune
    images = cut.images_of(config)
    seen = choose.images(job, prune.batches)
    found = factorize(
        job.apply,
        graph,
        variables,
        images,
        batches=seen,
        seed=config.seed,
        train=False,
        **_asked(prune),
    )
    here = dataclasses.replace(job, apply=found.apply)
    small = cut.restated(here, found.variables)
    cut.judge(here, small, 1, progress)
    after = trace(found.apply, small, images, train=False)
    _write(job, graph, after, found)
    _card(graph, after, found, progress)
    return Pruned(found.apply, small, after, after.full())


def _write(job: Job, graph: Graph, after: Graph, found: Factorized) -> None:
    """prune.json: each kernel's rank of how many; nothing of the groups is cut."""
    document: dict[str, Any] = {
        "method": cut.described(job),
        "keep": {},
        "unit": "ranks",
        "groups": [
            {
                "name": name,
                "before": chain.full,
                "after": chain.rank,
                "relu": chain.relu,
            }
            for name, chain in found.chains.items()
        ],
        "frozen": [
            {**dataclasses.asdict(f), "path": path_str(f.path)} for f in graph.frozen
        ],
        "path": None,
    }
    write_json(job.workdir / _FILE, document)


def _card(graph: Graph, after: Graph, found: Factorized, progress: Progress) -> None:
    """By kernel, its rank of how many, and whether it was fitted to a ReLU."""
    rows = [
        (name, str(chain.full), str(chain.rank), "to its ReLU" if chain.relu else "")
        for name, chain in found.chains.items()
    ]
    for title, field in (("FLOPs", "flops"), ("parameters", "params")):
        before, small = getattr(cost(graph), field), getattr(cost(after), field)
        stays = f"{small / max(before, 1):.1%} stay"
        rows.append((title, f"{before:,}", f"{small:,}", stays))
    progress.card("low rank", rows, ("kernel", "full rank", "rank", "fitted"))
