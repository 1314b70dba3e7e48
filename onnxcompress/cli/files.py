"""What commands read and write besides models: checked before any work, written at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from onnxcompress.cli.options import parsed_preprocess
from onnxcompress.cli.terminal import Terminal

if TYPE_CHECKING:
    from onnxcompress.compress import CompressResult

__all__ = [
    "check_files",
    "check_models",
    "check_pages",
    "check_written",
    "finish",
    "numbered",
    "one_process_writes",
    "open_samples",
    "write_pages",
]


def check_files(
    model: str,
    options: Mapping[str, Any],
    report: str | None,
    save_recipe: str | None = None,
    pages: Sequence[str] = (),
) -> None:
    """Refuse files that cannot be written, or that would replace one that is read or written too, before any work."""
    others = {"the model": model, "the output": options["output"]}
    named = {"data": "data", "eval_data": "evaluation data", "recipe": "recipe", "evaluate": "evaluator"}
    named |= {"teacher": "teacher", "checkpoint": "checkpoint"}
    others |= {f"the {what}": options.get(name) for name, what in {**named, "preprocess": "preprocessing"}.items()}
    check_written({"the report": report, "the saved recipe": save_recipe, **numbered("page", pages)}, others, [model])


def numbered(what: str, paths: Sequence[str]) -> dict[str, str]:
    return {f"{what} {number}": path for number, path in enumerate(paths, 1)}


def check_written(files: Mapping[str, str | None], others: dict[str, Any], models: Sequence[str]) -> None:
    """Refuse ``files`` that would replace one of ``others``, of each other, or of what belongs to ``models``."""
    from onnxcompress.destination import checked_destination
    from onnxcompress.io import model_files

    for what, path in files.items():
        if path is not None:
            if checked_destination(path, others).exists():
                for model in models:
                    checked_destination(path, {f"the model's {file.name}": file for file in model_files(model)})
            others[what] = path


def check_pages(pages: Sequence[str]) -> None:
    """Refuse pages that cannot be made, before any work."""
    if pages:
        from onnxcompress.pages import check_page

        for page in pages:
            check_page(page)


def write_pages(pages: Sequence[str], document: Callable[[Any], Any], full: Mapping[str, Any]) -> None:
    """Write every page of a report; pages are made from what its JSON file would hold."""
    import json

    from onnxcompress.pages import render_page
    from onnxcompress.report import to_json, write_text

    plain = json.loads(to_json(full))
    made = document(plain)
    for page in pages:
        write_text(page, render_page(page, made, plain["tool"]))


def finish(terminal: Terminal, result: CompressResult, report: str | None, pages: Sequence[str] = ()) -> None:
    """Print and write what there is to tell, then raise the budget that was missed."""
    from onnxcompress.report import compress_report, print_compress, to_json, write_text

    full = compress_report(result) if terminal.json or report is not None or pages else None
    if report is not None and result.after is not None:
        write_text(report, to_json(full) + "\n")
    if pages and full is not None and result.after is not None:
        from onnxcompress.pages import compress_document

        write_pages(pages, lambda plain: compress_document(plain, result.recipe.to_yaml()), full)
    if terminal.quiet:
        terminal.warn(result.warnings)
    print_compress(terminal.human, result)
    terminal.result(full)
    if result.failure is not None:
        raise result.failure


@contextmanager
def one_process_writes(terminal: Terminal, options: dict[str, Any]) -> Iterator[bool]:
    """Of the processes that torchrun started the first one writes and speaks (True); the others work for it."""
    if os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ:
        yield True
        return
    import tempfile
    from pathlib import Path

    terminal.silent, terminal.quiet, terminal.json = True, True, False
    with tempfile.TemporaryDirectory(prefix="onnxcompress-") as folder:
        options["output"] = Path(folder) / "other.onnx"
        yield False


def check_models(
    terminal: Terminal, models: Sequence[str], *, trusted: bool, target: str = "cpu", hard_links: bool = False
) -> None:
    """Open models in a child process first, unless they are trusted."""
    from onnxcompress.probe import limits_note, probe_models, probes

    if not trusted and probes(target):
        note = limits_note()
        if note is not None:
            terminal.warn([note])
        probe_models(models, hard_links=hard_links)


def open_samples(
    terminal: Terminal,
    model: str,
    other: str,
    *,
    hard_links: bool,
    data: str | None,
    preprocess: str | None,
    batch: int | None,
    samples: int | None,
    seed: int | None,
) -> Any:
    """The samples of ``--data``, or made-up ones that fit the inputs of ``model``."""
    from onnxcompress.data import open_data, synthetic_data
    from onnxcompress.graph import input_specs
    from onnxcompress.io import load, model_bytes

    graph = load(model, trusted=hard_links)
    model_bytes(other)  # there, before any work
    specs = input_specs(graph)
    if data is None:
        terminal.warn(["no --data: the samples are random"])
        return synthetic_data(specs, graph=graph, samples=samples or 16, batch=batch or 1, seed=seed or 0)
    return open_data(data, specs, batch=batch, preprocess=parsed_preprocess(preprocess), limit=samples)
