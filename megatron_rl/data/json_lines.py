"""Reads JSON lines strictly: a line that JSON does not allow, or that has two readings, is an error with its number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rl.data.files import DataError, unreadable
from megatron_rl.data.numbers import Real

_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BLANK = b" \t\r\n"


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line numbers, from 1, and objects. Numbers that are not whole keep their digits (Real).

    Skips blank lines, a byte order mark and the CR of CRLF. Raises DataError, which names the line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip(_BLANK):
                    yield number, _parse(line, f"{path}:{number}", first=number == 1)
    except OSError as error:
        raise unreadable(path, error) from None


def parse_json(text: str) -> Any:
    """Raises ValueError for text that is not strict JSON, and RecursionError if it is nested too deep."""
    value = _DECODER.decode(text)
    if "\\ud" in text.lower():  # half of a surrogate pair, which text cannot hold, can only be written so
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _parse(line: bytes, where: str, first: bool) -> dict[str, Any]:
    try:
        values = parse_json(line.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        encoding = (
            "UTF-16" if first and line.startswith(_UTF16) else f"not UTF-8, at byte {error.start + 1} of the line"
        )
        raise DataError(f"{where}: the file is {encoding}; save it as UTF-8") from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair (\\ud...), which is no character") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{_hint(line)}"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: not usable JSON: nested too deep") from None
    except ValueError as error:
        raise DataError(f"{where}: not usable JSON: {error}") from None
    if not isinstance(values, dict):
        hint = "; expected one object per line, not an array of them" if isinstance(values, list) else ""
        raise DataError(f"{where}: expected an object with fields, found {type(values).__name__}{hint}")
    return values


def _hint(line: bytes) -> str:
    if b"\0" in line:
        return "; it has null bytes: the file was not written or copied whole"
    if line.strip(_BLANK) in (b"[", b"{"):
        return "; expected one object per line (JSONL), not one value over many lines"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is given twice")
    return values


def _whole(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # too many digits: Python limits the time of the conversion
        raise ValueError(f"a number of {len(digits)} digits; give it as text") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON; give it as text, or leave the record out")


_DECODER = json.JSONDecoder(
    parse_float=Real, parse_int=_whole, parse_constant=_no_number, object_pairs_hook=_unique, strict=True
)
