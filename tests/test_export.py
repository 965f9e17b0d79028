# SPDX-License-Identifier: Apache-2.0
"""Exported programs: any batch and size, without jaxprune, damage found."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.base import CheckpointError, GraphError
from jaxprune.models.segnet import SegNet

pytest.importorskip("flatbuffers")

ALONE = """
import pathlib, sys
import jax, numpy as np
program = pathlib.Path(sys.argv[1], "model.stablehlo").read_bytes()
found = jax.export.deserialize(bytearray(program)).call(np.load(sys.argv[2]))
np.save(sys.argv[3], found)
assert not {"jaxprune", "flax", "orbax"} & set(sys.modules)
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
    run = jp.load_export(folder)
    for shape in ((1, 32, 32, 3), (3, 64, 32, 3)):
        want = pruned.apply(pruned.variables, images(*shape))
        np.testing.assert_allclose(run(images(*shape)), want, atol=1e-6)
    np.save(tmp_path / "x.npy", images(2, 32, 96, 3))
    arguments = [folder, tmp_path / "x.npy", tmp_path / "y.npy"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    want = pruned.apply(pruned.variables, images(2, 32, 96, 3))
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, atol=1e-6)
    card = json.loads((folder / "export.json").read_text())
    assert card["inputs"] == ["float32[b, 32*h, 32*w, 3]"]


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
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="mine exists; name another"):
        jp.export(pruned, tmp_path / "mine", x, overwrite=True)
    jp.export(pruned, tmp_path / "out", x)
    with pytest.raises(CheckpointError, match="out exists; pass overwrite=True"):
        jp.export(pruned, tmp_path / "out", x)
    jp.export(pruned, tmp_path / "out", x, overwrite=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        jp.load_export(tmp_path / "nowhere")
