# SPDX-License-Identifier: Apache-2.0
"""The report's page: sections of text, tables and pictures, in one HTML file."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: #fff;
  color: #202020; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; line-height: 1.3; margin: 2.2rem 0 .4rem; }
p, figcaption { max-width: 44rem; }
img { max-width: 100%; height: auto; }
.plot { width: 100%; max-width: 42rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #ddd;
  text-align: right; vertical-align: bottom; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
table:not(.text) td:not(:first-child) { white-space: nowrap; }
.note { color: #555; font-size: .9rem; }
.missing { border-left: 4px solid #E69F00; padding: .1rem 1rem; background: #fff8e8; }
.cells { display: grid; gap: .3rem; margin: 0 0 .8rem;
  grid-template-columns: repeat(4, 1fr); }
.cells figure { margin: 0; }
.cells img { width: 100%; display: block; image-rendering: pixelated; }
.cells .photo { image-rendering: auto; }
.cells figcaption { font-size: .85rem; color: #555; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0;
  list-style: none; font-size: .9rem; }
.legend span { display: inline-block; width: 1em; height: 1em; margin-right: .4em;
  vertical-align: -.12em; border: 1px solid #666; }
pre { overflow-x: auto; font-size: .85rem; }
@media (max-width: 34rem) {
  .cells { grid-template-columns: repeat(2, 1fr); }
  th, td { padding-right: .5rem; font-size: .85rem; }
}
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document; it loads nothing but the pictures beside it."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading that states the finding, and what shows it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def text(words: str, style: str = "") -> str:
    """A paragraph; style: '' or 'note'."""
    kind = f' class="{style}"' if style else ""
    return f"<p{kind}>{escape(words)}</p>"


def plot(file: str, alt: str) -> str:
    """A picture beside the page, with its finding for those who cannot see it."""
    return f'<img class="plot" src="{escape(file)}" alt="{escape(alt)}">'


def table(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table whose first row is the head; it scrolls sideways where it is too wide."""
    head, *body = rows
    cells = "".join(f'<th scope="col">{escape(c)}</th>' for c in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in body:
        lines.append(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>")
    kind = "" if numbers else ' class="text"'
    return (
        f'<div class="scroll"><table{kind}>\n' + "\n".join(lines) + "\n</table></div>"
    )


def missing(lines: Sequence[str]) -> str:
    """What the work folder does not hold yet."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="missing"><p>Not in this report yet:</p><ul>{items}</ul></div>'


def cells(files: Sequence[str], captions: Sequence[str]) -> str:
    """Pictures side by side, two by two on a phone; the first one is a photograph."""
    figures = [
        f'<figure><img{" class=photo" if i == 0 else ""} src="{escape(file)}" '
        f'alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
        for i, (file, caption) in enumerate(zip(files, captions, strict=True))
    ]
    return '<div class="cells">' + "".join(figures) + "</div>"


def legend(names: Sequence[str], colors: Sequence[Sequence[int]]) -> str:
    """A swatch and a name for each class."""
    items = [
        f'<li><span style="background:rgb({r},{g},{b})"></span>{escape(name)}</li>'
        for name, (r, g, b) in zip(names, colors, strict=True)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def folded(title: str, document: Any) -> str:
    """A JSON document that opens on a click."""
    body = escape(json.dumps(document, indent=2, ensure_ascii=False))
    return f"<details><summary>{escape(title)}</summary><pre>{body}</pre></details>"
