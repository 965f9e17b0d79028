# SPDX-License-Identifier: Apache-2.0
"""The example server: right labels, refusals, and a short load without a failure."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import io
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxprune as jp

pytest.importorskip("flatbuffers")
EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply(variables: Any, images: Any) -> Any:
    """Class by class, how near a pixel is to red, green and blue."""
    return images @ variables["w"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[tuple[str, int, subprocess.Popen]]:
    folder = tmp_path_factory.mktemp("served") / "net"
    pruned = jp.Pruned(apply, {"w": jnp.eye(3)}, None, {})  # type: ignore[arg-type]
    x = jax.ShapeDtypeStruct((1, 12, 16, 3), np.float32)
    jp.export(pruned, folder, x, shapes=["b, 4*h, 4*w, 3"])
    arguments = [str(folder), "--size", "12x16", "--port", "0", "--batch", "3"]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(EXAMPLES / "serve.py"), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), url
        yield url, int(url.split(":")[2].split("/")[0]), process
        process.terminate()
        time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == 0


def ask(port: int, body: bytes, path: str = "/labels", **headers: str) -> Any:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    link.request("POST", path, body, headers)
    answer = link.getresponse()
    content = answer.read()
    link.close()
    return answer.status, content


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, format="PNG")
    return content.getvalue()


def test_labels_in_the_image_s_size(server: Any) -> None:
    _, port, _ = server
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    status, content = ask(port, png(image))
    assert status == 200
    labels = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(labels, image.argmax(-1))
    blocks = np.repeat(np.repeat(image, 3, 0), 3, 1)
    status, content = ask(port, png(blocks), Accept="application/x-npy")
    assert status == 200
    assert np.load(io.BytesIO(content)).shape == (36, 48)


def test_what_is_no_image_is_refused_and_the_server_lives(server: Any) -> None:
    _, port, _ = server
    assert ask(port, b"no image") == (400, b"the body is no image\n")
    assert ask(port, b"x", "/else")[0] == 404
    assert ask(port, b"")[0] == 413
    huge = io.BytesIO()
    Image.new("1", (5000, 5000)).save(huge, format="PNG")
    assert ask(port, huge.getvalue()) == (
        413,
        b"send images of at most 16777216 pixels\n",
    )
    assert ask(port, b"", **{"Content-Length": "99999999999"})[0] == 413
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    link.request("GET", "/health")
    assert link.getresponse().read() == b'{"waiting": 0}'
    link.close()


def test_a_short_load(server: Any) -> None:
    url, _, process = server
    load = example("load")
    ms: list[float] = []
    bad: list[str] = []
    body = load.picture("24x32", 0)
    load.client(url, body, time.monotonic() + 0.2, ms, bad)  # warm
    before = load.resident(process.pid) if Path("/proc/self/status").exists() else 0
    load.client(url, body, time.monotonic() + 2, ms, bad)
    assert len(ms) > 10 and not bad
    assert load.listens(url, 0) and not load.listens("http://127.0.0.1:9/labels", 0)
    if before:
        assert load.resident(process.pid) < before + 20  # MB


@pytest.fixture
def answering() -> Iterator[Any]:
    """Serve by a handler of one's own, in this process; its port."""
    with contextlib.ExitStack() as stack:

        def start(handler: Any) -> int:
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return server.server_port

        yield start


def test_who_finds_no_place_is_refused_before_the_image_is_held(answering: Any) -> None:
    serve = example("serve")
    answer: Future[np.ndarray] = Future()
    seen: list[np.ndarray] = []
    serve.Handler.batcher = types.SimpleNamespace(
        size=(2, 2),
        places=threading.BoundedSemaphore(1),
        submit=lambda image: (seen.append(image), answer)[1],
    )
    port = answering(serve.Handler)
    body = png(np.zeros((2, 2, 3), np.uint8))
    first: list[int] = []
    thread = threading.Thread(target=lambda: first.append(ask(port, body)[0]))
    thread.start()
    while not seen:
        time.sleep(0.01)
    assert ask(port, body + bytes(4 << 20)) == (503, b"64 requests wait already\n")
    assert len(seen) == 1
    answer.set_result(np.zeros((2, 2), np.uint8))
    thread.join()
    assert first == [200] and ask(port, body)[0] == 200


class Garbage(StreamRequestHandler):
    """Answers no HTTP."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"garbage\r\n\r\n")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "BadStatusLine"),
        (["--pid", "99999999"], "the server, process 99999999, is gone"),
        (["--seconds", "0"], "there was no request"),
    ],
)
def test_a_load_that_fails_ends_with_1(
    more: list[str], said: str, answering: Any, monkeypatch: Any, capsys: Any
) -> None:
    url = f"http://127.0.0.1:{answering(Garbage)}/labels"
    arguments = ["load.py", url, "--seconds", "0.3", "--clients", "2", *more]
    monkeypatch.setattr(sys, "argv", arguments)
    assert example("load").main() == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "manifest", "said"),
    [
        (["--size", "32"], "{}", "--size 32: write HEIGHTxWIDTH such as 120x160"),
        (["--batch", "0"], "{}", "--batch 0: at least 1"),
        ([], "{}", "manifest.sha256.json is damaged, or of no export"),
        ([], '{"files": {"model.stablehlo": [1, "a"]}}', "model.stablehlo is damaged"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], manifest: str, said: str, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "model.stablehlo").write_bytes(b"x")
    (tmp_path / "manifest.sha256.json").write_text(manifest)
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path), *arguments])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        example("serve").main()
    assert ended.value.code == 2
    (line,) = errors.getvalue().splitlines()
    assert line.startswith("error: ") and said in line
