# SPDX-License-Identifier: Apache-2.0
"""One table and one plot of several comparisons: of other seeds, methods or machines.

    python benchmarks/comparison_page.py docs/comparison.json [STUDY/comparison.json]..

Each file is of one `jaxprune compare`. The runs of all of them, of a method, budget and
seed that which is told last, are written to the first file; the table is printed, and
the plot drawn into pictures/ beside that file, by its name. Machines differ, so that a
study's milliseconds are scaled until its dense network takes as long as that of the
first file.
"""

import argparse
import json
from pathlib import Path

from jaxprune import report
from jaxprune.train import tabulate


def dense_ms(runs):
    return next(run["ms"] for run in runs if run["method"] == "dense")


def merged(studies):
    """The runs of all studies, each once, in the first one's milliseconds."""
    whole = dense_ms(studies[0])
    rows = {}
    for runs in studies:
        scale = whole / dense_ms(runs)
        for run in runs:
            row = {**run, "ms": run["ms"] * scale}
            rows[run["method"], run["budget"], run["seed"]] = {
                k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()
            }
    return sorted(rows.values(), key=lambda r: (-r["budget"], r["method"], r["seed"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    files = parser.parse_args().files
    runs = merged([json.loads(file.read_text("utf-8"))["runs"] for file in files])
    lines = ",\n".join(json.dumps(run) for run in runs)
    files[0].write_text(f'{{"runs": [\n{lines}\n]}}\n', "utf-8")
    rows = tabulate.table(runs)
    print(tabulate.as_markdown(rows))
    plots = files[0].parent / "pictures"
    print(report.frontier(rows, plots / f"{files[0].stem}.png"))


if __name__ == "__main__":
    main()
