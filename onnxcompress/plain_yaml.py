"""YAML of strangers, read into plain data: recipes, and the steps that images are prepared by.

The safe loader, no anchors or aliases, no tags, no repeated keys, no numbers that Python could not print, a limited
size. What is wrong is told in one line with the file, the line and the position (``passes[1].insert_qdq.observer``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from onnxcompress.errors import RecipeError

__all__ = ["SIZE_LIMIT", "Document", "Position", "is_file", "parse_yaml", "read_text", "read_yaml", "short"]

Position = tuple[str | int, ...]

#: bytes; a recipe of a hundred passes with decisions is far below
SIZE_LIMIT = 1 << 20

#: characters that a number may have
_MOST_DIGITS = 1000


class _Loader(yaml.SafeLoader):
    """Refuses anchors and aliases: with them a small file can stand for a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not used in recipes", event.start_mark
            )
        return super().compose_node(parent, index)


def is_file(path: Path) -> bool:
    """True for a regular file; False also for what no file can be called."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or a null byte
        return False


def read_text(path: Path) -> str:
    """The text of a small file, which must be a regular one: a pipe would block for ever.

    Raises:
        RecipeError: the file cannot be read, or is too large.
    """
    try:
        if not is_file(path):
            raise RecipeError(f"{short(str(path))}: no such file, or no regular one")
        with path.open("rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
        if len(raw) > SIZE_LIMIT:
            raise RecipeError(f"{path}: the file is larger than the {SIZE_LIMIT} bytes that a recipe may have")
        return raw.decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text; expected a YAML file") from error


def parse_yaml(text: str, source: str) -> Any:
    """Plain data from ``text``, read as carefully as a recipe; ``source`` names it in messages.

    Raises:
        RecipeError: the text is no plain YAML.
    """
    return Document(source).read(text)


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML file of the user, read as carefully as a recipe.

    Raises:
        RecipeError: the file cannot be read, is too large, or is no plain YAML.
    """
    return parse_yaml(read_text(path), str(path))


def short(value: Any) -> str:
    """``value`` for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Document:
    """A YAML text read into plain data, which remembers the line of every position for messages."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._lines: dict[Position, int] = {}

    def read(self, text: str) -> Any:
        """Plain data from ``text``.

        Raises:
            RecipeError: the text is no plain YAML.
        """
        loader = None
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, ())
        except RecursionError as error:
            raise RecipeError(f"{self.source}: nested too deeply for a recipe") from error
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
            problem = " ".join(str(error.problem or error.context).split())[:300]
            raise RecipeError(f"{self.source}{line}: not valid YAML: {problem}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"{self.source}: not valid YAML: {' '.join(str(error).split())}") from error
        finally:
            if loader is not None:
                loader.dispose()

    def error(self, path: Position, text: str) -> RecipeError:
        """An error at ``path``; the line is that of the nearest position that exists in the file."""
        known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in self._lines), None)
        line = f":{self._lines[known]}" if known is not None else ""
        where = f"{_dotted(path)}: " if path else ""
        return RecipeError(f"{self.source}{line}: {where}{text}")

    def _value(self, loader: yaml.SafeLoader, node: yaml.Node, path: Position) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            self._plain(node, "seq", path)
            return [self._value(loader, item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            self._plain(node, "map", path)
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self._scalar(loader, key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
                if not isinstance(key, str):
                    raise self.error(path, f"keys are names, found {short(key_node.value)}")
                self._lines[(*path, key)] = key_node.start_mark.line + 1
                if key in mapping:
                    raise self.error((*path, key), "the key is written twice; keep one")
                mapping[key] = self._value(loader, value_node, (*path, key))
            return mapping
        return self._scalar(loader, node, path)

    def _scalar(self, loader: yaml.SafeLoader, node: yaml.Node, path: Position) -> Any:
        """A plain value; numbers that Python could not even print, and sexagesimal ones, are refused at once."""
        kind = node.tag.rpartition(":")[2]
        if kind in ("int", "float") and (len(node.value) > _MOST_DIGITS or ":" in node.value):
            raise self.error(path, f"the number {short(node.value)} cannot be read; write it plainly")
        try:
            return loader.construct_object(node)
        except OverflowError as error:
            raise self.error(path, f"the number {short(node.value)} is too large") from error

    def _plain(self, node: yaml.Node, kind: str, path: Position) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise self.error(path, f"the YAML tag {node.tag!r} is not used in recipes")


def _dotted(path: Position) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
