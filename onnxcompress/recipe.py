"""Recipes: YAML <-> a pipeline with its target.

::

    version: 1
    target: cpu
    seed: 0                             # optional
    passes:                             # a list, so order is meaning and a pass may repeat
      - fold_batch_norm: {}
      - insert_qdq: {observer: min_max}

A pass without options may be written as a bare name. Everything that can be wrong with a recipe is found here, before
any data is read, and told in one line with the file, the line and the position (``passes[1].insert_qdq.observer``).
A recipe is data from outside: the safe loader, no anchors or aliases, no repeated keys, a limit on its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from onnxcompress.errors import RecipeError, UsageError
from onnxcompress.passes import PASSES, load_pass
from onnxcompress.plain_yaml import SIZE_LIMIT, Document, Position, is_file, read_text, short

if TYPE_CHECKING:
    import os

    from onnxcompress.base import Pass, PassReport
    from onnxcompress.graph import Graph
    from onnxcompress.pipeline import Pipeline

__all__ = [
    "RECIPES",
    "Recipe",
    "load_recipe",
    "option_error",
    "parse_recipe",
    "unmatched_exclusions",
    "with_decisions",
    "with_exclusions",
]

#: named recipes and what they do; the files lie in ``onnxcompress/recipes``
RECIPES: Mapping[str, str] = {
    "int8": "fold, then static INT8 for the target; needs calibration data",
    "int8-accurate": "as int8, closer to the original: ranges are searched by the error at the outputs; slower",
    "prune-int8": "remove channels, repair what remains, then static INT8; needs calibration data",
    "prune-distil-int8": "remove half, let the original teach what remains, then static INT8; needs the extra distill",
    "prune-int8-distil": "remove half, static INT8, then let the original teach the quantised network",
    "fp16": "fold, then float16 where it is safe; the default for target cuda",
    "lossless": "fold and clean without changing the outputs; needs no data",
}

_KEYS = ("version", "target", "seed", "held_out", "passes")


@dataclass(frozen=True)
class Recipe:
    """Passes in order, the target that they compress for, and the seed of everything random (None: the caller's)."""

    passes: tuple[Pass, ...]
    target: str = "cpu"
    seed: int | None = None
    version: int = 1
    #: share of the calibration samples that no pass sees, because a search was, or is, held to them (None: none)
    held_out: float | None = None
    #: what the recipe was loaded from, for messages; no part of the recipe
    source: str = field(default="recipe", compare=False)

    def pipeline(self) -> Pipeline:
        """The passes as one pass."""
        from onnxcompress.pipeline import Pipeline

        return Pipeline(self.passes)

    @property
    def needs_data(self) -> bool:
        """True where a pass reads calibration data."""
        return any(p.needs_data for p in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data: what :meth:`to_yaml` writes. Options at their default are left out."""
        head: dict[str, Any] = {"version": self.version, "target": self.target}
        if self.seed is not None:
            head["seed"] = self.seed
        if self.held_out is not None:
            head["held_out"] = self.held_out
        passes = [{p.name: p.model_dump(mode="json", exclude_defaults=True)} for p in self.passes]
        return {**head, "passes": passes}

    def to_yaml(self) -> str:
        """YAML that :func:`parse_recipe` reads back to an equal recipe; the same recipe gives the same text."""
        text: str = yaml.dump(
            self.to_dict(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True
        )
        return text


class _Dumper(yaml.SafeDumper):
    """Never writes anchors: the reader refuses them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def load_recipe(source: str | os.PathLike[str] | Recipe, *, trusted: bool = False) -> Recipe:
    """The named recipe or the recipe file ``source``; write ``./int8`` for a file with the name of a recipe.

    ``trusted``: as in :func:`parse_recipe`.

    Raises:
        RecipeError: there is neither, or the recipe is malformed.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, str) and source in RECIPES:
        text = (resources.files("onnxcompress") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
        return parse_recipe(text, source)
    path = Path(source)
    if not is_file(path):
        close = get_close_matches(str(source), RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"named recipes: {', '.join(RECIPES)}"
        raise RecipeError(f"no recipe named {short(str(source))} and no such file; {hint}")
    return parse_recipe(read_text(path), str(path), trusted=trusted)


def parse_recipe(text: str, source: str = "recipe", *, trusted: bool = False) -> Recipe:
    """The recipe written in ``text``; ``source`` names it in messages.

    Options that name files (:attr:`~onnxcompress.base.Pass.file_options`) may only name some below the current folder,
    unless the recipe is ``trusted``: whoever wrote it would otherwise choose where files are made and which are read.

    Raises:
        RecipeError: the text is no YAML or no recipe.
    """
    if len(text) > SIZE_LIMIT:
        raise RecipeError(f"{source}: longer than the {SIZE_LIMIT} characters that a recipe may have")
    document = Document(source)
    data = document.read(text)
    if not isinstance(data, dict):
        raise document.error((), "expected a mapping with the keys version, target and passes")
    for key in data:
        if key not in _KEYS:
            raise document.error((key,), f"unknown key{_did_you_mean(key, _KEYS)}")
    if "version" not in data:
        raise document.error((), "the key 'version' is missing; write: version: 1")
    if data["version"] != 1 or isinstance(data["version"], bool):
        raise document.error(("version",), f"found {data['version']!r}; this release reads version 1")
    target = data.get("target", "cpu")
    if not isinstance(target, str):
        raise document.error(("target",), f"expected a name, found {target!r}")
    _check_target(document, target)
    seed = data.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise document.error(("seed",), f"expected an integer >= 0, found {seed!r}")
    share = data.get("held_out")
    if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1):
        raise document.error(("held_out",), f"expected a number between 0 and 1, found {share!r}")
    entries = data.get("passes")
    if not isinstance(entries, list) or not entries:
        raise document.error(("passes",), "expected a list of passes, each `name: {options}` or a bare name")
    passes = tuple(_read_pass(document, i, entry, trusted) for i, entry in enumerate(entries))
    return Recipe(passes, target, seed, 1, share, source)


def with_decisions(recipe: Recipe, report: PassReport) -> Recipe:
    """``recipe`` with what was decided by measuring written into the options, so that a replay repeats it.

    ``report`` is the report of ``recipe.pipeline()`` on some model.
    """
    if len(report.children) != len(recipe.passes):
        raise UsageError(
            f"the report has {len(report.children)} passes and the recipe {len(recipe.passes)}; give the recipe's own"
        )
    passes = []
    for step, child in zip(recipe.passes, report.children, strict=True):
        options = {**step.model_dump(mode="json", exclude_defaults=True), **child.decisions}
        passes.append(type(step).model_validate(options) if child.decisions else step)
    return replace(recipe, passes=tuple(passes))


def with_exclusions(recipe: Recipe, exclude: Sequence[str]) -> Recipe:
    """``recipe`` with ``exclude`` added to what its passes leave alone: operator types, node names and patterns.

    Raises:
        UsageError: no pass of the recipe can exclude operators.
    """
    if not exclude:
        return recipe
    if not all(exclude):
        raise UsageError("--exclude is empty; give an operator type, a node name or a pattern")
    from onnx import defs

    options = (
        ("exclude_operators", [e for e in exclude if defs.has(e)]),
        (
            "exclude_nodes",
            [e for e in exclude if not defs.has(e)],
        ),
    )
    passes = []
    for step in recipe.passes:
        given = step.model_dump(mode="json", exclude_defaults=True)
        for name, values in options:
            if values and name in type(step).model_fields:
                given[name] = list(dict.fromkeys([*given.get(name, []), *values]))
        passes.append(type(step).model_validate(given))
    if passes == list(recipe.passes) and not any("exclude_nodes" in type(p).model_fields for p in passes):
        raise UsageError(f"recipe {recipe.source!r} has no pass that can exclude operators; drop --exclude")
    return replace(recipe, passes=tuple(passes))


def unmatched_exclusions(recipe: Recipe, graphs: Sequence[Graph]) -> list[str]:
    """A line for each exclusion of ``recipe`` that matches no node of ``graphs``: most often a typing mistake."""
    nodes = [node for graph in graphs for node in (*graph.nodes, *(n for g in graph.subgraphs(True) for n in g.nodes))]
    names, operators = {node.name for node in nodes}, {node.op for node in nodes}
    messages = []
    for step in recipe.passes:
        options = step.model_dump()
        for pattern in options.get("exclude_nodes", ()):
            if pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
                close = get_close_matches(pattern, [*names, *operators], n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "; inspect lists the nodes"
                messages.append(f"{pattern!r} excludes nothing: no node and no operator is called so{hint}")
        messages += [
            f"{operator!r} excludes nothing: the model has no such operator"
            for operator in options.get("exclude_operators", ())
            if operator not in operators
        ]
    return messages


def option_error(error: ValidationError, cls: type[Pass]) -> tuple[Position, str]:
    """Where the first error lies in the options of ``cls``, and what is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    path: Position = tuple(first["loc"])
    if first["type"] == "extra_forbidden" and len(path) == 1:
        text = f"unknown option{_did_you_mean(str(path[0]), tuple(cls.model_fields))}"
    else:
        message = str(first["msg"]).replace("a valid tuple", "a list")
        text = " ".join(f"{message[:1].lower()}{message[1:]}".split())
        if first["type"] != "missing":
            text += f", found {short(first['input'])}"
    return path, text


def _check_target(document: Document, target: str) -> None:
    from onnxcompress.targets import get_target

    try:
        get_target(target)
    except UsageError as error:
        raise document.error(("target",), str(error)) from error


def _read_pass(document: Document, index: int, entry: Any, trusted: bool) -> Pass:
    where: Position = ("passes", index)
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise document.error(where, f"expected one `name: {{options}}` or a bare name, found {short(entry)}")
    name, options = next(iter(entry.items()))
    if name not in PASSES:
        raise document.error((*where, name), f"unknown pass{_did_you_mean(name, tuple(PASSES))}")
    where = (*where, name)
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise document.error(where, f"expected a mapping of options, found {short(options)}")
    cls: type[Pass] = load_pass(name)
    try:
        made = cls.model_validate(options)
    except ValidationError as error:
        path, text = option_error(error, cls)
        raise document.error((*where, *path), text) from error
    for option in sorted(cls.file_options):
        file = getattr(made, option)
        if not trusted and file is not None and not _lies_below(str(file)):
            raise document.error(
                (*where, option),
                f"found {short(str(file))}; a recipe file names files below the current folder, without '..'; "
                "give --trusted where the recipe is your own",
            )
    return made


def _lies_below(path: str) -> bool:
    """True where ``path`` is relative and does not lead upwards, by the rules of any system."""
    windows = PureWindowsPath(path)
    return not windows.anchor and ".." not in windows.parts  # a path of POSIX from the root has an anchor there, too


def _did_you_mean(found: str, known: Sequence[str]) -> str:
    close = get_close_matches(found, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(known)}" if known else "; there are none"
