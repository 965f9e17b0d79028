# SPDX-License-Identifier: Apache-2.0
"""Load on `examples/serve.py`: requests a second, latency, the server's memory.

    python examples/load.py http://127.0.0.1:8000/labels --pid PID --seconds 600

Starts `--clients` connections that ask again as soon as they are answered, and prints a
row of a table each `--every` seconds. Ends with 1 if any request failed, if there was
none, or if the server is gone. The server may take `--wait` seconds to compile before
it listens. The memory is the resident set of the process `--pid`, of Linux.
"""

from __future__ import annotations

import argparse
import http.client
import io
import socket
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
from PIL import Image


def picture(size: str, seed: int) -> bytes:
    """A PNG of smooth noise."""
    height, width = map(int, size.split("x"))
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((width, height))
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def resident(pid: int | None) -> float:
    """MiB of memory that a process holds, nan for none; OSError where it is gone."""
    if pid is None:
        return float("nan")
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(f"process {pid} has ended")


def memory(pid: int | None, bad: list[str]) -> float:
    """As `resident`, but nan for a process that is gone, which is noted."""
    try:
        return resident(pid)
    except OSError:
        bad.append(f"the server, process {pid}, is gone")
        return float("nan")


def listens(url: str, seconds: float) -> bool:
    """Whether the server takes connections, after so many seconds at most."""
    at = urllib.parse.urlsplit(url)
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((at.hostname or "", at.port or 80), 1).close()
            return True
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)


def client(
    url: str, body: bytes, until: float, ms: list[float], bad: list[str]
) -> None:
    """Ask over one connection until the time is up; notes milliseconds and failures."""
    at = urllib.parse.urlsplit(url)
    link = http.client.HTTPConnection(at.hostname or "", at.port, timeout=60)
    while time.monotonic() < until:
        start = time.perf_counter()
        try:
            link.request("POST", at.path, body)
            answer = link.getresponse()
            content = answer.read()
            if answer.status != 200 or not content.startswith(b"\x89PNG"):
                bad.append(f"{answer.status} {content[:80]!r}")
        except (OSError, http.client.HTTPException) as error:
            bad.append(repr(error))
            link.close()
            time.sleep(0.1)  # what is gone is not asked all the time
        ms.append(1e3 * (time.perf_counter() - start))
    link.close()


def main() -> int:
    """Run the load and print the table."""
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("url")
    top.add_argument("--pid", type=int, help="of the server, for its memory")
    top.add_argument("--seconds", type=float, default=10)
    top.add_argument("--every", type=float, default=60)
    top.add_argument("--clients", type=int, default=4)
    top.add_argument("--size", default="120x160", help="of the images sent, HxW")
    top.add_argument("--wait", type=float, default=60, help="for the server to listen")
    args = top.parse_args()
    if not listens(args.url, args.wait):
        print(f"error: nothing listens at {args.url}", file=sys.stderr)
        return 1
    ms: list[float] = []
    bad: list[str] = []
    start = time.monotonic()
    until = start + args.seconds
    threads = [
        threading.Thread(
            target=client, args=(args.url, picture(args.size, i), until, ms, bad)
        )
        for i in range(args.clients)
    ]
    before = memory(args.pid, bad)
    for thread in threads:
        thread.start()
    print("| s | requests | requests/s | p50, ms | p90 | p99 | failed | server, MiB |")
    print("| ---: |" + " ---: |" * 7, flush=True)
    print(f"| 0 | 0 | | | | | 0 | {before:.1f} |", flush=True)
    seen, last = 0, start
    while last < until:
        time.sleep(max(0.0, min(args.every, until - time.monotonic())))
        now, count = time.monotonic(), len(ms)
        new = np.array(ms[seen:count] or [float("nan")])
        p50, p90, p99 = np.percentile(new, [50, 90, 99])
        print(
            f"| {now - start:.0f} | {count} | {(count - seen) / (now - last):.1f} "
            f"| {p50:.1f} | {p90:.1f} | {p99:.1f} | {len(bad)} "
            f"| {memory(args.pid, bad):.1f} |",
            flush=True,
        )
        seen, last = count, now
    for thread in threads:
        thread.join()
    if not ms:
        bad.append("there was no request")
    for text in [*bad[:5], *bad[5:][-1:]]:
        print(text)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
