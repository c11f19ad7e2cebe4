"""JSON lines are read strictly: either correctly, or with one error that names the line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.data.files import DataError
from megatron_rl.data.records import read_records

GOOD = b'{"prompt": "1+1=", "answer": "2"}\n'


@pytest.fixture
def records(tmp_path):
    """Returns a function that reads bytes as a JSONL file."""

    def read(data: bytes) -> list:
        (tmp_path / "data.jsonl").write_bytes(data)
        return list(read_records(tmp_path / "data.jsonl"))

    return read


@pytest.mark.parametrize(
    "digits",
    [
        "0.00001",
        "1e22",
        "6.02e23",
        "1.10",
        "10000000000000000.0",
        "18446744073709551616",
        "-0.5E-3",
        "9" * 4000,
        "1e400",
    ],
)
def test_a_number_keeps_its_original_digits(records, digits):
    (record,) = records(b'{"answer": %s}' % digits.encode())
    assert record.text("answer") == digits
    assert record.values["answer"] == float(digits) or len(digits) > 400


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.booleans() | st.none())
def test_values_equal_the_output_of_the_json_module(value):
    from megatron_rl.data.json_lines import parse_json

    assert parse_json(json.dumps({"answer": [value]})) == {"answer": [value]}


def test_blank_lines_byte_order_mark_and_crlf_are_ignored(records):
    found = records(b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n \t\n" + GOOD.strip())
    assert [(record.where[-2:], record.text("answer")) for record in found] == [(":1", "2"), (":4", "2")]


def test_a_character_beyond_16_bits_may_be_escaped(records):
    (record,) = records(b'{"prompt": "\\ud83d\\ude00\\\\ud83d"}')
    assert record.text("prompt") == "\U0001f600\\ud83d"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'prompt': 1}", "not JSON: Expecting property name .* at column 2"),
        (b'{"prompt": "1+1=", "ans', "not JSON: Unterminated string"),
        (b'{"prompt": 1} {"prompt": 2}', "not JSON: Extra data at column 15"),
        (b'{"prompt": "\xff"}', "not UTF-8, at byte 13 of the line"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"prompt": ["\\uDC00x"]}', "half of a surrogate pair"),
        (b'{"prompt": "a\0b"}', "null bytes"),
        (b"\0" * 100, "null bytes: the file was not written or copied whole"),
        (b'{"prompt": "a", "prompt": "b"}', "the field 'prompt' is given twice"),
        (b'{"prompt": [{"role": "user", "role": "user"}]}', "the field 'role' is given twice"),
        (b'{"answer": NaN}', "NaN is no number in JSON"),
        (b'{"answer": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"answer": 010}', "not JSON"),
        (b'{"answer": ' + b"9" * 5000 + b"}", "a number of 5000 digits; give it as text"),
        (b'{"answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'[{"prompt": "a"}]', "found list; expected one object per line"),
        (b"[", "not JSON: .*; expected one object per line"),
        (b"{", "not JSON: .*; expected one object per line"),
        (b'"text"', "expected an object with fields, found str"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\x0c", "not JSON"),
    ],
)
def test_the_error_names_a_wrong_line(records, line, message):
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}") as caught:
        records(GOOD + line + b"\n")
    assert len(str(caught.value)) < 600


def test_the_error_names_another_encoding(records):
    with pytest.raises(DataError, match=r"data\.jsonl:1: the file is UTF-16; save it as UTF-8"):
        records(GOOD.decode().encode("utf-16"))
