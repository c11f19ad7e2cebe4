"""What the error of a user's own code says: its type, its text, and the file and line of that code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rl.named_code import ResultError, import_own, told

MINE = """\
import json
from wrapping import wrapped

def converts(): return float("four")
def asserts(): assert 1 == 2
def reads(): return json.loads("{")
def long(): raise KeyError("x" * 5000)
def odd(): raise ValueError("\\ud800")

class Mute(Exception):
    def __str__(self): raise RuntimeError

def mute(): raise Mute

@wrapped
def wraps(): return 1 / 0

def helps():
    import helping
    return helping.help()
"""
HELPING = "\n\ndef help(): return {}['gone']\n"
WRAPPING = """\
def wrapped(function):
    def inner(): return function()
    return inner

def raises(): raise OSError("no disk")
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], BaseException]:
    """Returns a call of a function, by its name, which returns what it raises."""
    installed = tmp_path / "lib" / "site-packages"
    installed.mkdir(parents=True)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helping.py").write_text(HELPING)
    (installed / "wrapping.py").write_text(WRAPPING)
    for directory in (tmp_path, installed):
        monkeypatch.syspath_prepend(directory)
    for module in ("mine", "helping", "wrapping"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    def call(name: str) -> BaseException:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            import_own(name)()
        # Without this function, which is own code too.
        return caught.value.with_traceback(caught.tb.tb_next)

    return call


@pytest.mark.parametrize(
    ("name", "said", "place"),
    [
        ("mine:converts", "ValueError: could not convert string to float: 'four'", "mine.py, line 4"),
        ("mine:asserts", "AssertionError", "mine.py, line 5"),
        ("mine:mute", "Mute", "mine.py, line 13"),
        ("mine:odd", "ValueError: ?", "mine.py, line 8"),
        ("mine:wraps", "ZeroDivisionError: division by zero", "mine.py, line 16"),
        ("mine:helps", "KeyError: 'gone'", "helping.py, line 3"),
        ("wrapping:raises", "OSError: no disk", "lib/site-packages/wrapping.py, line 5"),
    ],
)
def test_an_exception_has_its_type_and_its_place(
    code: Callable[[str], BaseException], tmp_path: Path, name: str, said: str, place: str
) -> None:
    assert told(code(name)) == f"{said} ({tmp_path}/{place})"


def test_the_place_is_not_that_of_a_library_which_the_code_calls(
    code: Callable[[str], BaseException], tmp_path: Path
) -> None:
    assert told(code("mine:reads")).startswith("JSONDecodeError: Expecting property name")
    assert told(code("mine:reads")).endswith(f" ({tmp_path}/mine.py, line 6)")


def test_a_long_text_is_cut_and_its_place_is_not(code: Callable[[str], BaseException], tmp_path: Path) -> None:
    said = told(code("mine:long"))
    assert said.endswith(f"xxx ({tmp_path}/mine.py, line 7)")
    assert len(said) < 700


def test_what_a_result_should_have_been_needs_no_type_and_no_place() -> None:
    with pytest.raises(ResultError) as caught:
        raise ResultError("expected a number")
    assert told(caught.value) == "expected a number"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nraise ValueError('no key')", "ValueError: no key ({file}, line 2)"),
        ("import not_there", "No module named 'not_there' ({file}, line 1)"),
        ("def f(:", "SyntaxError: invalid syntax (broken.py, line 1)"),
    ],
)
def test_a_module_that_cannot_be_imported_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LookupError) as caught:
        import_own("broken:f")
    assert str(caught.value) == said.format(file=file)
    with pytest.raises(LookupError, match=r"^No module named 'nowhere_at_all'$"):
        import_own("nowhere_at_all:f")
    for name in (":f", "broken:"):
        with pytest.raises(LookupError, match="a module, a colon and a name in it"):
            import_own(name)
