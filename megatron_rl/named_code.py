"""Finds verifiers, environments and objectives by their names: a built-in one, or a user's own in a module. Says what
a user's code has raised, and where."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_NOBODYS = (_PACKAGE, sysconfig.get_path("stdlib") + os.sep, "<frozen ")
"""What the files of code begin with that is neither the user's nor an installed package's."""
_INSTALLED = ("site-packages", "dist-packages")
_MOST = 500
"""Characters of an exception's type and text."""


class ResultError(ValueError):
    """A user's code has returned something else than expected. The text says all: the place of the raise is ours."""


def find_named(what: str, name: str, built_in: Mapping[str, str], form: str) -> Any:
    """Returns what `name` names: a key of `built_in`, whose values are written `form`, as a user's own is.

    Raises LookupError, which says what there is, or why it cannot be imported.
    """
    if ":" not in name and name not in built_in:
        close = difflib.get_close_matches(name, built_in, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(built_in)}."
        raise LookupError(f"{what} {name!r}: no such {what}; {hint} Your own is written {form}")
    try:
        return import_named(built_in[name]) if name in built_in else import_own(name)
    except LookupError as error:
        raise LookupError(f"{what} {name!r}: {error}") from None


def import_own(name: str) -> Any:
    """Imports a user's `package.module:attribute`, which may lie in the working directory.

    The working directory comes last in the search, so that no file there hides another module. Raises LookupError.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    return import_named(name)


def own_file(name: str) -> Path | None:
    """Returns the file, or the package's directory, in which `import_own` would find a user's module, and runs nothing.
    None if it is nowhere, or if it is installed."""
    module, colon, _ = name.partition(":")
    spec = PathFinder.find_spec(module.partition(".")[0], [*sys.path, os.getcwd()]) if colon else None
    if spec is None:
        return None
    places = [each + os.sep for each in spec.submodule_search_locations or ()] or [spec.origin or ""]
    return None if places[0].startswith(_NOBODYS) or _is_installed(places[0]) else Path(places[0])


def import_named(name: str) -> Any:
    """Imports `package.module:attribute`. Raises LookupError, which says why it cannot."""
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise LookupError("a module, a colon and a name in it are expected, such as mine:judge")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise LookupError(f"{error}{_place(error)}") from None
    except (Exception, SystemExit) as error:  # a user's module is a program, which may raise anything
        raise LookupError(told(error)) from None
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise LookupError(f"{error}; the module is {getattr(found, '__file__', None) or 'a directory'}") from None


def told(error: BaseException) -> str:
    """Returns type and text of what a user's code has raised, with the file and line of that code; of a ResultError the
    text."""
    kind = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # a user's exception is a program too
        text = ""
    if isinstance(error, ResultError):
        return _printable(text)
    said = f"{kind}: {text}" if text else kind
    return _printable(f"{said[:_MOST]}{_place(error)}")


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()


def _place(error: BaseException) -> str:
    """Returns the innermost file and line of the user's own code; the outermost of an installed package if there is
    none; "" if there is neither."""
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    installed = [each for each in lines if _is_installed(each[0])]
    own = [each for each in lines if not _is_installed(each[0]) and not each[0].startswith(_NOBODYS)]
    found = own[-1:] or installed[:1]
    return "".join(f" ({file}, line {line})" for file, line in found)


def _is_installed(file: str) -> bool:
    return not file.startswith(_PACKAGE) and any(f"{os.sep}{each}{os.sep}" in file for each in _INSTALLED)
