# SPDX-License-Identifier: Apache-2.0
"""Exported programs: any batch and size, without jaxprune, damage found."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved import small_network

import jaxprune as jp
from jaxprune import cli, exits, integrity, models, onnx_export
from jaxprune.base import CheckpointError, ConfigError, DiskError, GraphError
from jaxprune.models.segnet import SegNet

pytest.importorskip("flatbuffers")

ALONE = """
import pathlib, sys
sys.modules.update(dict.fromkeys(["jaxprune", "flax", "optax", "orbax"]))  # blocked
import jax, numpy as np
program = pathlib.Path(sys.argv[1], "model.stablehlo").read_bytes()
found = jax.export.deserialize(bytearray(program)).call(np.load(sys.argv[2]))
np.save(sys.argv[3], found)
"""


@pytest.fixture(scope="module")
def pruned() -> jp.Pruned:
    net = SegNet(3, widths=(4, 4, 8, 8, 8))
    x = jnp.ones((1, 32, 32, 3))
    variables = net.init(jax.random.key(0), x)
    return jp.prune(net.apply, variables, x, budget=jp.flops(0.5))


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


def test_any_batch_and_size_and_with_jax_alone(pruned: Any, tmp_path: Any) -> None:
    folder = jp.export(
        pruned, tmp_path / "out", images(1, 32, 32, 3), shapes=["b, 32*h, 32*w, 3"]
    )
    run, apply = jp.load_export(folder), jax.jit(pruned.apply)
    for shape in ((1, 32, 32, 3), (3, 64, 32, 3)):
        want = apply(pruned.variables, images(*shape))
        np.testing.assert_allclose(run(images(*shape)), want, atol=1e-6)
    np.save(tmp_path / "x.npy", images(2, 32, 96, 3))
    arguments = [folder, tmp_path / "x.npy", tmp_path / "y.npy"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    want = apply(pruned.variables, images(2, 32, 96, 3))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, atol=1e-6)
    card = json.loads((folder / "export.json").read_text())
    assert card["inputs"] == ["float32[b, 32*h, 32*w, 3]"]
    for wrong in (images(1, 40, 32, 3), images(1, 32, 32, 4), images(32, 32, 3)):
        said = r"takes .*\[b, 32\*h, 32\*w, 3\].* given .*\]: .*args\[0\]"
        with pytest.raises(GraphError, match=said):
            run(wrong)


@pytest.mark.parametrize(
    ("name", "widths", "depths"),
    [
        ("fcn", (4, 4, 4, 4, 4, 8, 8), None),
        ("deeplab", (4, 8, 8, 8, 8, 4, 4, 4), (1, 1, 1, 1)),
        ("refinenet", (4, 8, 8, 8, 8, 8, 4, 4, 4), (1, 1, 1, 1)),
        ("unet", (4, 4, 4, 4, 4), None),
    ],
)
def test_sizes_of_no_multiple(
    name: str, widths: Any, depths: Any, tmp_path: Any
) -> None:
    """Pooling pads by symbols, and scalars are told from images of any size."""
    more = {} if depths is None else {"depths": depths}
    net = models.build(name, {"num_classes": 3, "widths": widths, **more})
    size = (64, 64)
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = models.init(net, jax.random.key(0), size)
    pruned = jp.prune(net.apply, variables, x, budget=jp.flops(0.5), train=False)
    texts = ["b, 16*h, 16*w, 3" if name == "unet" else "b, h, w, 3"]
    folder = jp.export(pruned, tmp_path / "out", x, shapes=texts, train=False)
    some = images(2, 48, 80, 3) if name == "unet" else images(2, 37, 50, 3)
    want = np.asarray(pruned.apply(pruned.variables, some, train=False))
    got = np.asarray(jp.load_export(folder)(some))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_what_asks_for_a_symbols_value(pruned: Any, tmp_path: Any) -> None:
    def choosy(v: Any, x: Any) -> Any:
        return pruned.apply(v, x if x.shape[1] > 40 else 2 * x)

    with pytest.raises(GraphError, match="export with shapes.*'h' > '40'"):
        asks = pruned._replace(apply=choosy)
        jp.export(asks, tmp_path / "x", images(1, 64, 64, 3), shapes=["b, h, 64, 3"])
    assert not (tmp_path / "x").exists()


def test_folded_and_in_int8(pruned: Any, tmp_path: Any) -> None:
    x = images(2, 32, 32, 3)
    folded = jp.fold_batch_norm(pruned.apply, pruned.variables, x)
    small = jp.quantize_weights(folded.apply, folded.variables, x)
    coarse = jax.tree.map(
        lambda a: (
            np.asarray(a["int8"]) * np.asarray(a["scale"]) if isinstance(a, dict) else a
        ),
        small.variables,
        is_leaf=lambda a: isinstance(a, dict) and "int8" in a,
    )
    run = jax.jit(folded.apply)
    paths = {}
    for weights, want in (
        ("float", jax.jit(pruned.apply)(pruned.variables, x)),
        ("int8", run(coarse, x)),
    ):
        paths[weights] = jp.export(
            *(pruned, tmp_path / weights, x),
            fold=True,
            weights=weights,  # type: ignore[arg-type]
            shapes=["b, 32*h, 32*w, 3"],
            constraints=["b <= 4"],
        )
        got = np.asarray(jp.load_export(paths[weights])(x))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    cards = {n: json.loads((p / "export.json").read_text()) for n, p in paths.items()}
    few = cards["int8"]["weight_bytes"]
    assert cards["int8"]["weights"] == "int8"
    assert few < 0.6 * cards["float"]["weight_bytes"]  # tiny: scales and biases count
    with pytest.raises(GraphError, match="takes"):
        jp.load_export(paths["int8"])(images(5, 32, 32, 3))
    with pytest.raises(ConfigError, match="'float' or 'int8'"):
        jp.export(pruned, tmp_path / "x", x, weights="int4")  # type: ignore[arg-type]


def test_int8_is_the_nearest_by_channel() -> None:
    rng = np.random.default_rng(0)
    v = {"w": rng.normal(size=(5, 7)) * np.logspace(-3, 3, 7), "b": rng.normal(size=7)}
    v["w"][:, 3] = 0
    v["conv"] = rng.normal(size=(3, 3, 7, 4))
    v = {name: a.astype(np.float32) for name, a in v.items()}

    def apply(v: Any, x: Any) -> Any:
        y = jnp.tanh(x @ v["w"] + v["b"])
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            y, v["conv"], (1, 1), "SAME", dimension_numbers=dims
        )

    x = rng.normal(size=(2, 6, 6, 5)).astype(np.float32)
    small = jp.quantize_weights(apply, v, x)
    assert small.before == 4 * (35 + 7 + 252)
    assert small.bytes == 35 + 252 + 4 * (7 + 7 + 4)
    for name, rest in (("w", 0), ("conv", (0, 1, 2))):
        q, scale = small.variables[name]["int8"], small.variables[name]["scale"]
        assert q.dtype == jnp.int8 and int(jnp.abs(q).max()) == 127
        off = np.abs(np.asarray(q, np.float64) * np.asarray(scale) - v[name])
        bound = np.abs(v[name]).max(axis=rest, keepdims=True) / 254
        assert (off <= bound * (1 + 1e-6)).all()
        assert small.error[name] == pytest.approx(off.max(), rel=1e-5)
    whole = {
        n: a["int8"] * a["scale"] if n != "b" else a for n, a in small.variables.items()
    }
    np.testing.assert_allclose(
        small.apply(small.variables, x), apply(whole, x), rtol=1e-6
    )
    with pytest.raises(GraphError, match="reads a variable"):
        jp.quantize_weights(lambda v, x: x * v["b"], {"b": v["b"]}, x[..., :1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_error_of_int8_is_that_of_the_kernel_as_it_is_applied(dtype: Any) -> None:
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(dtype)
    w[:, 3] = 1e-6  # its scale is 0 in float16

    def apply(v: Any, x: Any) -> Any:
        return x @ v["a"]["w"]

    eye = np.eye(64, dtype=dtype)
    small = jp.quantize_weights(apply, {"a": {"w": w}}, eye)
    applied = np.asarray(small.apply(small.variables, eye), np.float64)
    assert small.error["a/w"] == np.abs(applied - w.astype(np.float64)).max()
    for harm in (np.nan, np.inf):
        w[5, 5] = harm
        with pytest.raises(GraphError, match="a/w holds NaN or infinity"):
            jp.quantize_weights(apply, {"a": {"w": w}}, eye)


def test_fold_that_folds_nothing_is_said(pruned: Any, tmp_path: Any) -> None:
    x = images(1, 32, 32, 3)

    def training(v: Any, x: Any, train: bool = True) -> Any:
        net = SegNet(3, widths=(4, 4, 8, 8, 8))
        more = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(0)}}
        return net.apply(v, x, train=True, **more)[0] if train else net.apply(v, x)

    def behind_relu(v: Any, x: Any) -> Any:
        return jax.nn.relu(x @ v["w"]) * jax.lax.rsqrt(v["scale"])

    net = SegNet(3, widths=(4, 4, 8, 8, 8))
    dense = net.init(jax.random.key(0), x)
    plain = {"w": jnp.ones((3, 4)), "scale": jnp.ones(4)}
    for apply, variables, said in (
        (training, dense, r"no batch norm by running statistics.*pass train=False"),
        (lambda v, x: x @ v["w"], plain, "no batch norm.*export without fold"),
        (behind_relu, plain, r"scale is left .it does .*; export without it"),
    ):
        given = pruned._replace(apply=apply, variables=variables)
        with pytest.raises(ConfigError, match=f"fold=True folds nothing: .*{said}"):
            jp.export(given, tmp_path / "out", x, fold=True)
    given = pruned._replace(apply=training, variables=dense)
    path = jp.export(given, tmp_path / "a", x, fold=True, train=False)
    thin = jp.fold_batch_norm(training, dense, x, train=False)
    again = given._replace(apply=thin.apply, variables=thin.variables)
    twice = jp.export(again, tmp_path / "b", x, fold=True, train=False)
    want = np.asarray(jp.load_export(path)(x))
    np.testing.assert_array_equal(jp.load_export(twice)(x), want)


def test_the_command_writes_what_python_does(
    pruned: Any, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    network = {"name": "segnet", "args": {"num_classes": 3, "widths": [4, 4, 8, 8, 8]}}
    net, out = tmp_path / "net", tmp_path / "out"
    jp.save(net, pruned, network=network, size=[32, 32])
    argv = ["export", str(net), "--out", str(out), "--fold", "--int8"]
    argv += ["--shapes", "b, 32*h, 32*w, 3", "--platforms", "cpu, cuda"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == f"{out}\n"
    card = json.loads((out / "export.json").read_text())
    told = [card[name] for name in ("inputs", "platforms", "weights")]
    assert told == [["float32[b, 32*h, 32*w, 3]"], ["cpu", "cuda"], "int8"]
    x = images(2, 32, 64, 3)
    want = np.asarray(jax.jit(pruned.apply)(pruned.variables, x))
    assert np.abs(np.asarray(jp.load_export(out)(x)) - want).max() < 0.1
    assert cli.main(argv) == exits.BAD_INPUT
    assert "out exists; pass overwrite=True (--overwrite)" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite"]) == 0
    capsys.readouterr()

    plain = ["export", str(net), "--out", str(tmp_path / "one"), "--batch", "2"]
    assert cli.main([*plain, "--size", "32x64"]) == 0
    found = jp.load_export(tmp_path / "one")(x)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())

    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    file = tmp_path / "net.onnx"
    argv = ["export", str(net), "--out", str(file), "--onnx", "--fold"]
    assert cli.main(argv) == exits.BAD_INPUT
    assert "pip install 'jaxprune[onnx]'" in capsys.readouterr().err


def test_a_platform_that_is_not_the_program_s_is_said(tmp_path: Any) -> None:
    x = np.ones((2, 3), np.float32)
    folder = jp.export(small_network(), tmp_path / "out", x, platforms=["cuda"])
    said = "takes float32.2, 3., and was given float32.2, 3.: .*exported for platforms"
    with pytest.raises(GraphError, match=f"out/model.stablehlo {said} .*cuda"):
        jp.load_export(folder)(x)


def test_info_is_kept_as_save_keeps_it(tmp_path: Any) -> None:
    x, odd = np.ones((1, 3), np.float32), small_network(miou=np.float32(0.5))
    card = jp.export(odd, tmp_path / "out", x) / "export.json"
    assert json.loads(card.read_text())["info"] == {"miou": 0.5}
    with pytest.raises(CheckpointError, match=r"info\['f'\] can't be kept as JSON"):
        jp.export(small_network(f=print), tmp_path / "none", x)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_fails_keeps_no_room(tmp_path: Any, monkeypatch: Any) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    x = np.ones((1, 3), np.float32)
    monkeypatch.setattr(integrity, "_seal", full)
    for write in (
        lambda: jp.save(tmp_path / "net", small_network()),
        lambda: jp.export(small_network(), tmp_path / "net", x),
    ):
        with pytest.raises(DiskError, match="net: cannot be written .*free some space"):
            write()
        assert not list(tmp_path.iterdir())


def test_onnx_says_what_it_needs(pruned: Any, tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(CheckpointError, match=r"pip install 'jaxprune\[onnx\]'"):
        jp.export_onnx(pruned, tmp_path / "net.onnx", images(1, 32, 32, 3))
    (tmp_path / "net.onnx").touch()
    with pytest.raises(CheckpointError, match="net.onnx exists"):
        jp.export_onnx(pruned, tmp_path / "net.onnx", images(1, 32, 32, 3))


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_onnx_answers_as_jax_does(pruned: Any, tmp_path: Any) -> None:
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    folded = jp.fold_batch_norm(pruned.apply, pruned.variables, images(1, 32, 32, 3))
    thin = pruned._replace(apply=folded.apply, variables=folded.variables)
    file = jp.export_onnx(thin, tmp_path / "net.onnx", images(2, 32, 32, 3))
    session = runtime.InferenceSession(file)
    x = images(2, 32, 32, 3)
    (got,) = session.run(None, {session.get_inputs()[0].name: x})
    want = np.asarray(jax.jit(pruned.apply)(pruned.variables, x))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()

    def calls_back(v: Any, x: Any) -> Any:
        return jax.pure_callback(np.sqrt, x, x)

    def undefined(v: Any, x: Any) -> Any:
        return jnp.linalg.cholesky(x)  # of a matrix that has none

    for strange, said in (
        (calls_back, "does not go through jax2onnx"),
        (undefined, "answers otherwise than in JAX"),
    ):
        with pytest.raises(GraphError, match=said):
            square = jax.ShapeDtypeStruct((2, 2), np.float32)
            jp.export_onnx(thin._replace(apply=strange), tmp_path / "no.onnx", square)
    assert not (tmp_path / "no.onnx").exists()


def test_onnx_is_checked_on_whole_numbers_too() -> None:
    for dtype, least in ((np.uint8, 8), (np.int32, 8), (bool, 2), (np.float32, 90)):
        struct = jax.ShapeDtypeStruct((10, 10), dtype)
        drawn = onnx_export._drawn(np.random.default_rng(0), struct)
        assert drawn.dtype == dtype and drawn.shape == (10, 10)
        assert len(np.unique(drawn)) >= least and drawn.max() < 8


def test_every_damage_is_found(pruned: Any, tmp_path: Any) -> None:
    folder = jp.export(pruned, tmp_path / "out", images(2, 32, 32, 3))
    file = folder / "model.stablehlo"
    whole = file.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="model.stablehlo: damaged"):
            jp.load_export(folder)
    file.write_bytes(whole)
    (folder / "export.json").unlink()
    with pytest.raises(CheckpointError, match="export.json: damaged"):
        jp.load_export(folder)


def test_what_cannot_be_is_said(pruned: Any, tmp_path: Any) -> None:
    x = images(1, 32, 32, 3)
    for shapes, match in (
        (["b, 32, 32, 4"], "export with shapes"),
        (["b, h, w, 3"], "export with shapes.*"),
        (["b, 32, 32, 3", "b"], "2 shapes for 1 inputs"),
    ):
        with pytest.raises(GraphError, match=match):
            jp.export(pruned, tmp_path / "out", x, shapes=shapes)
    for options, match in (
        ({"platforms": ["foo"]}, r"platforms=\['foo'\].* cpu, cuda, rocm, tpu"),
        ({"platforms": "cpu"}, r"platforms='cpu'.*write a list"),
        ({"platforms": []}, r"platforms=\[\]"),
        ({"shapes": "b, 32, 32, 3"}, r"shapes='b, 32, 32, 3'\): write a list, \['b, "),
        ({"constraints": "b <= 4"}, r"constraints='b <= 4'\): write a list"),
    ):
        with pytest.raises(ConfigError, match=match):
            jp.export(pruned, tmp_path / "out", x, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="mine exists; name another"):
        jp.export(pruned, tmp_path / "mine", x, overwrite=True)
    jp.export(pruned, tmp_path / "out", x)
    with pytest.raises(CheckpointError, match="out exists; pass overwrite=True"):
        jp.export(pruned, tmp_path / "out", x)
    jp.export(pruned, tmp_path / "out", x, overwrite=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="out/notes.txt: not jaxprune's"):
        jp.export(pruned, tmp_path / "out", x, overwrite=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        jp.load_export(tmp_path / "nowhere")
