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
from typing import Any

import big_torch
import torch
import torch_kirigami
import torch_pruning as tp
import zoo_torch
from torch_kirigami import pruning

REPEATS, LONG = 3, 5.0  # what takes longer is timed once
# Of the channels of each axis, of all channels, of the parameters: the first that the
# planner meets.
BUDGETS = ("local", "global", "parameters")


class Cut:
    """A tool's graph and its cut of one copy of a network."""

    def __init__(self, net: torch.nn.Module, x: torch.Tensor) -> None:
        self.net, self.x, self.note = net, x, ""

    def graph(self) -> None:
        """Builds all that is known before a selection."""
        raise NotImplementedError

    def size(self) -> tuple[int, int]:
        """The number of groups, and of channels in them."""
        raise NotImplementedError

    def cut(self) -> None:
        raise NotImplementedError


class TorchPruning(Cut):
    """As its README says, with the hints that it asks for."""

    def graph(self) -> None:
        net = self.net
        # Documented as a dict, which crashes; pairs are what the code reads.
        free = [(net.w, 1)] if hasattr(net, "w") else None
        self.pruner = tp.pruner.BasePruner(
            net,
            self.x,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=[net.head],
            num_heads={getattr(net, n): h for n, h in net.heads.items()},
            unwrapped_parameters=free,
        )

    def size(self) -> tuple[int, int]:
        layers, roots = [self.net.head], self.pruner.root_module_types
        groups = list(self.pruner.DG.get_all_groups(layers, roots))
        return len(groups), sum(len(group[0].idxs) for group in groups)

    def cut(self) -> None:
        self.pruner.step()


class Kirigami(Cut):
    """As its README says; its groups are counted by the axes that it may cut."""

    def graph(self) -> None:
        graph = torch_kirigami.DependencyGraph.build(self.net, args=(self.x,))
        self.pruner = pruning.Pruner(self.net, graph=graph)
        self.space = self.pruner.discover_candidates()

    def size(self) -> tuple[int, int]:
        return len(self.space.channel_axes), len(self.space.candidates)

    def cut(self) -> None:
        strategy = pruning.Greedy(pruning.GroupMagnitude(p=1))
        for scope in BUDGETS if self.space.candidates else ():
            if scope == "parameters":
                budget = pruning.ParameterBudget.from_ratio(self.net, 0.3)
            else:
                budget = pruning.ChannelRatio(0.5, scope)
            try:
                plan = self.pruner.plan(self.space, budget=budget, strategy=strategy)
            except pruning.PlanningError as error:
                self.note = str(error)
                continue
            self.pruner.apply(plan)
            self.note = scope
            return
        if self.space.candidates:
            raise pruning.PlanningError(self.note)


TOOLS: dict[str, Callable[..., Cut]] = {
    "torch-pruning": TorchPruning,
    "kirigami": Kirigami,
}
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


def timed(tool: Callable[..., Cut], net: Any, x: Any) -> tuple[Cut, dict[str, Any]]:
    """The cut network, and the least seconds of a few graphs and cuts."""
    graphs, cuts = [], []
    while len(graphs) < REPEATS and not (graphs and graphs[-1] + cuts[-1] > LONG):
        cut = tool(copy.deepcopy(net), x)
        graphs.append(_seconds(cut.graph))
        groups, channels = cut.size()
        cuts.append(_seconds(cut.cut))
    seconds = {"graph_s": min(graphs), "cut_s": min(cuts)}
    return cut, {"groups": groups, "channels": channels, **seconds, "note": cut.note}


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(tool: str, name: str) -> dict[str, Any]:
    source = zoo_torch if name in zoo_torch.ZOO else big_torch
    net, like = source.network(name)
    net = net.double().eval()
    randomise(net)
    one, two = image(like), image(like)
    try:
        cut, row = timed(TOOLS[tool], net, one)
    except Exception as error:
        verdict = "refuses" if isinstance(error, REFUSALS) else "crashes"
        return {"verdict": verdict, "why": f"{type(error).__name__}: {error}"[:400]}
    small = cut.net.eval()
    before, after = (sum(p.numel() for p in n.parameters()) for n in (net, small))
    row["left"] = after / before
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
    torch.set_default_dtype(torch.float64)
    for title in sys.argv[2:]:
        print(json.dumps({"name": title, **measure(sys.argv[1], title)}), flush=True)
