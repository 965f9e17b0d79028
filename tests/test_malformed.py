# SPDX-License-Identifier: Apache-2.0
"""Every input of `malformed.py` ends in an error of jaxprune that names it.

By the command: exit code 2, one line, and the work folder is what it was.
"""

import gc
import json
import os
import shutil
import types
import zipfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import malformed
import numpy as np
import pytest
import saved
import toygraphs
import workfolder

import jaxprune as jp
from jaxprune import checkpoint, cli, data, integrity, models, path_io
from jaxprune.base import (
    CheckpointError,
    ConfigError,
    Cost,
    Frozen,
    Graph,
    JaxpruneError,
)
from jaxprune.pruned import Pruned
from jaxprune.steps import Path as Walked
from jaxprune.steps import Step
from jaxprune.train import compare, loop
from jaxprune.train import folder as folders
from jaxprune.train.config import Config
from jaxprune.train.progress import Progress

pytest.importorskip("PIL")
import malformed_data  # noqa: E402

NET = {"name": "segnet_basic", "args": {"num_classes": 3, "widths": [4] * 4}}
CLASSES = {"names": ["a", "b", "c"], "colors": [[9, 9, 9]] * 3, "ignore": 255}
STATE = {"n": 7, "w": np.arange(6, dtype=np.float32).reshape(2, 3)}
CONFIG = """
from jaxprune import train
def get_config():
    data = train.Data("synthetic", size=(16, 16), counts=(4, 2, 2))
    return train.Config(network=train.Network("segnet_basic"), data=data)
"""


def shipped(folder: Path) -> Graph:
    """A shipped network that nothing was cut from, saved."""
    net = models.build(NET["name"], NET["args"])
    variables = models.init(net, jax.random.key(0), (16, 16))
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    graph = jp.trace(net.apply, variables, images, train=False)
    pruned = Pruned(net.apply, variables, graph, graph.full())
    jp.save(folder, pruned, network=NET, classes=CLASSES, size=[16, 16])
    return graph


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A good one of everything."""
    root = tmp_path_factory.mktemp("world")
    work = workfolder.write(root / "work")
    graph = shipped(work / "final")
    (work / "graph.json").write_text(graph.to_json())
    steps = [Step(0.0, graph.full(), Cost(9, 9, 9), 0.5, 0.1)] * 5
    Walked(tuple(steps)).save(work / "path" / "1.jsonl")
    from jaxprune.train.config import to_json

    (work / "config.json").write_text(to_json(Config()))
    jp.save(root / "net", saved.small_network())
    checkpoint.open_store(root / "store").save(3, STATE)
    (root / "config.py").write_text(CONFIG)
    (root / "in.png").write_bytes(malformed_data.RGB)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Calls the command; checks the code, the one line, and what it names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXPRUNE_CAMVID", raising=False)
    monkeypatch.setattr("jaxprune.train.stages._stages", None)  # nothing gets so far

    def call(argv, said, *folders):
        before = [contents(folder) for folder in folders]
        try:
            code = cli.main([str(word) for word in argv])
        except SystemExit as error:  # argparse's own way
            code = error.code
        shown = capsys.readouterr().err
        assert code == 2, shown
        assert said in shown and "Traceback" not in shown
        assert shown.startswith("usage:") or len(shown.splitlines()) == 1
        assert [contents(folder) for folder in folders] == before

    return call


def put(record, place: str, value) -> None:
    """Set what lies at 'a.0.b', or delete it where the value is GONE."""
    *way, last = [int(p) if p.isdecimal() else p for p in place.split(".")]
    for part in way:
        record = record[part]
    if value is malformed.GONE:
        del record[last]
    else:
        record[last] = value


def spoil(text: str, fault) -> bytes:
    """JSON text with a fault of the tables put into it."""
    if isinstance(fault, bytes):
        return fault
    if isinstance(fault, str):
        return (text[: len(text) // 2] if fault == "half" else fault).encode()
    record = json.loads(text)
    for place, value in fault.items():
        put(record, place, value)
    return json.dumps(record).encode()


def resealed(folder: Path, copy: Path, name: str, fault) -> Path:
    """A copy of a saved folder with a fault in one file, and right checksums."""
    shutil.copytree(folder, copy)
    (copy / name).write_bytes(spoil((copy / name).read_text("utf-8"), fault))
    (copy / integrity.MANIFEST).unlink()
    integrity._seal(copy)
    return copy


def names(table):
    return pytest.mark.parametrize(
        "case", table, ids=[f"{i}" for i in range(len(table))]
    )


def test_there_are_as_many_as_the_documents_say():
    tables = [
        table
        for module in (malformed, malformed_data)
        for name, table in vars(module).items()
        if name.isupper() and name[0] != "_" and isinstance(table, list)
    ]
    assert sum(map(len, tables)) >= 510


@names(malformed.OVERRIDES)
def test_overrides(world, tmp_path, refused, case):
    text, said = case
    argv = ["run", world / "config.py", "--workdir", tmp_path / "w", "--set", text]
    refused(argv, said)
    assert not (tmp_path / "w").exists()


@names(malformed.CONFIGS)
def test_configs(tmp_path, refused, case):
    _, text, said = case
    file = tmp_path / "odd.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    argv = ["run", file, "--workdir", tmp_path / "w"]
    refused(argv, "odd.py")
    refused(argv, said)
    assert not (tmp_path / "w").exists()


@names(malformed.FLAGS)
def test_flags(world, tmp_path, monkeypatch, refused, case):
    argv, said = case
    monkeypatch.chdir(tmp_path)
    stands = {"WORK": "work", "IMAGE": "in.png", "CONFIG": "config.py"}
    for word, name in stands.items():
        argv = [a.replace(word, str(world / name)) for a in argv]
    refused(argv, said, world / "work")
    assert os.listdir(tmp_path) in ([], ["cache"])


@names(malformed_data.IMAGES)
def test_images(world, tmp_path, refused, case):
    _, name, content = case
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    argv = ["predict", world / "work", world / "in.png", tmp_path / name]
    refused([*argv, "--out", out], str(tmp_path / name))
    assert not out.exists()


@names(malformed_data.FOLDERS)
def test_folders(tmp_path, case):
    _, harm, said = case
    malformed_data.write_set(tmp_path / "set")
    harm(tmp_path / "set")
    with pytest.raises(JaxpruneError) as found:
        data.load("folder", tmp_path / "set", "train", cache=tmp_path / "cache")
    assert said in str(found.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set that TFDS has prepared."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from jaxprune.data import camvid_tfds

    root = tmp_path_factory.mktemp("tfds")
    malformed_data.write_set(root / "camvid")
    builder = camvid_tfds.CamVid(data_dir=root / "sets", file_format="array_record")
    how = tfds.download.DownloadConfig(manual_dir=root / "camvid")
    builder.download_and_prepare(download_config=how)
    (root / "sets" / "camvid").rename(root / "sets" / "streets")
    return root / "sets"


@names(malformed_data.TFDS)
def test_tfds(prepared, tmp_path, case):
    _, harm = case
    shutil.copytree(prepared, tmp_path / "sets")
    (info,) = (tmp_path / "sets").rglob("dataset_info.json")
    harm(info.parent)
    with pytest.raises(JaxpruneError) as found:
        data.load("tfds:streets", tmp_path / "sets", cache=tmp_path / "cache")
    assert str(tmp_path / "sets" / "streets") in str(found.value)
    assert not list((tmp_path / "cache").glob("*"))


@pytest.fixture(scope="module")
def segnet():
    net = models.SegNet(3, widths=(1,) * 5)
    images = jnp.zeros((1, 32, 32, 3))
    return net, jax.eval_shape(net.init, jax.random.key(0), images)


@names(malformed_data.ENCODERS)
def test_encoders(segnet, tmp_path, case):
    _, name, content = case
    net, variables = segnet
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(JaxpruneError) as found:
        models.import_encoder(net, variables, tmp_path / name)
    assert str(tmp_path / name) in str(found.value)


@names(malformed.GRAPHS)
def test_graphs(world, tmp_path, refused, case):
    _, fault = case
    graph = toygraphs.chain(4, 6)
    frozen = (Frozen(("params", "l2", "bias"), 0, 2, "x"),)
    text = Graph(graph.groups, frozen, graph.leaves, graph.terms).to_json()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "graph.json").write_bytes(spoil(text, fault))
    refused(["inspect", tmp_path], str(tmp_path / "graph.json"), tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@names(malformed.NETWORKS)
def test_networks(world, tmp_path, case):
    _, fault = case
    folder = resealed(world / "net", tmp_path / "net", "jaxprune.json", fault)
    with pytest.raises(JaxpruneError) as found:
        jp.load(folder, toygraphs.apply)
    assert str(folder) in str(found.value)
    gc.collect()  # what Orbax leaves where it fails on its way, while nobody listens


@names(malformed.INFOS)
def test_infos(world, tmp_path, refused, case):
    _, fault = case
    fault = {f"info.{place}": value for place, value in fault.items()}
    name, folder = "jaxprune.json", tmp_path / "net"
    resealed(world / "work" / "final", folder, name, fault)
    argv = ["predict", folder, world / "in.png", "--out", tmp_path / "out"]
    refused(argv, "", folder)
    assert not list((tmp_path / "out").glob("*"))
    if "classes" not in str(list(fault)):  # of which no clock knows
        refused(["bench", folder], "", folder)


@names(malformed.STEPS)
def test_steps(world, tmp_path, case):
    _, fault = case
    resealed(world / "store" / "3", tmp_path / "store" / "3", "step.json", fault)
    with pytest.raises(JaxpruneError) as found:
        checkpoint.open_store(tmp_path / "store").restore(3, STATE)
    assert str(tmp_path / "store" / "3") in str(found.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("flatbuffers")
    folder = tmp_path_factory.mktemp("export") / "served"
    return jp.export(saved.small_network(), folder, np.ones((1, 3), np.float32))


@names(malformed.EXPORTS)
def test_exports(exported, tmp_path, case):
    folder = resealed(exported, tmp_path / "served", "export.json", case[1])
    with pytest.raises(JaxpruneError) as found:
        jp.load_export(folder)
    assert str(folder) in str(found.value)


@pytest.mark.parametrize(
    "harm",
    [
        lambda whole: b"",
        lambda whole: b"program",
        lambda whole: whole[:40],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"\xff" * 4 + whole[4:],
        lambda whole: bytes(len(whole)),
        lambda whole: whole + b"xla_ffi_python_cpu_callback",
    ],
)
def test_programs(exported, tmp_path, harm):
    folder, file = tmp_path / "served", tmp_path / "served" / "model.stablehlo"
    shutil.copytree(exported, folder)
    file.write_bytes(harm(file.read_bytes()))
    (folder / integrity.MANIFEST).unlink()
    integrity._seal(folder)
    with pytest.raises(JaxpruneError) as found:
        jp.load_export(folder)
    assert str(file) in str(found.value)


@names(malformed.KEEPS)
def test_keeps(case):
    _, keep, said = case
    graph = toygraphs.chain(4, 6)
    variables = toygraphs.variables(graph)
    for call in (
        lambda: jp.shrink(graph, keep, variables),
        lambda: jp.mask(graph, keep, variables),
        lambda: jp.cost(graph, keep),
        lambda: jp.slim(toygraphs.apply, graph, keep),
        lambda: jp.compose(graph.full(), keep),
    ):
        with pytest.raises(JaxpruneError) as found:
            call()
        assert said in str(found.value)


@names(malformed.PATHS)
def test_paths(world, tmp_path, case):
    _, fault, said = case
    lines = (world / "work" / "path" / "1.jsonl").read_text().splitlines(True)
    text = spoil(lines[1].partition(" ")[2], fault).decode()
    lines[1] = f"{zlib.crc32(text.encode()):08x} {text}\n"
    file = tmp_path / "1.jsonl"
    file.write_text("".join(lines))
    with pytest.raises(JaxpruneError) as found:
        Walked.load(file)
    assert str(file) in str(found.value) and said in str(found.value)


@names(malformed.REPORTS)
def test_reports(world, tmp_path, refused, case):
    name, content, said = case
    work = tmp_path / "work"
    shutil.copytree(world / "work", work)
    content = content if isinstance(content, bytes) else content.encode()
    (work / name).write_bytes(content)
    refused(["report", work], said, work)


@names(malformed.EVALUATIONS)
def test_evaluations(tmp_path, case):
    _, fault = case
    work = workfolder.write(tmp_path / "work")
    file, progress = work / "evaluation.json", Progress(work, speaks=False)
    job = types.SimpleNamespace(workdir=work)
    assert compare.evaluate_stage(job, {}, progress) == workfolder.evaluation()
    file.write_bytes(spoil(file.read_text(), fault))
    with pytest.raises(CheckpointError, match=f"{file} is damaged .*; delete it"):
        compare.evaluate_stage(job, {}, progress)


@names(malformed.ROWS)
def test_lines_that_are_no_rows_are_dropped(tmp_path, case):
    good = b'{"stage": "train", "step": 3}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + case + b"\n" + good)
    Progress(tmp_path).rewind("train", 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == 2 * good
    Progress(tmp_path).rewind("train", 2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    for call in (
        lambda: folders.check_free(Config(), tmp_path),
        lambda: folders.read_config(tmp_path),
    ):
        with pytest.raises(ConfigError, match="config.json is damaged .*utf-8"):
            call()


def test_a_graph_that_is_no_text_hides_no_loss(tmp_path):
    (tmp_path / "graph.json").write_bytes(b"\xff\xfe{}")
    job = types.SimpleNamespace(workdir=tmp_path)
    assert loop._whose(job, "l0/kernel") == ""
    (tmp_path / "graph.json").write_text(toygraphs.chain(4, 6).to_json())
    assert loop._whose(job, "l0/kernel") == " (of the group l0)"


def test_an_array_that_a_path_keeps(tmp_path):
    graph = toygraphs.chain(4, 6)
    variables = toygraphs.variables(graph)
    step = Step(0.0, graph.full(), Cost(9, 9, 9), 0.5, 0.1)
    path_io.save_variables(graph, tmp_path / "p", 0, step, variables)
    file = tmp_path / "p.0.npz"
    good = file.read_bytes()
    path_io.load_variables(graph, tmp_path / "p", 0, step, variables)
    table = malformed_data.ENCODERS
    for content in [c for _, n, c in table if n == "x.npz"] + [good[:-40], None]:
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(JaxpruneError) as found:
            path_io.load_variables(graph, tmp_path / "p", 0, step, variables)
        assert str(file) in str(found.value)


@pytest.mark.parametrize("kind", ["out", "in"])
def test_links_are_not_followed(world, tmp_path, kind):
    folder = shutil.copytree(world / "net", tmp_path / "net")
    graph = folder / "graph.json"
    aside = (tmp_path if kind == "out" else folder / "arrays") / "aside.json"
    graph.rename(aside)
    graph.symlink_to(aside)
    with pytest.raises(JaxpruneError, match="graph.json: a link; .*cp -rL"):
        jp.load(folder, toygraphs.apply)
    graph.unlink()
    os.mkfifo(graph)
    with pytest.raises(JaxpruneError, match="graph.json: no ordinary file"):
        jp.load(folder, toygraphs.apply)


def test_nothing_is_unpacked_where_a_checkpoint_says(tmp_path):
    """An archive's names name arrays alone."""
    from jaxprune import formats

    content = malformed_data.claims(malformed_data._header(), bytes(8), "../../w.npy")
    (tmp_path / "x.npz").write_bytes(content)
    assert list(formats.read_npz(tmp_path / "x.npz")) == ["../../w"]
    assert os.listdir(tmp_path) == ["x.npz"]
    with pytest.raises(ValueError, match="claim 136 bytes, 99 are allowed"):
        formats.read_npz(tmp_path / "x.npz", most=99)
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(tmp_path / "y.npz", "w", method) as archive:
            archive.writestr("w.npy", malformed_data.npz(w=np.ones(99)))
        whole = (tmp_path / "y.npz").read_bytes()
        for at in (60, 70, len(whole) // 2):
            harmed = whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :]
            (tmp_path / "y.npz").write_bytes(harmed)
            with pytest.raises(ValueError, match="as NumPy does not pack"):
                formats.read_npz(tmp_path / "y.npz")
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("../../w.npy", b"")
    with pytest.raises(ValueError, match="there twice"):
        formats.read_npz(tmp_path / "x.npz")
