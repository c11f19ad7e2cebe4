"""Finds a verifier or an environment by its name: a built-in one, or a user's own in a module."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any


def find_named(what: str, name: str, built_in: Mapping[str, str], form: str) -> Any:
    """Returns what `name` names: a key of `built_in`, whose values are written `form`, as a user's own is.

    Raises LookupError, which says what there is, or why it cannot be imported.
    """
    module, colon, attribute = built_in.get(name, name).partition(":")
    if not colon:
        close = difflib.get_close_matches(name, built_in, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(built_in)}."
        raise LookupError(f"{what} {name!r}: no such {what}; {hint} Your own is written {form}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"{what} {name!r}: {error}") from None
