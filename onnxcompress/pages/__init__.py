"""Pages from reports: one HTML file that needs nothing else, or Markdown; the name's ending says which.

A page is made from the plain data that the JSON report holds, and from nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnxcompress.errors import UsageError
from onnxcompress.pages.benchmark_page import benchmark_document
from onnxcompress.pages.compress_page import compress_document
from onnxcompress.pages.document import Document
from onnxcompress.pages.html import to_html
from onnxcompress.pages.markdown import to_markdown
from onnxcompress.pages.plots import check_plotting

__all__ = ["benchmark_document", "check_page", "compress_document", "render_page", "to_html", "to_markdown"]

_ENDINGS: Mapping[str, Callable[[Document, str], str]] = {
    ".html": to_html,
    ".htm": to_html,
    ".md": to_markdown,
    ".markdown": to_markdown,
}


def check_page(path: str | os.PathLike[str]) -> None:
    """Make sure, before any work is done, that a page of this name can be made.

    Raises:
        UsageError: its ending is none that is known.
        RuntimeUnavailableError: the library for plots is not installed.
    """
    if Path(path).suffix.lower() not in _ENDINGS:
        raise UsageError(f"{os.fspath(path)}: a page ends in {', '.join(_ENDINGS)}; name it so")
    if _ENDINGS[Path(path).suffix.lower()] is to_html:
        check_plotting()


def render_page(path: str | os.PathLike[str], document: Document, tool: Mapping[str, Any]) -> str:
    """The text of the page ``path``."""
    footer = f"Made by {tool['name']} {tool['version']}. Times move from machine to machine; compare inside one page."
    return _ENDINGS[Path(path).suffix.lower()](document, footer)
