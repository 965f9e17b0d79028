# SPDX-License-Identifier: Apache-2.0
"""The headline table: networks side by side, as rows of text and as Markdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxprune.report import words

ORDER = ("dense", "pruned", "scratch")


def results_table(evaluation: Mapping[str, Any]) -> str:
    """The headline table in Markdown.

    evaluation: the document of evaluation.json. A column a network and, with both a
    dense and a pruned one, what the pruned one has of the dense one.
    """
    head, *body = results_rows(evaluation)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def results_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """The headline table's rows of cells; the first row is the head."""
    networks = evaluation["networks"]
    columns = [n for n in ORDER if n in networks]
    columns += [n for n in networks if n not in ORDER]
    compare = "dense" in networks and "pruned" in networks
    head = ["", *(words.NAMES.get(n, n) for n in columns)]
    rows = [[*head, "pruned against dense"] if compare else head]
    for label, value, show, against in _measures(networks):
        values = [value(networks[n]) for n in columns]
        if all(v is None for v in values):
            continue
        row = [label, *map(show, values)]
        if compare:
            row.append(_compared(networks, value, against))
        rows.append(row)
    return rows


def _compared(networks: Mapping[str, Any], value: Callable, against: str) -> str:
    dense, pruned = value(networks["dense"]), value(networks["pruned"])
    if dense is None or pruned is None or not against:
        return ""
    if against == "difference":
        return words.signed(pruned - dense)
    return words.percent(pruned, dense)


def _measures(
    networks: Mapping[str, Any],
) -> Iterator[tuple[str, Callable, Callable, str]]:
    """(label, how to read it off a network, how to show it, how to compare it)."""
    splits = dict.fromkeys(s for n in networks.values() for s in n["splits"])
    for key, label in (
        ("miou", "mIoU"),
        ("global_accuracy", "global accuracy"),
        ("class_accuracy", "class accuracy"),
    ):
        for split in splits:
            yield f"{label}, {split}", _scored(split, key), words.share, "difference"
            if key == "miou":
                error = _scored(split, "miou_error")
                yield f"its standard error, {split}", error, words.share, ""
    for key, label in (
        ("params", "parameters"),
        ("flops", "FLOPs per image"),
        ("activation_bytes", "activations written per image (bytes)"),
    ):
        yield label, _costing(key), words.quantity, "share"
    if any(n.get("nonzero") for n in networks.values()):
        label = "FLOPs per image, zeros skipped"
        yield label, _skipping, words.quantity, "share"
    for label, read in _latencies(networks):
        yield label, read, _milliseconds, "share"
    yield "epochs of training", lambda n: n.get("epochs"), _plain, ""


def _scored(split: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda network: network["splits"].get(split, {}).get(key)


def _costing(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda network: network["cost"][key]


def _skipping(network: Mapping[str, Any]) -> float | None:
    """Of a machine that skips weights which are 0; all, where none was cut."""
    return (network.get("nonzero") or network["cost"])["flops"]


def _latencies(
    networks: Mapping[str, Any],
) -> Iterator[tuple[str, Callable[[Mapping[str, Any]], float | None]]]:
    """The latency at batch 1, and at batch N where another one was measured."""
    timed = [n["latency_ms"] for n in networks.values() if n.get("latency_ms")]
    yield "latency, batch 1", lambda n: (n.get("latency_ms") or {}).get("1")
    batch = next((t["batch"] for t in timed if t.get("batch")), 1)
    if batch != 1:
        label = f"latency, batch {batch}"
        yield label, lambda n: (n.get("latency_ms") or {}).get("N")


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def worst(network: Mapping[str, Any], split: str, classes: Sequence[str]) -> list[str]:
    """The three classes of lowest IoU, each with it: `Bicyclist .104`."""
    result = network["splits"].get(split)
    pairs = zip(result["per_class_iou"], classes, strict=True) if result else ()
    known = sorted((iou, name) for iou, name in pairs if iou is not None)
    return [f"{name} {words.share(iou)}" for iou, name in known[:3]]
