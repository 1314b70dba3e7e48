"""Functions in the user's own files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxcompress.errors import DataError, UsageError
from onnxcompress.user_code import is_function_reference, load_function


def test_references() -> None:
    for text in ("a.py:f", "/x/y.z/a b.py:load_1", "a.py:größe"):
        assert is_function_reference(text)
    for text in ("a.py", "a.py:", "a.py:1f", "a.npz", "a.txt:f", ":f", "a.py:f.g"):
        assert not is_function_reference(text)


def test_a_file_called_like_a_module_does_not_shadow_it(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def f():\n    return 7\n")
    before = list(sys.path)
    assert load_function(f"{tmp_path}/json.py:f")() == 7
    assert sys.path == before
    import json

    assert json.loads("[1]") == [1]


def test_neighbours_can_be_imported_late(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_user_code.py").write_text("value = 3\n")
    (tmp_path / "main.py").write_text("def f(x):\n    from neighbour_of_user_code import value\n    return value + x\n")
    assert load_function(f"{tmp_path}/main.py:f")(1) == 4


def test_dataclasses_work(tmp_path: Path) -> None:
    (tmp_path / "d.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int = 1\ndef f():\n    return Point().x\n"
    )
    assert load_function(f"{tmp_path}/d.py:f")() == 1


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("def g():\n    pass\nx = 3\n", UsageError, r"has no function 'f'; found g$"),
        ("f = 3\n", UsageError, r"has no function 'f'; found no functions"),
        ("def f(:\n", DataError, r"u\.py, line 1: SyntaxError: "),
        ("\nimport no_such_module_here\n", DataError, r"u\.py, line 2: ModuleNotFoundError: No module named"),
        ("raise ValueError('a\\n  b')\n", DataError, r"u\.py, line 1: ValueError: a b$"),
        ("raise SystemExit\n", DataError, r"u\.py, line 1: SystemExit: no message"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, text: str, kind: type[Exception], message: str) -> None:
    (tmp_path / "u.py").write_text(text)
    modules = set(sys.modules)
    with pytest.raises(kind, match=message) as caught:
        load_function(f"{tmp_path}/u.py:f")
    assert "\n" not in str(caught.value)
    if kind is DataError:
        assert not [name for name in set(sys.modules) - modules if name.startswith("_onnxcompress_user_")]


def test_no_such_file_or_form(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.py: no such file"):
        load_function(f"{tmp_path}/nothing.py:f")
    with pytest.raises(UsageError, match=r"'module\.f' does not name a function; expected file\.py:function"):
        load_function("module.f")


def test_the_users_line_is_named_not_the_librarys(tmp_path: Path) -> None:
    (tmp_path / "u.py").write_text("import json\ndef f():\n    x = 1\n    return json.loads('{')\n")
    with pytest.raises(DataError, match=r"u\.py, line 4: JSONDecodeError"):
        load_function(f"{tmp_path}/u.py:f")()


def test_prints_of_the_users_code_leave_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loud.py").write_text("print('import')\ndef f():\n    print('call')\n    return 1\n")
    assert load_function(f"{tmp_path}/loud.py:f")() == 1
    assert capsys.readouterr() == ("", "import\ncall\n")


def test_wrong_arguments_name_the_users_file(tmp_path: Path) -> None:
    (tmp_path / "u.py").write_text("def f(a, b):\n    return 1\n")
    with pytest.raises(DataError, match=r"^\S*u\.py: TypeError: f\(\) missing 2 required"):
        load_function(f"{tmp_path}/u.py:f")()


def test_a_long_list_of_functions_is_cut(tmp_path: Path) -> None:
    (tmp_path / "many.py").write_text("".join(f"def f{i}(): pass\n" for i in range(40)))
    with pytest.raises(UsageError, match=r"found f0, .*, f9 and 30 more$"):
        load_function(f"{tmp_path}/many.py:g")


def test_a_file_whose_name_is_too_long() -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_function("a" * 5000 + ".py:score")
