# SPDX-License-Identifier: Apache-2.0
"""A small file of each version of what jaxprune writes, kept in `tests/versions/`.

`python tests/versions.py` adds those of the present versions; what is there stays: it
was written by the jaxprune of its time.
"""

import json
import tempfile
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import toygraphs

import jaxprune as jp
from jaxprune import checkpoint
from jaxprune.base import Cost
from jaxprune.pruned import Pruned
from jaxprune.steps import Path as Walked
from jaxprune.steps import Step

HERE = Path(__file__).with_suffix("")
GRAPH = toygraphs.chain(4, 6)
KEEP = GRAPH.full() | {"l0": np.array([1, 0, 1, 1], bool)}
STATE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "step": 7}
META = {"epoch": 2.5, "losses": [0.5, float("nan")]}
WEIGHTS = {"w": np.array([[1.0, -2.0], [0.5, 4.0]], np.float32)}
PATH = Walked(
    (
        Step(0.0, GRAPH.full(), Cost(100, 50, 40), 0.5, 0.25),
        Step(0.125, KEEP, Cost(80, 40, 36), float("nan"), float("nan")),
    )
)


def network() -> Pruned:
    """The network of `network_N.zip`: leaf i is filled with i, i + 1, ..."""
    dense = toygraphs.variables(GRAPH)
    names = sorted(dense["params"])
    for i, name in enumerate(names):
        dense["params"][name] = {
            k: jnp.arange(i, i + v.size, dtype=v.dtype).reshape(v.shape)
            for k, v in dense["params"][name].items()
        }
    return Pruned(
        jp.slim(toygraphs.apply, GRAPH, KEEP),
        jp.shrink(GRAPH, KEEP, dense),
        GRAPH,
        KEEP,
        {"note": "é"},
    )


def write(folder: Path) -> dict[str, Path]:
    """Everything that can be saved, by kind, written into a folder."""
    checkpoint.save(folder / "network", network())
    checkpoint.open_store(folder / "run").save(3, STATE, META)
    linear = Pruned(lambda v, x: x @ v["w"], WEIGHTS, GRAPH, KEEP)
    jp.export(linear, folder / "export", jp_struct(), shapes=["b, 2"])
    (folder / "graph").mkdir()
    (folder / "graph" / "graph.json").write_text(GRAPH.to_json(), "utf-8")
    (folder / "path").mkdir()
    PATH.save(folder / "path" / "path.jsonl")
    kinds = ("network", "run", "export", "graph", "path")
    return {kind: folder / kind for kind in kinds}


def jp_struct() -> np.ndarray:
    """The exported program's input."""
    return np.ones((1, 2), np.float32)


def version(kind: str, folder: Path) -> str:
    """The versions that its files name: of the manifest, then of the record."""
    found = []
    for file in sorted(folder.rglob("*.json*")):
        if "arrays" in file.parts:
            continue
        text = file.read_text("utf-8")
        record = json.loads(
            text.partition(" ")[2].splitlines()[0] if kind == "path" else text
        )
        if kind == "network" or file.name != "graph.json" or kind == "graph":
            found.append(str(record.get("version", record.get("path", 0))))
    return "_".join(found)


def pack(folder: Path, file: Path) -> None:
    """A folder as an archive, the same bytes each time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def main() -> None:
    """Write the archives of the present versions that are not there yet."""
    HERE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for kind, folder in write(Path(work)).items():
            file = HERE / f"{kind}_{version(kind, folder)}.zip"
            if not file.exists():
                pack(folder, file)
            print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main()
