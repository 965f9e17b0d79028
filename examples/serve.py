# SPDX-License-Identifier: Apache-2.0
"""A minimal HTTP server of a network that `jaxprune.export` wrote.

    python examples/serve.py EXPORT --port 8000 --size 120x160
    curl --data-binary @street.png localhost:8000/labels > labels.png
    curl --data-binary @street.png -H 'Accept: application/x-npy' localhost:8000/labels

It needs JAX, NumPy and Pillow, and nothing of jaxprune: the program runs by itself. The
export's shapes are best 'b, 32*h, 32*w, 3', or those of `--size` with a free batch 'b'.
One thread runs the network; requests that wait meanwhile go together, up to `--batch`
at once, always filled up to that many, so that there is one compilation. A request
takes one of 64 places before its image is read, and others are answered 503: that many
images of at most 16 million pixels are all that is held.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import queue
import re
import signal
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from PIL import Image

MOST_BYTES = 16 << 20
MOST_PIXELS = 16 << 20
MOST_WAITING = 64
SECONDS = 30


def load(folder: Path) -> Any:
    """The program, after its checksum; ValueError where a file is damaged."""
    content = (folder / "model.stablehlo").read_bytes()
    manifest = folder / "manifest.sha256.json"
    try:
        _, listed = json.loads(manifest.read_text())["files"]["model.stablehlo"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{manifest} is damaged, or of no export") from error
    if hashlib.sha256(content).hexdigest() != listed:
        raise ValueError(f"{folder / 'model.stablehlo'} is damaged")
    return jax.jit(jax.export.deserialize(bytearray(content)).call)


class Batcher:
    """One thread that runs what waits in a queue, in batches."""

    def __init__(self, program: Any, size: tuple[int, int], batch: int) -> None:
        self.program, self.size, self.batch = program, size, batch
        self.waiting: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        self.places = threading.BoundedSemaphore(MOST_WAITING)
        self.labels([np.zeros((*size, 3), np.uint8)])  # compiles
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def labels(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8[n, H, W] of n images uint8[H, W, 3]."""
        some = images + images[:1] * (self.batch - len(images))
        logits = self.program(np.stack(some).astype(np.float32) / 255)
        return np.asarray(logits).argmax(-1).astype(np.uint8)[: len(images)]

    def submit(self, image: np.ndarray) -> Future[np.ndarray]:
        """The labels to come; queue.Full where too many wait already."""
        answer: Future[np.ndarray] = Future()
        self.waiting.put_nowait((image, answer))
        return answer

    def _run(self) -> None:
        while True:
            some = [self.waiting.get()]
            while len(some) < self.batch and not self.waiting.empty():
                some.append(self.waiting.get())
            try:
                found = self.labels([image for image, _ in some])
                for (_, answer), labels in zip(some, found, strict=True):
                    answer.set_result(labels)
            except Exception as error:  # the thread must live; the callers are told
                for _, answer in some:
                    answer.set_exception(error)


class Handler(BaseHTTPRequestHandler):
    """POST /labels: an image in, a PNG of class numbers (or .npy) out. GET /health."""

    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    batcher: Batcher

    def do_GET(self) -> None:  # noqa: N802
        """Whether the server is up, and how many requests wait."""
        waiting = self.batcher.waiting.qsize()
        self._answer(200, "application/json", json.dumps({"waiting": waiting}).encode())

    def do_POST(self) -> None:  # noqa: N802
        """The labels of an image, in its own size."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or not 0 < int(length) <= MOST_BYTES:
            self.close_connection = True
            self._refuse(413, f"send 1 to {MOST_BYTES} bytes with a Content-Length")
            return
        if not self.batcher.places.acquire(blocking=False):
            self._skip(int(length))
            self._refuse(503, f"{MOST_WAITING} requests wait already")
            return
        try:
            self._label(self.rfile.read(int(length)))
        finally:
            self.batcher.places.release()

    def _label(self, content: bytes) -> None:
        """Answer a body."""
        if self.path != "/labels":
            self._refuse(404, "POST an image to /labels")
            return
        try:
            with Image.open(io.BytesIO(content)) as picture:
                if picture.width * picture.height > MOST_PIXELS:  # not yet decoded
                    self._refuse(413, f"send images of at most {MOST_PIXELS} pixels")
                    return
                image = picture.convert("RGB")
        except Exception:  # Pillow raises half a dozen kinds for damaged data
            self._refuse(400, "the body is no image")
            return
        height, width = self.batcher.size
        small = image.resize((width, height), Image.Resampling.BILINEAR)
        try:
            labels = self.batcher.submit(np.asarray(small)).result(SECONDS)
        except queue.Full:
            self._refuse(503, f"{MOST_WAITING} requests wait already")
            return
        except Exception as error:
            self._refuse(500, f"{type(error).__name__}")
            return
        found = Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST)
        body = io.BytesIO()
        if self.headers.get("Accept") == "application/x-npy":
            np.save(body, np.asarray(found))
            self._answer(200, "application/x-npy", body.getvalue())
        else:
            found.save(body, format="PNG")
            self._answer(200, "image/png", body.getvalue())

    def _skip(self, left: int) -> None:
        """Read a body and hold none of it: a client listens once it has sent it."""
        while left > 0 and (part := self.rfile.read(min(left, 1 << 16))):
            left -= len(part)

    def _refuse(self, status: int, text: str) -> None:
        self._answer(status, "text/plain", f"{text}\n".encode())

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def fail(text: str) -> NoReturn:
    """End with one line and the exit code of bad input."""
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("export", type=Path)
    top.add_argument("--size", default="120x160", help="HxW that the network runs at")
    top.add_argument("--batch", type=int, default=4, help="at most, and filled up (4)")
    top.add_argument("--host", default="127.0.0.1")
    top.add_argument("--port", type=int, default=8000, help="0: any that is free")
    args = top.parse_args()
    if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", args.size):
        fail(f"--size {args.size}: write HEIGHTxWIDTH such as 120x160")
    if args.batch < 1:
        fail(f"--batch {args.batch}: at least 1")
    height, width = map(int, args.size.split("x"))
    try:
        Handler.batcher = Batcher(load(args.export), (height, width), args.batch)
    except (OSError, ValueError) as error:
        fail(f"{args.export} at --size {args.size}: {error}")
    try:
        server = ThreadingHTTPServer((args.host, args.port), Handler)
    except (OSError, OverflowError) as error:
        fail(f"{args.host}:{args.port}: {error}")

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come more than once
        threading.Thread(target=server.shutdown, daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    print(f"http://{args.host}:{server.server_port}/labels", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    server.server_close()


if __name__ == "__main__":
    main()
