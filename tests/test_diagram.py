# SPDX-License-Identifier: Apache-2.0
"""The picture of a graph: the lines are the network's, the document is XML."""

import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import networks
import numpy as np

import jaxprune as jp
from jaxprune import cli
from jaxprune.models.unet import UNet
from jaxprune.report import diagram

SVG = "{http://www.w3.org/2000/svg}"


def unet() -> jp.Graph:
    net, images = UNet(3, widths=(4, 5, 6, 7, 8)), jnp.ones((1, 16, 16, 3))
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    return jp.trace(net.apply, variables, images)


def test_the_lines_are_the_weights_of_the_network():
    edges = diagram.dependencies(unet())
    chain = ["input"] + [f"down{s}_conv{i}" for s in range(1, 6) for i in (1, 2)]
    for s in range(4, 0, -1):
        chain += [f"up{s}_transpose", f"up{s}_conv1", f"up{s}_conv2"]
    want = set(zip(chain, [*chain[1:], "output"], strict=True))
    # The skip connections: concatenated with what comes up.
    want |= {(f"down{s}_conv2", f"up{s}_conv1") for s in range(1, 5)}
    assert set(edges) == want
    assert edges["input", "down1_conv1"] == [("params", "down1_conv1", "kernel")]


def test_a_document_with_a_box_a_group(tmp_path, capsys):
    graph = unet()
    root = ElementTree.fromstring(diagram.svg(graph, graph.full()))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert set(graph.groups) <= set(texts)
    assert "8 → 8 channels" in texts

    file = tmp_path / "unet.svg"
    code = cli.main(["inspect", "unet", "--size", "32x32", "--svg", str(file)])
    assert code == 0
    assert str(file) in capsys.readouterr().out
    assert ElementTree.parse(file).getroot().tag == f"{SVG}svg"
    missing = str(tmp_path / "no" / "unet.svg")
    assert cli.main(["inspect", "unet", "--svg", missing]) == 2
    assert missing in capsys.readouterr().err


def test_every_network_can_be_drawn():
    told = []
    for net in networks.LINEN:
        apply, variables, x = networks.linen(net, 0, (2, 8, 8, 3))
        graph = jp.trace(apply, variables, x)
        root = ElementTree.fromstring(diagram.svg(graph))
        boxes = root.findall(f"{SVG}g")
        assert len(boxes) == len(graph.groups)
        dashed = any(p.get("stroke-dasharray") for p in root.iter(f"{SVG}path"))
        told.append(any("dashed" in (t.text or "") for t in root.iter(f"{SVG}text")))
        assert told[-1] == dashed
        numbers = [float(r.get("width")) for r in root.iter(f"{SVG}rect") if r.get("x")]
        assert np.isfinite(numbers).all()
    assert set(told) == {True, False}
