"""Recipes: what is read, what is written, and one line for everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from onnxcompress.base import PassReport
from onnxcompress.errors import RecipeError, UsageError
from onnxcompress.passes import PASSES, load_pass
from onnxcompress.plain_yaml import SIZE_LIMIT, parse_yaml
from onnxcompress.recipe import (
    RECIPES,
    Recipe,
    load_recipe,
    parse_recipe,
    with_decisions,
    with_exclusions,
)
from onnxcompress.shapes import GraphStats

HEAD = "version: 1\n"
STATS = GraphStats(0, 0, 0, {})


def report(name: str, children: tuple[PassReport, ...] = (), **decisions: Any) -> PassReport:
    return PassReport(name, {}, (), (), decisions, STATS, STATS, 0.0, children=children)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_named_recipes_load_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    again = parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()
    assert recipe.passes


def test_int8_needs_data_and_lossless_does_not() -> None:
    assert load_recipe("int8").needs_data
    assert not load_recipe("lossless").needs_data


@pytest.mark.parametrize("name", sorted(PASSES))
def test_every_registered_pass_loads_under_its_own_name(name: str) -> None:
    cls = load_pass(name)
    assert cls.name == name
    assert cls.__module__.rpartition(".")[2] == name
    assert load_pass(name.replace("_", "-")) is cls
    assert cls().model_dump(mode="json", exclude_defaults=True) == {}


def test_unknown_pass_suggests_the_near_one() -> None:
    with pytest.raises(UsageError, match="unknown pass 'fold_batchnorm'; did you mean 'fold_batch_norm'"):
        load_pass("fold_batchnorm")


def test_a_pass_may_repeat_and_be_a_bare_name() -> None:
    recipe = parse_recipe(HEAD + "passes: [fold_constants, {fold_batch_norm: {}}, fold_constants: ]")
    assert [p.name for p in recipe.passes] == ["fold_constants", "fold_batch_norm", "fold_constants"]


def test_seed_is_kept() -> None:
    recipe = parse_recipe(HEAD + "seed: 7\npasses: [fold_constants]")
    assert recipe.seed == 7
    assert parse_recipe(recipe.to_yaml()) == recipe


ERRORS = {
    "no mapping": ("- a", "recipe:1: expected a mapping with the keys version, target and passes"),
    "empty": ("", "recipe: expected a mapping with the keys version, target and passes"),
    "no version": ("passes: [fold_constants]", "recipe:1: the key 'version' is missing; write: version: 1"),
    "version": ("version: 2\npasses: []", "recipe:1: version: found 2; this release reads version 1"),
    "version as a word": ("version: yes\npasses: []", "recipe:1: version: found True; this release reads version 1"),
    "unknown key": (HEAD + "pases: []", "recipe:2: pases: unknown key; did you mean 'passes'?"),
    "strange key": (HEAD + "x: 1", "recipe:2: x: unknown key; expected one of version, target, seed, held_out, passes"),
    "held out": (HEAD + "held_out: 1\npasses: []", "recipe:2: held_out: expected a number between 0 and 1, found 1"),
    "target": (HEAD + "target: [cpu]\npasses: []", "recipe:2: target: expected a name, found ['cpu']"),
    "unknown target": (
        HEAD + "target: gpu2\npasses: []",
        "recipe:2: target: unknown target 'gpu2'; expected one of",
    ),
    "seed": (HEAD + "seed: -1\npasses: []", "recipe:2: seed: expected an integer >= 0, found -1"),
    "no passes": (HEAD, "recipe:1: passes: expected a list of passes"),
    "passes as a mapping": (HEAD + "passes: {fold_constants: {}}", "recipe:2: passes: expected a list of passes"),
    "two passes in one entry": (
        HEAD + "passes:\n  - fold_constants: {}\n    fold_batch_norm: {}",
        "recipe:3: passes[0]: expected one `name: {options}` or a bare name, found",
    ),
    "a number for a pass": (HEAD + "passes:\n  - 3", "recipe:3: passes[0]: expected one"),
    "unknown pass": (
        HEAD + "passes:\n  - fold_constants\n  - fold_batchnorm: {}",
        "recipe:4: passes[1].fold_batchnorm: unknown pass; did you mean 'fold_batch_norm'?",
    ),
    "options as a list": (
        HEAD + "passes:\n  - fold_constants: [1]",
        "recipe:3: passes[0].fold_constants: expected a mapping of options, found [1]",
    ),
    "unknown option": (
        HEAD + "passes:\n  - fold_constants:\n      size: 3\n",
        "recipe:4: passes[0].fold_constants.size: unknown option",
    ),
    "key twice": (HEAD + "passes: []\npasses: []", "recipe:3: passes: the key is written twice; keep one"),
    "key that is no name": (HEAD + "1: 2", "recipe:1: keys are names, found '1'"),
    "alias": (HEAD + "passes: &p [fold_constants]", "recipe:2: not valid YAML: anchors and aliases are not used"),
    "python object": (
        HEAD + "target: !!python/object/apply:os.system [ls]",
        "recipe:2: target: the YAML tag 'tag:yaml.org,2002:python/object/apply:os.system' is not used in recipes",
    ),
    "python name": (HEAD + "target: !!python/name:os.system x", "recipe:2: not valid YAML: could not determine a"),
    "no YAML": (HEAD + "passes: [", "recipe:2: not valid YAML: "),
    "two documents": ("version: 1\n---\nversion: 1\n", "recipe:2: not valid YAML: but found another document"),
    "control character": ("version: \x07", "recipe: not valid YAML: "),
    "very deep": ("[" * 5000, "recipe: nested too deeply for a recipe"),
    "too long": ("#" * (SIZE_LIMIT + 1), f"recipe: longer than the {SIZE_LIMIT} characters"),
}


@pytest.mark.parametrize(("text", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_what_is_wrong_is_told_in_one_line_with_its_position(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("version: 3\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}:1: version: found 3")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe named 'int9' and no such file; did you mean 'int8'"):
        load_recipe("int9")
    binary = tmp_path / "model.onnx"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(binary)
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (SIZE_LIMIT + 1))
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(huge)


def test_a_file_with_the_name_of_a_recipe_needs_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lossless").write_text(HEAD + "passes: [fold_constants]")
    assert len(load_recipe("lossless").passes) > 1
    assert len(load_recipe("./lossless").passes) == 1


def test_yaml_from_the_command_line_is_read_as_carefully() -> None:
    assert parse_yaml("{a: [1, 2.5, x]}", "--option") == {"a": [1, 2.5, "x"]}
    with pytest.raises(RecipeError, match="--option:1: a: the key is written twice"):
        parse_yaml("{a: 1, a: 2}", "--option")


def test_decisions_override_options() -> None:
    recipe = parse_recipe(HEAD + "passes: [fold_constants, fold_constants]")
    option = next(iter(type(recipe.passes[0]).model_fields))
    value = 4096
    decided = with_decisions(
        recipe, report("pipeline", (report("fold_constants"), report("fold_constants", **{option: value})))
    )
    assert decided.passes[0] == recipe.passes[0]
    assert getattr(decided.passes[1], option) == value
    assert parse_recipe(decided.to_yaml()) == decided


def test_decisions_of_another_recipe_are_refused() -> None:
    with pytest.raises(UsageError, match="the report has 0 passes and the recipe 5"):
        with_decisions(load_recipe("lossless"), report("pipeline"))


def options_of(recipe: Recipe, name: str) -> dict[str, Any]:
    """The options of the only pass of that name."""
    (options,) = [step[name] for step in recipe.to_dict()["passes"] if isinstance(step, dict) and name in step]
    return dict(options)


def test_exclusions_reach_the_pass_that_knows_them() -> None:
    recipe = with_exclusions(load_recipe("int8"), ["Conv", "/head/*", "Conv"])
    options = options_of(recipe, "insert_qdq")
    own = {"observer": "weighted_mse"}  # what the recipe says itself
    assert options == own | {"exclude_nodes": ["/head/*"], "exclude_operators": ["Conv"]}
    again = options_of(with_exclusions(recipe, ["first", "Gemm"]), "insert_qdq")
    assert again == own | {"exclude_nodes": ["/head/*", "first"], "exclude_operators": ["Conv", "Gemm"]}


def test_exclusions_without_such_a_pass_are_refused() -> None:
    with pytest.raises(UsageError, match="drop --exclude"):
        with_exclusions(load_recipe("lossless"), ["x"])
    recipe = load_recipe("lossless")
    assert with_exclusions(recipe, []) is recipe


def test_yaml_is_plain_and_in_order() -> None:
    text = Recipe((load_pass("fold_constants")(),), seed=3).to_yaml()
    assert yaml.safe_load(text) == {"version": 1, "target": "cpu", "seed": 3, "passes": [{"fold_constants": {}}]}
    assert [line.split(":")[0] for line in text.splitlines()[:4]] == ["version", "target", "seed", "passes"]


def test_what_is_held_out_survives_a_round_trip() -> None:
    recipe = parse_recipe("version: 1\nheld_out: 0.25\npasses: [fold_constants]")
    assert recipe.held_out == 0.25
    assert parse_recipe(recipe.to_yaml()) == recipe
    assert "held_out" not in parse_recipe("version: 1\npasses: [fold_constants]").to_yaml()


@pytest.mark.parametrize(
    "number",
    ["0x" + "f" * 9000, "0" + "7" * 9000, "0b" + "1" * 9000, "9" * 9000, "1:" * 9000 + "1", "1:" * 900 + "1.5"],
)
def test_numbers_that_no_machine_reads(number: str) -> None:
    for text in (f"version: {number}", f"version: 1\npasses:\n- insert_qdq: {{search_evaluations: {number}}}"):
        with pytest.raises(RecipeError, match="cannot be read") as caught:
            parse_recipe(text)
        assert len(str(caught.value)) < 300


def test_names_that_no_file_can_have() -> None:
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(RecipeError, match="no such file"):
            load_recipe(name)


@pytest.mark.parametrize(
    "path", ["/tmp/x", "../x", "a/../../x", "C:\\x", "C:x", "\\\\host\\share\\x", "..\\x", "\\x", "//host/x"]
)
@pytest.mark.parametrize("option", ["insert_qdq: {calibration_cache", "distill: {checkpoint", "distill: {teacher"])
def test_a_recipe_of_a_stranger_names_no_file_elsewhere(option: str, path: str, tmp_path: Path) -> None:
    text = f"{HEAD}passes: [{option}: '{path}'}}]"
    name, _, key = option.partition(": {")
    with pytest.raises(RecipeError, match=rf"passes\[0\]\.{name}\.{key}: found '.*below the current folder"):
        parse_recipe(text)
    assert str(getattr(parse_recipe(text, trusted=True).passes[0], key)) == path
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="--trusted"):
        load_recipe(file)
    assert load_recipe(file, trusted=True).passes == parse_recipe(text, trusted=True).passes


@pytest.mark.parametrize("path", ["x.json", "./x.json", "a/b/x.json", "..x"])
def test_a_recipe_of_a_stranger_names_files_below(path: str) -> None:
    (step,) = parse_recipe(f"{HEAD}passes: [insert_qdq: {{calibration_cache: {path}}}]").passes
    assert step.model_dump()["calibration_cache"] == Path(path)


def test_every_option_that_names_a_file_is_known_as_one() -> None:
    for name in PASSES:
        cls = load_pass(name)
        said = {
            option
            for option, field in cls.model_fields.items()
            if "file" in (field.description or "").lower() and not str(field.annotation).startswith("dict")
        }
        assert said == cls.file_options, name
