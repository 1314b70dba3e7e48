"""What a page says, apart from how it looks: sections of tiles, tables, figures and text.

Everything in here is plain text; whoever renders it escapes it. Only :class:`Figure` holds markup, which
:mod:`onnxcompress.pages.plots` makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Block", "Code", "Details", "Document", "Figure", "Section", "Table", "Text", "Tile", "Tiles"]

Tone = Literal["plain", "good", "bad", "warning"]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tile:
    """One figure of the summary: what it is, its value, and what to know about it."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tiles:
    """The summary at the top."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells. ``text_columns`` are read from the left, the others are numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    text_columns: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Figure:
    """A plot: what draws its ``<svg>`` element, what it shows in a few words, and how to read it."""

    svg: Callable[[], str]
    title: str
    caption: str = ""


@dataclass(frozen=True)
class Code:
    """Text as it is, e.g. YAML."""

    text: str


@dataclass(frozen=True)
class Details:
    """Blocks that are folded away until they are asked for."""

    summary: str
    blocks: tuple[Block, ...]


Block = Text | Tiles | Table | Figure | Code | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A page."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    @classmethod
    def of(cls, title: str, subtitle: str, sections: Sequence[Section | None]) -> Document:
        """A page of the sections that there are and that say something."""
        return cls(title, subtitle, tuple(section for section in sections if section is not None and section.blocks))
