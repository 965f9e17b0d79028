# SPDX-License-Identifier: Apache-2.0
"""The page of the comparison, from its rows."""

import collections
import datetime
from collections.abc import Iterable, Mapping
from typing import Any

import big_flax
import zoo_flax

TOOLS = {"jaxprune": "jaxprune", "torch-pruning": "TP", "kirigami": "kirigami"}
EXACT = 1e-4
Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str], Row]

HEAD = """# Beside the two best peers

The same networks in Flax and in PyTorch, cut by jaxprune, by
[Torch-Pruning](https://github.com/VainF/Torch-Pruning) (TP) and by
[torch-kirigami](https://github.com/ZaberKo/torch-kirigami).

{findings}

Measured on {date}, {machine}, one of them used, with
{versions}:

    taskset -c 0 python benchmarks/peers/run.py --torch-python PEERS/bin/python \\
        {options}--out docs/peers.md

- *exact*: half of the channels of every group are cut, by the tool's own selection by
  L1 magnitude within a group. The cut network's output is compared, in float64 and with
  random parameters, with that of the dense network in which what was removed is zero:
  the largest difference, relative to how far that output moves from one input to
  another. Below 1e-4 is exact; above, WRONG, with the error. What a peer removed is
  read off the weights that it kept.
- *crashes*: an exception that does not name a limit of the tool, or a cut network that
  no longer runs; *refuses*: the tool says that it can't. *nothing cut*: no parameter is
  smaller afterwards, which is exact but no pruning. *time*: more than the limit.
- Norms that average over channels (layer norm, group norm) divide by the number of
  channels. A peer's smaller network divides by fewer than the masked one: another
  function, which training may mend, but not what masking measured. jaxprune keeps the
  dense divisor.
- TP is told the heads of attention (*told its heads*, and grouped queries) and free
  parameters' axes, and that the head stays. kirigami is asked for half of the channels
  of each axis; where its planner does not meet that, of all channels; then for 30 % of
  the parameters.
"""

LARGE = """
## Large networks

Channel counts are those of the papers. *graph*: CPU seconds, on one core, from the
network and its arrays to its groups, listed: at batch 1 and an image of the data that
the network was made for (SegNet 360x480, U-Net 512x512, VAE 256x256, the others
224x224), and at 64x64. *JAX*: how many of these JAX spends on tracing the Flax network.
*cut*: CPU seconds of scores, selection and cut. All in float32, the best of 3, or one
where that took more than 5 s. The result, in float64, and what is *left* of the
parameters are of 64x64. Listing its groups is part of TP's graph: its pruner is built
without, and timed where its cut is wrong or crashes, too. A kirigami *group* is an axis
that it may cut: those that only go together are counted apart.
"""

TINY = """
## One construct each

Tiny networks between a first layer and a head. *left* of the parameters in brackets.
"""


def verdict(row: Row | None) -> str:
    if row is None:
        return "not run"
    if row.get("verdict") == "time":
        return f"time ({row['why']})"
    if "verdict" in row:
        return str(row["verdict"])
    if not row["error"] < EXACT:
        return f"**WRONG** ({row['error']:.2g})"
    return "exact" if row["left"] < 1 else "nothing cut"


def large(rows: Rows) -> list[str]:
    columns = ("groups", "channels", "left", "graph, s", "at 64x64, s", "cut, s")
    lines = [
        f"| network | tool | result | {' | '.join(columns)} |",
        "| --- | --- | --- |" + " ---: |" * len(columns),
    ]
    for name in big_flax.BIG:
        for tool, short in TOOLS.items():
            row = rows.get((tool, name), {})
            cells = [name, short, verdict(row or None), *_numbers(row)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _numbers(row: Row) -> list[str]:
    formats = {"groups": "{:,}", "channels": "{:,}", "left": "{:.0%}"}
    cells = [f.format(row[key]) if key in row else "" for key, f in formats.items()]
    for suffix in ("", "_64"):
        cell = f"{row['graph_s' + suffix]:.3f}" if "graph_s" + suffix in row else ""
        if "jaxpr_s" + suffix in row:
            cell += f" (JAX {row['jaxpr_s' + suffix]:.3f})"
        cells.append(cell)
    return [*cells, f"{row['cut_s']:.3f}" if "cut_s" in row else ""]


def tiny(rows: Rows) -> list[str]:
    lines = [
        f"| construct | {' | '.join(TOOLS.values())} |",
        "| --- | --- | --- | --- |",
    ]
    for name in zoo_flax.ZOO:
        cells = []
        for tool in TOOLS:
            row = rows.get((tool, name))
            left = f" ({row['left']:.0%})" if row and "error" in row else ""
            cells.append(verdict(row) + left)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def why(rows: Rows) -> list[str]:
    """What the tools said where they crashed or refused."""
    lines = ["", "## What was said", ""]
    for (tool, name), row in rows.items():
        if "why" in row and row["verdict"] != "time":
            said = " ".join(row["why"].split()).replace("|", "/").replace("`", "'")
            lines.append(f"- {TOOLS[tool]}, {name}: `{said[:160]}`")
    return lines if len(lines) > 3 else []


def findings(rows: Rows) -> str:
    lines = []
    for tool, short in TOOLS.items():
        tiny, large = (
            ", ".join(f"{count} {word}" for word, count in _counts(rows, tool, names))
            for names in (zoo_flax.ZOO, big_flax.BIG)
        )
        lines.append(f"- {short}: of {len(zoo_flax.ZOO)} constructs {tiny};")
        lines.append(f"  of {len(big_flax.BIG)} large networks {large}.")
    lines += [f"- {_faster(rows, tool)}" for tool in list(TOOLS)[1:]]
    return "\n".join(lines)


def _counts(rows: Rows, tool: str, names: Iterable[str]) -> list[tuple[str, int]]:
    """Verdicts, without the size of errors, by how often they were given."""
    given = (verdict(rows.get((tool, name))).split(" (")[0] for name in names)
    return collections.Counter(given).most_common()


def _faster(rows: Rows, tool: str) -> str:
    """How many times quicker the graph and the cut are, where both have them."""
    parts = []
    keys = {"graph_s": "graphs", "graph_s_64": "graphs at 64x64", "cut_s": "cuts"}
    for key, what in keys.items():
        ratios = [
            rows[tool, name][key] / rows["jaxprune", name][key]
            for name in big_flax.BIG
            if key in rows.get((tool, name), {})
            and key in rows.get(("jaxprune", name), {})
        ]
        if ratios:
            parts.append(f"{what} {min(ratios):.2g} to {max(ratios):.2g} times")
    times = ", ".join(parts) or "nothing to compare"
    return f"{TOOLS[tool]}'s seconds over jaxprune's, large networks: {times}."


def page(rows: Rows, versions: Mapping[str, str], machine: str, options: str) -> str:
    """The page; options: those of the command beside `--out`."""
    head = HEAD.format(
        findings=findings(rows),
        date=datetime.date.today(),
        machine=machine,
        options=options,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )
    body = [*large(rows), TINY, *tiny(rows), *why(rows)]
    return head + LARGE + "\n" + "\n".join(body) + "\n"
