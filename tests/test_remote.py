# SPDX-License-Identifier: Apache-2.0
"""Saved folders behind URLs: by fsspec's file system in memory, and by file://."""

import sys

import jax
import numpy as np
import pytest
import toygraphs
from saved import assert_identical, small_network

import jaxprune as jp
from jaxprune import checkpoint, integrity, models, remote
from jaxprune.base import CheckpointError, GraphError

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """Where nothing is yet."""
    if request.param == "file":
        yield f"file://{tmp_path}/bucket/net"
        return
    yield "memory://bucket/net"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def files(url):
    system, root = fsspec.core.url_to_fs(url)
    return system, {name.removeprefix(root)[1:]: name for name in system.find(root)}


def test_a_network_goes_and_comes_back(url):
    jp.save(url, small_network(note=1), note=2)
    loaded = jp.load(f"{url}/", toygraphs.apply)
    assert_identical(loaded.variables, small_network().variables)
    assert loaded.info == {"note": 2} and checkpoint.read_card(url).info == loaded.info
    with pytest.raises(CheckpointError, match=f"{url} exists; pass overwrite=True"):
        jp.save(url, small_network())
    jp.save(url, small_network(note=3), overwrite=True)
    assert checkpoint.read_card(url).info == {"note": 3}
    system, there = files(url)
    system.pipe(f"{there[integrity.MANIFEST]}.txt", b"mine")
    system.rm(there[integrity.MANIFEST])
    with pytest.raises(CheckpointError, match=f"{url} exists; pass another, as it is"):
        jp.save(url, small_network(), overwrite=True)


def test_damage_is_named_by_its_url(url):
    jp.save(url, small_network())
    system, there = files(url)
    assert len(there) > 5
    for name, file in there.items():
        whole = system.cat(file)
        flipped = bytes([whole[0] ^ 1]) + whole[1:] if whole else b"x"
        for harm in (flipped, whole[1:] + b"xy", None):
            system.rm(file) if harm is None else system.pipe(file, harm)
            with pytest.raises(CheckpointError, match=f"{url}/{name}: (dam|mis)") as e:
                jp.load(url, toygraphs.apply)
            assert "/tmp" not in str(e.value).replace(url, "")
        system.pipe(file, whole)
    jp.load(url, toygraphs.apply)
    system.pipe(f"{there['graph.json']}.bak", b"x")
    with pytest.raises(CheckpointError, match="graph.json.bak: not in the manifest"):
        jp.load(url, toygraphs.apply)


class Cut(BaseException):
    """A kill."""


@pytest.mark.parametrize("before", [False, True])
def test_a_save_that_was_cut_off_is_no_network_and_can_be_repeated(
    url, monkeypatch, before
):
    system, root = fsspec.core.url_to_fs(url)
    for after in (0, 1, 2, 4, 9, 14, 40):
        if before:
            jp.save(url, small_network(note=1), overwrite=True)
        left = [after]
        with monkeypatch.context() as patch:
            for name in ("pipe_file", "rm_file", "put_file"):
                whole = getattr(type(system), name)

                def dying(*args, whole=whole, left=left, **kwargs):
                    if not left[0]:
                        raise Cut
                    left[0] -= 1
                    return whole(*args, **kwargs)

                patch.setattr(type(system), name, dying)
            try:
                jp.save(url, small_network(note=2), overwrite=before)
                assert checkpoint.read_card(url).info == {"note": 2} and after == 40
                break
            except Cut:
                assert after < 40
        if not after:  # it has changed nothing yet
            assert remote.PARTIAL not in files(url)[1]
            continue
        with pytest.raises(CheckpointError, match="the save was cut off"):
            jp.load(url, toygraphs.apply)
        jp.save(url, small_network(note=3))
        assert checkpoint.read_card(url).info == {"note": 3}
        assert remote.PARTIAL not in files(url)[1]
        system.rm(root, recursive=True)


def test_a_marker_that_was_cut_off_itself(url):
    jp.save(url, small_network(note=1))
    system, there = files(url)
    marker = there["graph.json"].replace("graph.json", remote.PARTIAL)
    system.pipe_file(marker, b'["gra')
    with pytest.raises(CheckpointError, match=f"{url}/jaxprune.partial: the save was"):
        jp.load(url, toygraphs.apply)
    jp.save(url, small_network(note=2))
    assert checkpoint.read_card(url).info == {"note": 2}


def test_what_others_wrote_is_never_overwritten(url):
    jp.save(url, small_network(note=1))
    system, there = files(url)
    for name in ("notes.txt", "more/notes.txt", "arrays/notes.txt"):
        file = there["graph.json"].replace("graph.json", name)
        system.makedirs(file.rpartition("/")[0], exist_ok=True)
        system.pipe_file(file, b"mine")
        with pytest.raises(CheckpointError, match=f"{url}/{name}: not jaxprune's"):
            jp.save(url, small_network(note=2), overwrite=True)
        assert system.cat_file(file) == b"mine"
        system.rm_file(file)
        assert checkpoint.read_card(url).info == {"note": 1}
    system.pipe_file(there[integrity.MANIFEST], b"{}")
    with pytest.raises(CheckpointError, match="whose files lie there is not known"):
        jp.save(url, small_network(note=2), overwrite=True)


def test_an_export_is_written_to_a_url_and_read_from_it(url, tmp_path, monkeypatch):
    pytest.importorskip("flatbuffers")
    monkeypatch.chdir(tmp_path)
    x = np.ones((1, 3), np.float32)
    folder = jp.export(small_network(), tmp_path / "served", x)
    assert jp.export(small_network(), url, x) == url
    with pytest.raises(CheckpointError, match="exists; pass overwrite=True"):
        jp.export(small_network(), url, x)
    assert {path.name for path in tmp_path.iterdir()} <= {"served", "bucket"}
    run = jp.load_export(f"{url}/")
    np.testing.assert_array_equal(run(x), jp.load_export(folder)(x))
    with pytest.raises(GraphError, match=f"^{url}/model.stablehlo takes .*given"):
        run(x[:, :2])


def test_a_network_of_other_arrays_is_named_by_its_url(url):
    net = models.build("segnet_basic", {"num_classes": 3, "widths": [4] * 4})
    x = np.ones((1, 16, 16, 3), np.float32)
    pruned = jp.prune(net.apply, net.init(jax.random.key(0), x), x, budget=jp.flops(1))
    other = {"name": "segnet_basic", "args": {"num_classes": 5, "widths": [4] * 4}}
    jp.save(url, pruned, network=other)
    with pytest.raises(CheckpointError, match=f"^{url}/jaxprune.json: its network = "):
        loaded = jp.load(url)
        loaded.apply(loaded.variables, x)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://nowhere", "manifest.sha256.json: missing"),
        ("nope://bucket/net", "Protocol not known: nope"),
        ("s3://bucket/net", "s3://bucket/net: "),
    ],
)
def test_urls_that_lead_nowhere(url, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(CheckpointError, match=said):
        jp.load(url, toygraphs.apply)


def test_without_fsspec_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(CheckpointError, match=r'pip install "jaxprune\[remote\]"'):
        jp.load("s3://bucket/net", toygraphs.apply)


def test_what_is_a_url_and_what_a_folder(tmp_path):
    for url in ("s3://a", "gs://a/b", "zip://x::file:///a.zip", "hf+v1://a"):
        assert remote.is_url(url)
    for folder in ("runs/final", "/a", "C:/a", "C:\\a", "a:b", tmp_path, "://a"):
        assert not remote.is_url(folder)


def test_a_folder_that_the_disk_has_no_room_for(url, monkeypatch):
    jp.save(url, small_network())
    monkeypatch.setattr(
        remote.shutil, "disk_usage", lambda _: type("", (), {"free": 9})
    )
    with pytest.raises(CheckpointError, match="has room for 9; set TMPDIR"):
        jp.load(url, toygraphs.apply)
