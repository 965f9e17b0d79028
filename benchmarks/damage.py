# SPDX-License-Identifier: Apache-2.0
"""What becomes of saved networks, training states and exports whose files are harmed.

    python benchmarks/damage.py [--places 500] [--seed 0]

Each file of each is harmed at so many places: bits flipped, ends cut off, blocks
zeroed, bytes appended; and once each it is emptied, deleted, renamed, swapped with its
neighbour, replaced by a link to its own copy. Then the folder is loaded. Prints
markdown: how often the damage was *found*, by an error of jaxprune that names the file;
was *silent*; or ended *nameless*, in any other error. Ends with 1 but for found alone.
"""

import argparse
import collections
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune import checkpoint, models
from jaxprune.train.step import init_state

SHAPE = (1, 16, 16, 3)


class Harm(NamedTuple):
    """What is done to a `file`: its `kind`, and its new bytes (None: see `harmed`)."""

    kind: str
    file: Path
    content: bytes | None


class Subject(NamedTuple):
    """A folder that was saved, and how it is loaded."""

    folder: Path
    load: Callable[[], Any]


def subjects(folder: Path) -> dict[str, Subject]:
    """A small SegNet-Basic, pruned: saved, exported, and two training states."""
    net = models.SegNetBasic(3, widths=(4, 4, 4, 4))
    variables = models.init(net, jax.random.key(0), SHAPE[1:3])
    images = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    graph = jp.trace(net.apply, variables, images, train=False)
    keep = jp.select(graph, jp.score(jp.magnitude(), graph, variables), jp.flops(0.5))
    small = jp.shrink(graph, keep, variables)
    pruned = jp.Pruned(jp.slim(net.apply, graph, keep), small, graph, keep)
    info = {"name": "segnet_basic", "args": {"num_classes": 3, "widths": [4] * 4}}
    jp.save(folder / "final", pruned, network=info)
    jp.export(pruned, folder / "served", images, train=False)
    state = init_state(small, optax.adam(1e-3))
    store = checkpoint.open_store(folder / "train")
    for step in (10, 20):
        store.save(step, state, {"losses": [0.5] * 3})
    return {
        "saved network": Subject(folder / "final", lambda: jp.load(folder / "final")),
        "training state": Subject(
            folder / "train" / "20", lambda: store.restore(None, state)
        ),
        "export": Subject(folder / "served", lambda: jp.load_export(folder / "served")),
    }


def harms(folder: Path, places: int, rng: np.random.Generator) -> Iterator[Harm]:
    """`places` harms of each file, and those that are done once to each."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, file in enumerate(files):
        whole = file.read_bytes()
        for kind in ("deleted", "renamed", "linked"):
            yield Harm(kind, file, None)
        other = files[number - 1].read_bytes()
        if whole:
            yield Harm("emptied", file, b"")
        if other != whole:
            yield Harm("swapped", file, other)
        for kind in rng.choice(list(_AT_RANDOM), places, p=list(_AT_RANDOM.values())):
            content = _changed(str(kind), whole, rng)
            if content != whole:
                yield Harm(str(kind), file, content)


# And how often each is drawn.
_AT_RANDOM = {"flipped": 0.6, "cut": 0.15, "zeroed": 0.15, "grown": 0.1}


def _changed(kind: str, whole: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(whole)
    at = int(rng.integers(max(len(whole), 1)))
    if kind == "grown" or not whole:
        return whole + rng.bytes(int(rng.integers(1, 64)))
    if kind == "cut":
        return whole[:at]
    if kind == "flipped":
        changed[at] ^= 1 << int(rng.integers(8))
    else:
        end = min(at + int(rng.integers(1, 512)), len(whole))
        changed[at:end] = bytes(end - at)
    return bytes(changed)


def outcome(subject: Subject, harm: Harm) -> str:
    """What loading ends in: 'found', 'silent', or 'nameless' and the error."""
    file, whole = harm.file, harm.file.read_bytes()
    aside = file.with_name(file.name + "_")
    try:
        if harm.content is not None:
            file.write_bytes(harm.content)
        else:
            file.rename(aside)
        if harm.kind == "linked":
            file.symlink_to(aside)
        elif harm.kind == "deleted":
            aside.unlink()
        subject.load()
    except jp.base.JaxpruneError as error:
        return "found" if str(file) in str(error) else f"nameless: {error}"
    except Exception as error:  # what must not be
        return f"nameless: {error!r}"
    finally:
        aside.unlink(missing_ok=True)
        file.unlink(missing_ok=True)
        file.write_bytes(whole)
    return "silent"


def campaign(
    folder: Path, places: int, seed: int = 0
) -> dict[str, collections.Counter[tuple[str, str]]]:
    """Of each subject, how often each (kind of harm, outcome) came about."""
    rng = np.random.default_rng(seed)
    counts = {}
    for name, subject in subjects(folder).items():
        subject.load()  # before any harm, it loads
        counts[name] = collections.Counter(
            (harm.kind, outcome(subject, harm))
            for harm in harms(subject.folder, places, rng)
        )
        subject.load()  # and after it was undone
    return counts


def as_markdown(counts: dict[str, collections.Counter[tuple[str, str]]]) -> str:
    """A row for each subject and kind of harm."""
    rows = [
        "| | harm | places | found | silent | nameless |",
        "| --- | --- |" + " ---: |" * 4,
    ]
    for name, found in counts.items():
        for kind in sorted({kind for kind, _ in found}):
            of = {o: n for (k, o), n in found.items() if k == kind}
            nameless = sum(n for o, n in of.items() if o.startswith("nameless"))
            numbers = [sum(of.values()), of.get("found", 0), of.get("silent", 0)]
            cells = [name, kind, *map(str, numbers), str(nameless)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Harm, load, print; 1 where any damage was not found and named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--places", type=int, default=500, help="of each file (500)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = campaign(Path(folder), args.places, args.seed)
    print(as_markdown(counts))
    bad = {o for found in counts.values() for _, o in found if o != "found"}
    for text in sorted(bad):
        print(text, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
