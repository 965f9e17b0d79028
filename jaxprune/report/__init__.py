# SPDX-License-Identifier: Apache-2.0
"""The report of a run, drawn from the files of its work folder alone.

Needs matplotlib and pillow, no accelerator and no JAX.
"""

from jaxprune.report.files import Record, read
from jaxprune.report.pictures import (
    as_png,
    colorize,
    legend,
    overlay,
    save_png,
    strips,
    with_legend,
)
from jaxprune.report.plots import frontier
from jaxprune.report.sections import write
from jaxprune.report.tables import results_rows, results_table

__all__ = [
    "Record",
    "as_png",
    "colorize",
    "frontier",
    "legend",
    "overlay",
    "read",
    "results_rows",
    "results_table",
    "save_png",
    "strips",
    "with_legend",
    "write",
]
