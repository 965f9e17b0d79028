# SPDX-License-Identifier: Apache-2.0
"""The page of `public_networks.py`: its rows as markdown."""

import collections
import datetime
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax

from jaxprune.rules import RULES

Row = Mapping[str, Any]

MOST = 0.05  # of a network's channels may stay without a word
INTRODUCTION = """# Public networks

Flax networks that were written without jaxprune in mind, traced and cut as they are:
{count} of {repositories} repositories, {linen} linen and {nnx} nnx.

- {convolution:,} channels of convolutions, {share} of them prunable
- largest error of the law: {error} (in float64 where that was measured)
- {primitives} of JAX's primitives occur in them; without a rule: {unknown}
- seconds of `trace` beyond JAX's own: median {median:.2f}, at most {longest:.2f}

Measured on {date} with JAX {jax} and Flax {flax}, on one CPU core of a busy machine:

    python benchmarks/public_networks.py --clones DIR --out docs/public_networks.md

`benchmarks/public_networks.toml` tells where each is and how it is built; DIR holds the
repositories at the commits below. Nothing of them was changed, except for names that
newer versions of JAX and Flax have dropped.

- *groups*: that jaxprune found; *channels*: output channels of all convolution kernels;
  *prunable*: the share of these that lie in a group. The rest is told apart below.
- *FLOPs*: what is left of them when a random half of every group is cut.
- *error*: of the law `slim(shrink(v)) == mask(v)` after that cut, in float32 with
  random variables: the largest difference between the two, relative to how far the
  masked network's output moves from one input to another. An output that hardly depends
  on its input could hide a mistake; measured so, it shows. Above 1e-4, the same in
  float64 follows in brackets: what was rounding, of an output that moves little or a
  network that itself rounds to bfloat16, is gone there.
- *trace*: CPU seconds of `trace` beyond those of JAX's own `make_jaxpr` (*jaxpr*).
"""


def page(rows: Mapping[str, Row], entries: Mapping[str, Row]) -> str:
    """rows: results by name; entries: the table's, in whose order they are shown."""
    done = {
        n: {**e, **rows[n]}
        for n, e in entries.items()
        if rows.get(n, {}).get("stage") == "done"
    }
    others = [n for n in entries if n in rows and n not in done]
    parts = [
        _introduction(list(done.values())),
        _networks(done.values()),
        "## What is not prunable\n",
        _loosely(done.values()),
        _causes(done),
        _below(done),
        "## Not counted\n",
        "These fail on their own with the versions above, or took too long:\n",
        "\n".join(f"- {n}: {_plain(rows[n].get('error', ''))}" for n in others) + "\n",
        "## Repositories\n",
        _repositories(done.values()),
    ]
    return "\n".join(parts)


def _introduction(rows: list[Row]) -> str:
    channels = sum(r["convolution"] for r in rows)
    nnx = sum("rngs=rngs" in r["make"] for r in rows)
    seconds = [r["trace_s"] for r in rows]
    primitives = {name for r in rows for name in r["primitives"]}
    unknown = ", ".join(f"`{name}`" for name in sorted(primitives - RULES.keys()))
    return INTRODUCTION.format(
        count=len(rows),
        repositories=len({r["repository"] for r in rows}),
        linen=len(rows) - nnx,
        nnx=nnx,
        date=datetime.date.today().isoformat(),
        jax=jax.__version__,
        flax=flax.__version__,
        convolution=channels,
        share=_percent(sum(r["prunable"] for r in rows), channels),
        error=_error(max(_last_error(r) for r in rows)),
        primitives=len(primitives),
        unknown=unknown or "none",
        median=statistics.median(seconds),
        longest=max(seconds),
    )


def _networks(rows: Iterable[Row]) -> str:
    head = "kind|network|groups|channels|prunable|FLOPs|error|jaxpr, s|trace, s"
    cells = [
        [
            r["kind"],
            f"{r['name'].removeprefix(r['repository']).strip()} ({r['repository']})",
            str(r["groups"]),
            f"{r['convolution']:,}",
            _percent(r["prunable"], r["convolution"]),
            _percent(r["flops"], 1) if r["groups"] else "–",
            _errors(r),
            f"{r['jaxpr_s']:.2f}",
            f"{r['trace_s']:.2f}",
        ]
        for r in sorted(rows, key=lambda r: (r["kind"], r["repository"]))
    ]
    return _table(head.split("|"), cells, text=2)


def _causes(rows: Mapping[str, Row]) -> str:
    channels: collections.Counter[str] = collections.Counter()
    networks = collections.defaultdict(set)
    for name, row in rows.items():
        for cause, count in row["causes"].items():
            primitive = cause.split(" (")[0]
            channels[primitive] += count
            networks[primitive].add(name)
    cells = [
        [cause, f"{count:,}", str(len(networks[cause])), min(networks[cause])]
        for cause, count in channels.most_common()
    ]
    return _table(["cause", "channels", "networks", "one of them"], cells, text=1)


def _below(rows: Mapping[str, Row]) -> str:
    """The networks of which more than MOST of the channels stay, and why."""
    few = {
        n: 1 - r["prunable"] / r["convolution"]
        for n, r in rows.items()
        if r["prunable"] < (1 - MOST) * r["convolution"]
    }
    cells = []
    for name in sorted(few, key=lambda n: -few[n]):
        row = rows[name]
        main = collections.Counter(row["causes"]).most_common(1)[0][0]
        why = row.get("why", "")
        cells.append([name, why, main, _percent(few[name], 1)])
    head = ["network", "what is in the way", "frozen by", "channels"]
    text = f"Of these networks more than {MOST:.0%} stays:\n\n".replace("%", " %")
    return text + _table(head, cells, text=3)


def _loosely(rows: Iterable[Row]) -> str:
    more = [r["prunable_loosely"] - r["prunable"] for r in rows]
    if not any(more):
        return "`exact=False` frees no channel besides.\n"
    return (
        f"With `exact=False` {sum(more):,} channels of {sum(n > 0 for n in more)} "
        "networks can be cut besides: their removal changes\nwhat the others compute.\n"
    )


def _repositories(rows: Iterable[Row]) -> str:
    commits = {r["repository"]: r["commit"] for r in rows}
    cells = [[name, f"`{commit[:12]}`"] for name, commit in sorted(commits.items())]
    return _table(["repository", "commit"], cells, text=2)


def _table(head: list[str], cells: Iterable[list[str]], text: int) -> str:
    """A markdown table; the first `text` columns to the left, the others right."""
    rule = ["---" if i < text else "---:" for i in range(len(head))]
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *cells)]
    return "\n".join(lines) + "\n"


def _percent(part: float, whole: float) -> str:
    if not whole:
        return "–"
    return "100 %" if part == whole else f"{min(99.9, 100 * part / whole):.3g} %"


def _errors(row: Row) -> str:
    double = row.get("double_error")
    text = _error(row["law_error"])
    return text if double is None else f"{text} ({_error(double)})"


def _last_error(row: Row) -> float:
    """In float64 where that was measured."""
    return row.get("double_error") or row["law_error"] or 0.0


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def _plain(message: str) -> str:
    return message.replace("|", "/").replace("<", "").replace(">", "")[:120]
