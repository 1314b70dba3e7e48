"""A document as Markdown (GitHub's), for a pull request or a terminal. Figures are left out: tables hold their numbers.

Names come from outside, so what Markdown or HTML would read as markup is escaped.
"""

from __future__ import annotations

import re

from onnxcompress.pages.document import Block, Code, Details, Document, Figure, Section, Table, Text, Tiles
from onnxcompress.units import printable

__all__ = ["to_markdown"]

_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~$&!@])")
_TONES = {"plain": "", "good": "", "bad": "**", "warning": "**"}


def to_markdown(document: Document, footer: str) -> str:
    """``document`` as Markdown, with ``footer`` below it."""
    parts = [f"# {_text(document.title)}", _text(document.subtitle)]
    parts.extend(_section(section) for section in document.sections)
    return "\n\n".join([*(part for part in parts if part), f"---\n\n{_text(footer)}"]) + "\n"


def _text(text: str) -> str:
    return _MARKUP.sub(r"\\\1", printable(text))


def _section(section: Section) -> str:
    blocks = _blocks(section.blocks)
    return f"## {_text(section.title)}\n\n{blocks}" if blocks else ""


def _blocks(blocks: tuple[Block, ...]) -> str:
    return "\n\n".join(filter(None, (_block(block) for block in blocks)))


def _block(block: Block) -> str:
    match block:
        case Text():
            mark = _TONES[block.tone]
            return f"{mark}{_text(block.text)}{mark}"
        case Tiles():
            return "\n".join(
                f"- {_text(tile.label)}: **{_text(tile.value)}**{' ' + _text(tile.note) if tile.note else ''}"
                for tile in block.tiles
            )
        case Table():
            return _table(block)
        case Code():
            longest = max((len(run) for run in re.findall(r"`+", block.text)), default=0)
            fence = "`" * max(3, longest + 1)
            text = "\n".join(printable(line) for line in block.text.rstrip().split("\n"))
            return f"{fence}\n{text}\n{fence}"
        case Details():
            return f"{_text(block.summary)}:\n\n{_blocks(block.blocks)}"
        case Figure():
            return ""


def _table(table: Table) -> str:
    lines = [table.columns, *table.rows]
    rows = ["| " + " | ".join(_text(cell) or " " for cell in line) + " |" for line in lines]
    rule = "|" + "|".join("---" if i in table.text_columns else "---:" for i in range(len(table.columns))) + "|"
    caption = f"\n\n{_text(table.caption)}" if table.caption else ""
    return "\n".join([rows[0], rule, *rows[1:]]) + caption
