"""Every pass as a command of its own; its options are the pass's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from onnxcompress.cli.files import check_files, finish, one_process_writes
from onnxcompress.cli.options import (
    MODEL,
    data_options,
    judge_options,
    option_group,
    output_option,
    output_options,
    parsed_preprocess,
    trust_options,
)
from onnxcompress.cli.terminal import Terminal
from onnxcompress.errors import UsageError
from onnxcompress.passes import PASSES, load_pass

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from onnxcompress.base import Pass

__all__ = ["pass_command"]


def pass_command(name: str) -> click.Command:
    """The command of one pass; its options are the pass's fields."""
    cls = load_pass(name)
    fields = {field: _field_option(field, info) for field, info in cls.model_fields.items()}

    def callback(model: str, report: str | None, verify: bool, **options: Any) -> None:
        terminal = click.get_current_context().ensure_object(Terminal)
        given = {field: options.pop(field) for field in fields}
        step = _make_pass(cls, {field: value for field, value in given.items() if value is not None})
        check_files(model, {**given, **options}, report)
        options["preprocess"] = parsed_preprocess(options["preprocess"])
        from onnxcompress.compress import compress as run
        from onnxcompress.destination import checked_destination
        from onnxcompress.recipe import Recipe

        checked_destination(options["output"], {"the teacher": given.get("teacher"), "the model": model})
        recipe = Recipe((step,), source=name)
        with one_process_writes(terminal, options) as writes:
            result = run(
                model,
                recipe=recipe,
                max_drop=None,
                benchmark=False,
                verify=verify,
                progress=terminal.progress,
                check=False,
                **options,
            )
        finish(terminal, result, report if writes else None)

    shared = option_group(output_option, data_options, judge_options, _verify_option, trust_options, output_options)
    command = click.command(name, help=_help(cls), short_help=PASSES[name].summary)(shared(callback))
    command.params[:0] = [click.Argument(["model"], type=MODEL), *fields.values()]
    return command


_verify_option = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare the outputs with the original's."
)


def _help(cls: type[Pass]) -> str:
    return (cls.__doc__ or "").strip().split("\n\n")[0]


def _make_pass(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    from pydantic import ValidationError

    from onnxcompress.recipe import option_error

    try:
        return cls.model_validate(options)
    except ValidationError as error:
        path, text = option_error(error, cls)
        raise UsageError(f"--{'.'.join(str(part) for part in path).replace('_', '-')}: {text}") from error


def _field_option(name: str, info: FieldInfo) -> click.Option:
    """The option for one field; what click has no type for is given as YAML, as in a recipe."""
    from typing import Literal, get_args, get_origin

    flag = "--" + name.replace("_", "-")
    annotation: Any = info.annotation
    arguments = [a for a in get_args(annotation) if a is not type(None)]
    if type(None) in get_args(annotation) and len(arguments) == 1:
        annotation = arguments[0]
    told = f"{info.description.removesuffix('.')}." if info.description else ""
    if not info.is_required() and info.default not in (None, (), [], {}):
        told = f"{told} Default: {getattr(info.default, 'value', info.default)}.".strip()
    if annotation is bool:
        return click.Option([f"{flag}/--no-{name.replace('_', '-')}", name], default=None, help=told)
    origin = get_origin(annotation)
    if origin is Literal and all(isinstance(value, str) for value in get_args(annotation)):
        return click.Option([flag, name], type=click.Choice(get_args(annotation)), default=None, help=told)
    if origin in (tuple, list, frozenset, set) and get_args(annotation)[:1] == (str,):
        return click.Option([flag, name], multiple=True, callback=_none_if_empty, help=f"{told} Repeatable.".strip())
    if annotation in (int, float, str):
        return click.Option([flag, name], type=annotation, default=None, help=told)
    return click.Option([flag, name], default=None, metavar="YAML", callback=_yaml, help=told)


def _none_if_empty(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    return value or None


def _yaml(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    if value is None:
        return None
    from onnxcompress.plain_yaml import parse_yaml

    return parse_yaml(value, param.opts[0])
