"""A report as a list of blocks, written as Markdown and as one self-contained HTML page."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from fedpipe.files import write_text
from fedpipe.printable import printable


class Strong(str):
    """Text of a table cell that stands out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """Opens a section."""

    text: str
    """Its title."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paragraph:
    """Running text."""

    text: str
    """Plain text; words between backquotes are code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """Preformatted text."""

    text: str
    """Kept as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The few numbers that matter most."""

    items: tuple[tuple[str, str, str], ...]
    """Name, value and a remark that may be empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of plain text; a ``Strong`` cell is emphasised."""

    columns: tuple[str, ...]
    """Titles."""
    rows: tuple[tuple[str, ...], ...]
    """Cells, one per column."""
    numeric: frozenset[int] = frozenset()
    """Columns that are right-aligned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A picture that lies beside the report as a PNG and inside the page as SVG."""

    file: str
    """Name of the PNG."""
    svg: str
    """The same figure as an ``<svg>`` element."""
    caption: str
    """What it shows, in one sentence."""


Block = Heading | Paragraph | Code | Facts | Table | Figure

_MASK = re.compile(r"\[MASK\]|&lt;mask&gt;")
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --paper: #ffffff; --panel: #f6f8fa; --accent: #0072b2; --blue: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --panel: #151b23; --accent: #56b4e9; --blue: #3590d0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 980px; padding: 2.5rem 1.5rem 4rem; color: var(--ink);
  background: var(--paper);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: .75rem;
  margin: 1.4rem 0; }
.fact { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; }
.fact dt { color: var(--soft); font-size: .82rem; }
.fact dd { margin: 0; }
.fact .value { font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.fact .note { color: var(--soft); font-size: .82rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem .5rem;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
.n { text-align: right; white-space: nowrap; }
td strong { color: var(--accent); }
mark { background: none; color: var(--accent); font-weight: 650; white-space: nowrap; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.5; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
p code { background: var(--panel); border-radius: 4px; padding: .1em .3em; font-size: .9em; }
figure { margin: 1.2rem 0; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .2rem; max-width: 46rem; }
@media print { body { max-width: none; padding: 0; } h2, figure, .fact { break-inside: avoid; } }
"""


def to_html(title: str, blocks: list[Block]) -> str:
    """Write a page that needs nothing but itself: no script, no font, no picture from elsewhere."""
    body = "\n".join(_html(block) for block in blocks)
    return printable(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: list[Block]) -> str:
    """Write the same report as GitHub Markdown; figures are links to the PNGs beside it."""
    text = "\n\n".join([f"# {_md(title)}", *(_markdown(block) for block in blocks)])
    return printable(text) + "\n"


def write_page(path: Path, title: str, blocks: list[Block]) -> Path:
    """Write a report as HTML, and beside it as Markdown.

    Args:
        path: File of the HTML, in a folder that exists.
        title: Title of the page.
        blocks: Blocks of the page.

    Returns:
        The path.
    """
    write_text(path.with_suffix(".md"), to_markdown(title, blocks))
    write_text(path, to_html(title, blocks))
    return path


def aligned(table: Table) -> list[str]:
    """Write a table for a terminal: columns two spaces apart, numbers to the right."""
    lines = [table.columns, *table.rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            f"{cell:>{width}}" if index in table.numeric else f"{cell:<{width}}"
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h2>{html.escape(block.text)}</h2>"
        case Paragraph():
            return f"<p>{_inline(block.text)}</p>"
        case Code():
            return f"<pre>{html.escape(block.text.rstrip())}</pre>"
        case Facts():
            cards = (
                f'<div class="fact"><dt>{html.escape(name)}</dt><dd><div class="value">'
                f'{html.escape(value)}</div><div class="note">{html.escape(note)}</div></dd></div>'
                for name, value, note in block.items
            )
            return f'<dl class="facts">{"".join(cards)}</dl>'
        case Table():
            return _html_table(block)
        case Figure():
            label = html.escape(block.caption, quote=True)
            svg = block.svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
            return f"<figure>{svg}<figcaption>{_inline(block.caption)}</figcaption></figure>"


def _html_table(table: Table) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        marks = (' class="n"' if index in table.numeric else "" for index in range(len(cells)))
        return "".join(
            f"<{tag}{mark}>{_html_cell(cell) if tag == 'td' else html.escape(cell)}</{tag}>"
            for cell, mark in zip(cells, marks, strict=True)
        )

    rows = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in table.rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{row(table.columns, "th")}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _html_cell(cell: str) -> str:
    if isinstance(cell, Strong):
        return f"<strong>{html.escape(cell)}</strong>"
    return _MASK.sub(lambda match: f"<mark>{match.group()}</mark>", html.escape(cell))


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"## {_md(block.text)}"
        case Paragraph():
            return _md_inline(block.text)
        case Code():
            longest = max(map(len, re.findall("`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}\n{block.text.rstrip()}\n{fence}"
        case Facts():
            notes = (f" ({_md(note)})" if note else "" for _, _, note in block.items)
            facts = (f"- {_md(name)}: **{_md(value)}**" for name, value, _ in block.items)
            return "\n".join(fact + note for fact, note in zip(facts, notes, strict=True))
        case Table():
            rule = ["---:" if i in block.numeric else "---" for i in range(len(block.columns))]
            body = [[_md_cell(cell) for cell in row] for row in block.rows]
            rows = [[_md(column) for column in block.columns], rule, *body]
            return "\n".join(f"| {' | '.join(row)} |" for row in rows)
        case Figure():
            return f"![{_md(block.caption)}]({block.file})\n\n*{block.caption}*"


def _md_inline(text: str) -> str:
    """Keep code between backticks; elsewhere nothing is a tag."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part[:1] == "`" else _no_tags(part) for part in parts)


def _no_tags(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _md_cell(cell: str) -> str:
    return f"**{_md(cell)}**" if isinstance(cell, Strong) and cell.strip() else _md(cell)


def _md(text: str) -> str:
    """Escape what Markdown or the HTML inside it would read as markup."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", _no_tags(text))
