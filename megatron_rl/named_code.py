"""Finds verifiers, environments and objectives by their names: a built-in one, or a user's own in a module."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any


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


def import_named(name: str) -> Any:
    """Imports `package.module:attribute`. Raises LookupError, which says why it cannot."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise LookupError(str(error)) from None
    except (Exception, SystemExit) as error:  # a user's module is a program, which may raise anything
        raise LookupError(f"{type(error).__name__}: {error}") from None
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise LookupError(f"{error}; the module is {getattr(found, '__file__', None) or 'a directory'}") from None
