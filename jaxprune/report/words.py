# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them, and the findings that title the report's pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NAMES = {"dense": "dense", "pruned": "pruned", "scratch": "from scratch"}


def share(value: float | None) -> str:
    """A mIoU or accuracy to three places, `.495`; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0.") else text


def quantity(value: float | None) -> str:
    """A count with a unit prefix: `213.4 G`, `29.45 M`, `512`."""
    if value is None:
        return "–"
    for power, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.4g} {prefix}"
    return f"{value:.4g}"


def percent(part: float | None, whole: float | None) -> str:
    """`part` of `whole` in percent, `25 %`; two digits below 10 %."""
    if part is None or not whole:
        return "–"
    value = 100 * part / whole
    return f"{value:.2g} %" if value < 10 else f"{value:.0f} %"


def signed(value: float) -> str:
    """A difference of shares with its sign: `+.012`, `−.003`."""
    return ("−" if value < 0 else "+") + share(abs(value))


def judged(evaluation: Mapping[str, Any]) -> str:
    """The split that decides: test where there is one, else the last one listed."""
    networks = evaluation["networks"].values()
    splits = [split for network in networks for split in network["splits"]]
    return "test" if "test" in splits or not splits else splits[-1]


def headline(record: Any) -> str:
    """The run's finding in one sentence."""
    if record.evaluation is None:
        return "The run has not been evaluated yet"
    networks = record.evaluation["networks"]
    if "dense" not in networks or "pruned" not in networks:
        return f"Evaluated: {', '.join(NAMES.get(n, n) for n in networks)}"
    split = judged(record.evaluation)
    dense, pruned = networks["dense"], networks["pruned"]
    flops = percent(pruned["cost"]["flops"], dense["cost"]["flops"])
    return (
        f"Pruned reaches {share(miou(pruned, split))} mIoU on {split}, dense "
        f"{share(miou(dense, split))}, at {flops} of the FLOPs"
        + _otherwise(dense, pruned, split)
    )


def _otherwise(dense: Mapping[str, Any], pruned: Mapping[str, Any], split: str) -> str:
    """The splits on which the other one of two networks is ahead."""

    def ahead(name: str) -> bool:
        return (miou(pruned, name) or 0) >= (miou(dense, name) or 0)

    return "".join(
        f"; on {name} {share(miou(pruned, name))}, dense {share(miou(dense, name))}"
        for name in dense["splits"]
        if name in pruned["splits"] and ahead(name) != ahead(split)
    )


def miou(network: Mapping[str, Any], split: str) -> float | None:
    """mIoU of one network on one split, None where it was not measured."""
    result = network["splits"].get(split)
    return None if result is None else result["miou"]


def unequal_training(networks: Mapping[str, Any]) -> list[str]:
    """A sentence on who was trained for how long, where that differs; else none."""
    epochs = {n: network.get("epochs") for n, network in networks.items()}
    if len(set(epochs.values())) < 2 or None in epochs.values():
        return []
    parts = [f"{NAMES.get(n, n)} {count:g}" for n, count in epochs.items()]
    return [
        f"Not trained alike: {', '.join(parts)} epochs (of the pruned net's, the first "
        "were the dense training that it began from)."
    ]


def curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the training curves show."""
    best: dict[str, float] = {}
    for row in rows:
        if row.get("miou") is not None and row.get("split") == "val":
            best[row["stage"]] = max(best.get(row["stage"], 0.0), row["miou"])
    if "retrain" in best and "train" in best:
        return (
            f"Best validation mIoU: {share(best['retrain'])} after pruning and "
            f"retraining, {share(best['train'])} before"
        )
    if best:
        stage, value = list(best.items())[-1]
        return f"Stage '{stage}' reaches {share(value)} validation mIoU"
    return "Training has begun"


def widths(groups: Sequence[Mapping[str, Any]], unit: str = "channels") -> str:
    """What the widths (or ranks) before and after show."""
    before = sum(g["before"] for g in groups)
    after = sum(g["after"] for g in groups)
    if after == before:
        return f"All {before:,} {unit} stay"
    least = min(groups, key=lambda g: g["after"] / g["before"])
    return (
        f"{after:,} of {before:,} {unit} stay; {shorten(least['name'])} loses most "
        f"({least['before']} → {least['after']})"
    )


def shorten(name: str, length: int = 34) -> str:
    """A group's name without what all share, its front cut where it is long."""
    name = name.removeprefix("params/").removesuffix("/kernel")
    return name if len(name) <= length else "…" + name[1 - length :]


def by_cause(
    frozen: Sequence[tuple[str, int, int, str]], examples: int = 3
) -> list[list[str]]:
    """What cannot be cut, a row a cause: cause, axes, indices, where; a head first.

    frozen: (path, axis, count, cause) each; of more than `examples` places of one cause
    the rest is counted.
    """
    rows = [["what keeps it", "axes", "indices", "where"]]
    for cause in dict.fromkeys(entry[3] for entry in frozen):
        mine = [entry for entry in frozen if entry[3] == cause]
        where = [f"{shorten(path)} axis {axis}" for path, axis, _, _ in mine]
        more = len(mine) - examples
        text = ", ".join(where[:examples]) + (f" and {more} more" if more > 0 else "")
        rows.append([cause, str(len(mine)), str(sum(e[2] for e in mine)), text])
    return rows


def path(steps: Sequence[Mapping[str, Any]], dense_flops: float | None) -> str:
    """What the pruning path shows."""
    chosen = next((s for s in reversed(steps) if s.get("chosen")), None)
    if chosen is None:
        return f"{len(steps)} steps, none chosen yet"
    whole = dense_flops or max(s["flops"] for s in steps)
    text = f"Chosen: {percent(chosen['flops'], whole)} of the FLOPs"
    if chosen.get("miou") is not None:
        text += f", mIoU {share(chosen['miou'])}"
    return text + _others(steps, chosen, whole) + " (before retraining)"


def _others(
    steps: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any], whole: float
) -> str:
    """What the other rules would have chosen from the chosen step's round."""
    round_ = chosen.get("round", 1)
    names = {"1se": "the 1-SE rule", "knee": "the knee"}
    said = []
    for step in (s for s in steps if s.get("round", 1) == round_ and s is not chosen):
        rules = [n for rule, n in names.items() if rule in (step.get("rules") or ())]
        if rules:
            share_ = percent(step["flops"], whole)
            said.append(f"{' and '.join(rules)} at {share_}")
    return "".join(f"; {one}" for one in said)


def within_one_error(
    steps: Sequence[Mapping[str, Any]],
) -> tuple[float, float] | None:
    """(least risk, that and its standard error); None where either is not known."""
    known = [s for s in steps if s.get("risk") is not None]
    if not known:
        return None
    # Of equal risks the smaller network, as the path chooses.
    least = min(known, key=lambda s: (s["risk"], s["flops"]))
    if least.get("stderr") is None:
        return None
    return least["risk"], least["risk"] + least["stderr"]


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """The largest confusion of one class with another; matrix[K, K] rows = truth."""
    shares = row_shares(matrix)
    np.fill_diagonal(shares, 0)
    truth, said = divmod(int(np.argmax(shares)), len(classes))
    if shares[truth, said] == 0:
        return "Pruned confuses no class with another"
    return (
        f"Pruned, most confused: {100 * shares[truth, said]:.0f} % of "
        f"{classes[truth]} is taken for {classes[said]}"
    )


def row_shares(matrix: np.ndarray) -> np.ndarray:
    """Each row of [K, K] divided by its sum; a class without pixels is 0."""
    counts = np.asarray(matrix, np.float64)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def per_class(
    dense: Sequence[float | None],
    pruned: Sequence[float | None],
    classes: Sequence[str],
) -> str:
    """Which classes gain and lose most by pruning."""
    change = {
        name: p - d
        for name, d, p in zip(classes, dense, pruned, strict=True)
        if d is not None and p is not None and math.isfinite(p - d)
    }
    if not change:
        return "IoU by class"
    low, high = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
    if change[low] >= 0:
        return f"No class loses; {high} gains most ({signed(change[high])} IoU)"
    if change[high] <= 0:
        return f"No class gains; {low} loses most ({signed(change[low])} IoU)"
    return (
        f"{high} gains most ({signed(change[high])} IoU), {low} loses most "
        f"({signed(change[low])})"
    )
