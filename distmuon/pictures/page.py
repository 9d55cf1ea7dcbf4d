"""A page in one file: headings, text, tables and pictures, with nothing fetched from anywhere.

Pictures are embedded, styles are in the page, and there are no scripts. The page's own policy
forbids the browser to load anything else, so it looks the same by mail and without a network.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Format = Literal["png", "svg+xml"]

# Readable on a screen of 1,200 pixels: no part may be wider.
WIDTH = 1200

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = f"""
:root {{ color-scheme: light; }}
body {{ max-width: {WIDTH}px; margin: 0 auto; padding: 24px 16px; color: #1a1a1a;
  background: #fff; font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 24px; margin: 0 0 8px; }}
h2 {{ font-size: 18px; margin: 32px 0 8px; }}
p {{ margin: 8px 0; max-width: 80ch; white-space: pre-line; }}
figure {{ margin: 16px 0; }}
img {{ width: 100%; height: auto; }}
figcaption {{ color: #444; font-size: 14px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th {{ text-align: left; border-bottom: 2px solid #888; padding: 3px 14px 3px 0; }}
td {{ border-bottom: 1px solid #ddd; padding: 3px 14px 3px 0; vertical-align: top;
  white-space: pre-line; }}
.right {{ text-align: right; }}
"""


@dataclass(frozen=True, slots=True)
class Heading:
    """A section's heading."""

    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text; its line breaks are kept."""

    text: str


@dataclass(frozen=True, slots=True)
class Picture:
    """An embedded picture.

    Attributes:
        data: The file's content.
        format: What kind of file it is.
        description: What it shows, for those who cannot see it.
        caption: Below it; empty for none.
    """

    data: bytes
    format: Format
    description: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Grid:
    """A table.

    Attributes:
        titles: One for each column.
        rows: A text for each column.
        numbers: Columns of numbers, by index: these are set to the right.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()


Part = Heading | Paragraph | Picture | Grid


def render_page(title: str, parts: Sequence[Part]) -> str:
    """Write a page.

    Args:
        title: Of the page and its first heading.
        parts: From top to bottom.

    Returns:
        A whole HTML document that refers to nothing outside of itself.
    """
    body = "\n".join(map(_render, parts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def _render(part: Part) -> str:
    match part:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Picture(data, kind, description, caption):
            # An SVG goes in as a picture too: the ids in several of them would get mixed up.
            source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            below = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
            return f'<figure>\n<img src="{source}" alt="{escape(description)}">{below}\n</figure>'
        case Grid():
            return _render_grid(part)


def _render_grid(grid: Grid) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        written = (
            f'<{tag} class="right">{escape(cell)}</{tag}>'
            if index in grid.numbers
            else f"<{tag}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )
        return f"<tr>{''.join(written)}</tr>"

    rows = "\n".join(row(cells, "td") for cells in grid.rows)
    return (
        f'<div class="wide"><table>\n<thead>{row(grid.titles, "th")}</thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )
