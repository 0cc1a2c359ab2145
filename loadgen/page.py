"""Pieces of an HTML page that needs nothing from outside of itself.

In: texts, tables and figures of :mod:`loadgen.report`. Out: HTML. Texts are escaped here; figures (``<svg>``) and links
(``<a>``) are passed through.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f1f3f5; color: #343a40; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
header h1 { margin: 0; font-size: 27px; color: #1b1f24; }
header p { margin: 2px 0 22px; color: #868e96; }
section { background: #fff; border: 1px solid #e9ecef; border-radius: 10px; padding: 18px 24px 20px; margin: 16px 0; }
h2 { margin: 0 0 10px; font-size: 18px; color: #1b1f24; }
section > p { margin: 8px 0; color: #5c636a; }
section > :last-child { margin-bottom: 0; }
svg { display: block; width: 100%; height: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; }
.tile { background: #fff; border: 1px solid #e9ecef; border-radius: 10px; padding: 14px 18px; }
.tile b { display: block; font-size: 27px; line-height: 1.2; color: #1864ab; }
.tile span { display: block; font-weight: 600; }
.tile small { display: block; margin-top: 4px; color: #6c757d; font-size: 12.5px; line-height: 1.4; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 16px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid #f1f3f5; white-space: nowrap; }
th { color: #868e96; font-weight: 600; white-space: normal; vertical-align: bottom; line-height: 1.25; border-bottom-color: #dee2e6; }
th.figure, td.figure { text-align: right; }
tr.marked td { font-weight: 600; color: #087f5b; }
ul { margin: 6px 0; padding-left: 20px; }
li { margin: 3px 0; }
a { color: #1864ab; }
"""


def page(title: str, subtitle: str, body: Iterable[str]) -> str:
    """A whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p></header>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )


def section(heading: str, *parts: str | Sequence[str]) -> str:
    """A heading and what belongs to it: figures and tables as they are, other text as paragraphs, sequences as lists."""
    pieces = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part if part.startswith(("<svg", "<div")) else f"<p>{html.escape(part)}</p>")
        else:
            items = "".join(f"<li>{item if item.startswith('<a ') else html.escape(item)}</li>" for item in part)
            pieces.append(f"<ul>{items}</ul>")
    return f"<section><h2>{html.escape(heading)}</h2>{''.join(pieces)}</section>"


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """The figures that matter most: value, what it is, and what stands behind it."""
    cells = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span><small>{html.escape(more)}</small></div>'
        for value, name, more in items
    )
    return f'<div class="tiles">{cells}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], marked: Collection[str] = ()) -> str:
    """A table; columns that hold only figures are aligned to the right, rows that begin with one of ``marked`` stand out."""
    width = max([len(header), *(len(row) for row in rows)])
    figures = [all(_is_figure(row[column]) for row in rows if column < len(row)) for column in range(width)]

    def line(tag: str, cells: Sequence[str]) -> str:
        padded = [*cells, *[""] * (width - len(cells))]
        marks = [' class="figure"' if figure else "" for figure in figures]
        row = '<tr class="marked">' if tag == "td" and cells[0] in marked else "<tr>"
        return row + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for m, c in zip(marks, padded, strict=True)) + "</tr>"

    head = line("th", header) if any(header) else ""
    return f'<div class="scroll"><table>{head}{"".join(line("td", row) for row in rows)}</table></div>'


def _is_figure(text: str) -> bool:
    return not text or text.removesuffix("x").removesuffix("%").replace(",", "").replace(".", "", 1).replace("-", "", 1).isdigit()
