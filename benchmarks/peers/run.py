# SPDX-License-Identifier: Apache-2.0
"""jaxprune beside Torch-Pruning and torch-kirigami, on the same networks.

    python -m venv PEERS
    PEERS/bin/pip install torch torch-pruning==1.6.1 torch-kirigami==0.2.1
    taskset -c 0 python benchmarks/peers/run.py --torch-python PEERS/bin/python \
        --seconds 300 --out docs/peers.md

PyTorch's CPU build does. Each large network runs in a process of its own, and stops at
a limit of CPU seconds; tiny ones share a process. Results are kept in `--results`, JSON
lines: what stands there is not run again, unless with `--again`.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import big_flax
import page
import zoo_flax

HERE = Path(__file__).resolve().parent
TOOLS = ("jaxprune", "torch-pruning", "kirigami")
VERSIONS = """
import importlib.metadata as m, json, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
print(json.dumps({n: v for n in sys.argv[1:] if (v := version(n))}))
"""
ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
PACKAGES = ("jax", "flax", "torch", "torch-pruning", "torch-kirigami")
Rows = dict[tuple[str, str], dict[str, Any]]


def process(
    tool: str, names: list[str], torch_python: str, limit: int
) -> dict[str, dict[str, Any]]:
    """The rows that a process prints for the networks before its time is up."""
    command = [torch_python, str(HERE / "theirs.py"), tool]
    if tool == "jaxprune":
        command = [sys.executable, str(HERE / "ours.py")]
    done = subprocess.run(
        [*command, *names],
        capture_output=True,
        text=True,
        env=ONE_CORE | os.environ,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (limit, limit)),
    )
    late = -done.returncode in (signal.SIGXCPU, signal.SIGKILL)
    why = f"more than {limit} s" if late else (done.stderr.splitlines() or ["?"])[-1]
    said = {"verdict": "time" if late else "crashes", "why": why.strip()[:400]}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    rows = {row["name"]: row for row in map(json.loads, lines)}
    if len(names) == 1:
        row = rows.setdefault(names[0], {"name": names[0], **said})
        rows[names[0]] = row | (said if row.get("verdict") == "unfinished" else {})
    return rows


def run_all(arguments: argparse.Namespace) -> Rows:
    file: Path = arguments.results
    rows: Rows = {}
    if file.exists() and not arguments.again:
        for line in file.read_text().splitlines():
            row = json.loads(line)
            rows[row["tool"], row["name"]] = row
    tiny, limit = list(zoo_flax.ZOO), arguments.seconds
    jobs = [(tool, tiny, 3 * limit) for tool in TOOLS]
    jobs += [(tool, [name], limit) for name in big_flax.BIG for tool in TOOLS]
    jobs += [(tool, [name], limit) for name in tiny for tool in TOOLS]
    for tool, names, seconds in jobs:
        names = [name for name in names if (tool, name) not in rows]
        if not names or tool not in arguments.tools:
            continue
        found = process(tool, names, arguments.torch_python, seconds)
        rows |= {(tool, n): {"tool": tool, **row} for n, row in found.items()}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        print(tool, len(found), "of", len(names), names[0], flush=True)
    return rows


def versions(*pythons: str) -> dict[str, str]:
    """Of the packages that were compared, as each interpreter has them."""
    result: dict[str, str] = {}
    for python in pythons:
        command = [python, "-c", VERSIONS, *PACKAGES]
        result |= json.loads(subprocess.check_output(command, text=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-python", required=True, help="with the two peers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--results", type=Path, default=Path("peers.jsonl"))
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--seconds", type=int, default=120, help="CPU seconds at most")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores")
    arguments = parser.parse_args()
    rows = run_all(arguments)
    if arguments.out:
        found = versions(sys.executable, arguments.torch_python)
        options = f"--seconds {arguments.seconds} "
        arguments.out.write_text(page.page(rows, found, arguments.machine, options))


if __name__ == "__main__":
    main()
