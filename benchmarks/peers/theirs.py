# SPDX-License-Identifier: Apache-2.0
"""The peers' side: half the channels of every group, by magnitude, and the error.

python benchmarks/peers/theirs.py TOOL NETWORK     prints a row as one line of JSON

TOOL is 'torch-pruning' or 'kirigami'. Which channels a tool removed is read off the
weights that it kept: all are random, so that each is found again in the dense network.
Those that are gone are zeroed in a copy of the dense network, which is what the pruned
one is compared with.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import big_torch
import torch
import torch_kirigami
import torch_pruning as tp
import zoo_torch
from torch_kirigami import pruning

REPEATS, LONG = 3, 5.0  # what takes longer is timed once


class Graph(NamedTuple):
    """What a tool knows of a network before a selection.

    size() tells the number of groups and of channels in them; cut() cuts the network
    and tells which budget it met, where there is a choice.
    """

    size: Callable[[], tuple[int, int]]
    cut: Callable[[], str]


def torch_pruning(net: Any, x: torch.Tensor) -> Graph:
    """As its README says, with the hints that it asks for."""
    pruner = tp.pruner.BasePruner(
        net,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[net.head],
        num_heads={getattr(net, n): h for n, h in net.heads.items()},
        # Documented as a dict, which crashes; pairs are what the code reads.
        unwrapped_parameters=[(net.w, 1)] if hasattr(net, "w") else None,
    )

    def size() -> tuple[int, int]:
        layers, roots = [net.head], pruner.root_module_types
        groups = list(pruner.DG.get_all_groups(layers, roots))
        return len(groups), sum(len(group[0].idxs) for group in groups)

    def cut() -> str:
        pruner.step()
        return ""

    return Graph(size, cut)


def kirigami(net: Any, x: torch.Tensor) -> Graph:
    """As its README says; its groups are counted by the axes that it may cut."""
    graph = torch_kirigami.DependencyGraph.build(net, args=(x,))
    pruner = pruning.Pruner(net, graph=graph)
    space = pruner.discover_candidates()
    strategy = pruning.Greedy(pruning.GroupMagnitude(p=1))
    budgets = {
        "local": pruning.ChannelRatio(0.5, "local"),
        "global": pruning.ChannelRatio(0.5, "global"),
        "parameters": pruning.ParameterBudget.from_ratio(net, 0.3),
    }

    def cut() -> str:
        if not space.candidates:
            return ""
        for name, budget in budgets.items():
            try:
                plan = pruner.plan(space, budget=budget, strategy=strategy)
            except pruning.PlanningError as error:
                missed = error
                continue
            pruner.apply(plan)
            return name
        raise missed

    return Graph(lambda: (len(space.channel_axes), len(space.candidates)), cut)


TOOLS = {"torch-pruning": torch_pruning, "kirigami": kirigami}
REFUSALS = (torch_kirigami.KirigamiError, pruning.PlanningError, NotImplementedError)


def randomise(net: torch.nn.Module) -> None:
    """Random values of moderate size, no two alike, in every parameter and buffer."""
    for name, value in net.state_dict(keep_vars=True).items():
        if not value.is_floating_point():
            continue
        value = value.data
        if "var" in name:
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.1)
        else:
            value.normal_(0.0, (3 / value[0].numel()) ** 0.5)


def image(like: torch.Tensor) -> torch.Tensor:
    """Noise of a colour, so that pooled outputs move too; or tokens."""
    if not like.is_floating_point():
        return torch.randint(0, 10, like.shape)
    channels = like.shape[1] if like.ndim == 4 else like.shape[-1]
    hue = torch.randn(channels, *[1] * (like.ndim - 2 if like.ndim == 4 else 0))
    return hue + torch.randn(like.shape)


def masked(dense: torch.nn.Module, small: torch.nn.Module) -> torch.nn.Module:
    """The dense network with zeros where the small one has nothing."""
    result, kept = copy.deepcopy(dense), small.state_dict()
    for name, value in result.state_dict().items():
        if not value.is_floating_point():
            continue
        ordered, places = value.flatten().sort()
        found = torch.searchsorted(ordered, kept[name].flatten().contiguous())
        found = places[found.clamp(max=len(places) - 1)]
        if not torch.equal(value.flatten()[found], kept[name].flatten()):
            raise ValueError(f"{name}: values that the dense network does not have")
        mask = torch.zeros(value.numel(), dtype=value.dtype)
        mask[found] = 1
        value.mul_(mask.reshape(value.shape))
    return result


def graphs(tool: Callable[..., Graph], net: Any, x: Any) -> tuple[float, int, int]:
    """The least CPU seconds of a few graphs, their groups told; groups and channels."""
    spent: list[float] = []
    while len(spent) < REPEATS and not (spent and spent[-1] > LONG):
        small = copy.deepcopy(net)
        start = time.process_time()
        groups, channels = tool(small, x).size()
        spent.append(time.process_time() - start)
    return min(spent), groups, channels


def cuts(tool: Callable[..., Graph], net: Any, x: Any, repeats: int) -> Any:
    """The cut network, the least CPU seconds of a few cuts, and the budget met."""
    spent: list[float] = []
    for _ in range(repeats):
        small = copy.deepcopy(net)
        graph = tool(small, x)
        start = time.process_time()
        budget = graph.cut()
        spent.append(time.process_time() - start)
    return small, min(spent), budget


def measure(tool: str, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        return _measure(TOOLS[tool], name, row)
    except Exception as error:
        verdict = "refuses" if isinstance(error, REFUSALS) else "crashes"
        why = f"{type(error).__name__}: {error}"[:400]
        return {**row, "verdict": verdict, "why": why}


def _measure(
    tool: Callable[..., Graph], name: str, row: dict[str, Any]
) -> dict[str, Any]:
    big = name in big_torch.BIG
    net, like = (big_torch if big else zoo_torch).network(name)
    net.eval()
    randomise(net)
    if big:  # seconds are of float32, as ours are
        full = torch.randn(1, 3, *big_torch.SIZES[name])
        row["graph_s"], row["groups"], row["channels"] = graphs(tool, net, full)
        row["graph_s_64"], *_ = graphs(tool, net, image(like))
        print(json.dumps({"name": name, **row, "verdict": "unfinished"}), flush=True)
    else:
        _, row["groups"], row["channels"] = graphs(tool, net, image(like))
    torch.set_default_dtype(torch.float64)
    single, net, one, two = net, copy.deepcopy(net).double(), image(like), image(like)
    randomise(net)  # in float32 two of many might be alike
    small, row["cut_s"], row["budget"] = cuts(tool, net, one, 1)
    torch.set_default_dtype(torch.float32)
    if big and row["cut_s"] < LONG:
        _, row["cut_s"], _ = cuts(tool, single, one.float(), REPEATS)
    return row | compared(net, small, one, two)


def compared(net: Any, small: Any, one: Any, two: Any) -> dict[str, Any]:
    """What is left of the parameters, and how wrong the cut network is."""
    small.eval()
    before, after = (sum(p.numel() for p in n.parameters()) for n in (net, small))
    row: dict[str, Any] = {"left": after / before}
    try:
        with torch.no_grad():
            got, dense = small(one), masked(net, small)
            want, other = dense(one), dense(two)
    except Exception as error:
        why = f"the cut network: {type(error).__name__}: {error}"[:400]
        return {**row, "verdict": "crashes", "why": why}
    row["error"] = float((got - want).abs().max() / (other - want).abs().max())
    return row


if __name__ == "__main__":
    torch.manual_seed(0)
    for title in sys.argv[2:]:
        print(json.dumps({"name": title, **measure(sys.argv[1], title)}), flush=True)
