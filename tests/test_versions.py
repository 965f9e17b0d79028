# SPDX-License-Identifier: Apache-2.0
"""Every version that jaxprune has ever written is read, and newer ones are refused."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import toygraphs
import versions
from saved import assert_identical

import jaxprune as jp
from jaxprune import checkpoint, integrity
from jaxprune.base import CheckpointError, DataError, GraphError
from jaxprune.steps import Path as Walked

KEPT = sorted(versions.HERE.glob("*.zip"))


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    """What this jaxprune writes, by kind."""
    return versions.write(tmp_path_factory.mktemp("now"))


def test_each_present_version_is_kept(now):
    names = {f"{kind}_{versions.version(kind, at)}.zip" for kind, at in now.items()}
    assert names <= {file.name for file in KEPT}, "run python tests/versions.py"
    assert len(KEPT) > len(names)


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_what_each_version_wrote_is_read(file, tmp_path):
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    match file.stem.partition("_")[0]:
        case "network":
            loaded, made = jp.load(tmp_path, toygraphs.apply), versions.network()
            assert loaded.graph == made.graph and loaded.info == made.info
            assert_identical(dict(loaded.keep), dict(made.keep))
            assert_identical(loaded.variables, made.variables)
        case "run":
            store = checkpoint.open_store(tmp_path)
            tree, meta = store.restore(None, versions.STATE)
            assert_identical(tree, versions.STATE)
            assert meta["step"] == 3 and meta["epoch"] == 2.5
            assert meta["losses"][0] == 0.5 and np.isnan(meta["losses"][1])
        case "export":
            pytest.importorskip("flatbuffers")
            found = jp.load_export(tmp_path)(np.array([[1, 2], [3, 4]], np.float32))
            np.testing.assert_array_equal(found, [[2.0, 6.0], [5.0, 10.0]])
        case "graph":
            text = (tmp_path / "graph.json").read_text("utf-8")
            assert jp.Graph.from_json(text) == versions.GRAPH
        case "path":
            walked = Walked.load(tmp_path / "path.jsonl")
            assert walked.to_json() == versions.PATH.to_json()
        case kind:
            raise AssertionError(kind)


def newer(file, **change):
    """The JSON file as jaxprune 9.1 will write it, in a sealed folder."""
    record = json.loads(file.read_text("utf-8"))
    record |= {"version": 99, "jaxprune": "9.1"} | change
    file.write_text(json.dumps(record), "utf-8")
    (file.parent / integrity.MANIFEST).unlink()
    integrity._seal(file.parent)


REFUSED = r"version 99 is written by jaxprune 9\.1; this jaxprune, .*: install jaxprune"


@pytest.mark.parametrize("name", ["jaxprune.json", "graph.json", integrity.MANIFEST])
def test_a_newer_network_is_refused(now, tmp_path, name):
    folder = shutil.copytree(now["network"], tmp_path / "f")
    if name == integrity.MANIFEST:
        record = json.loads((folder / name).read_text())
        del record["sha256"]
        record |= {"version": 99, "jaxprune": "9.1"}
        (folder / name).write_bytes(integrity._signed(record))
    else:
        newer(folder / name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}: .*{REFUSED}"):
        jp.load(folder, toygraphs.apply)


def test_a_newer_manifest_may_be_spelt_otherwise(now, tmp_path):
    folder = shutil.copytree(now["network"], tmp_path / "f")
    (folder / integrity.MANIFEST).write_text('{"version": 3, "tree": "blake3:ab"}')
    with pytest.raises(CheckpointError, match="damaged, or: version 3 .* a newer"):
        jp.load(folder, toygraphs.apply)


def test_a_newer_step_is_refused(now, tmp_path):
    folder = shutil.copytree(now["run"], tmp_path / "f")
    newer(folder / "3" / "step.json")
    with pytest.raises(CheckpointError, match=f"step.json: {REFUSED}"):
        checkpoint.open_store(folder).restore(None, versions.STATE)


def test_a_newer_export_is_refused(now, tmp_path):
    folder = shutil.copytree(now["export"], tmp_path / "f")
    newer(folder / "export.json")
    with pytest.raises(CheckpointError, match=f"export.json: {REFUSED}"):
        jp.load_export(folder)


def test_newer_graphs_and_paths_are_refused(now, tmp_path):
    record = json.loads(versions.GRAPH.to_json()) | {"version": 99, "jaxprune": "9.1"}
    with pytest.raises(GraphError, match=f"graph: {REFUSED}"):
        jp.Graph.from_json(json.dumps(record))
    from jaxprune import path_io

    head = {"path": 99, "jaxprune": "9.1", "walk": None}
    (tmp_path / "p.jsonl").write_text(path_io._line(head))
    with pytest.raises(DataError, match=rf"p.jsonl: {REFUSED}"):
        Walked.load(tmp_path / "p.jsonl")
