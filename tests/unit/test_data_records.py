"""A record as a verifier gets it: the values that JSON has."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pytest

from megatron_rl.data.files import DataError
from megatron_rl.data.records import Record, read_records


def plain(**values: Any) -> dict[str, Any]:
    return Record("data.jsonl:1", "data.jsonl:1", values).plain()


def test_all_fields_of_a_line_are_kept_with_plain_numbers(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"q": "2+2", "score": 1.10, "tests": [{"in": 1, "out": [2.5, null]}], "easy": true}\n')
    (record,) = read_records(file)
    found = record.plain()
    assert found == {"q": "2+2", "score": 1.1, "tests": [{"in": 1, "out": [2.5, None]}], "easy": True}
    assert type(found["score"]) is type(found["tests"][0]["out"][0]) is float
    assert orjson.loads(orjson.dumps(found)) == found


def test_values_of_tables_become_what_json_has() -> None:
    day = datetime.date(2026, 1, 2)
    found = plain(at=datetime.datetime(2026, 1, 2, 3), day=day, of=[("a", Decimal("0.5"))])
    assert found == {"at": "2026-01-02T03:00:00", "day": "2026-01-02", "of": [["a", 0.5]]}


@pytest.mark.parametrize(
    ("value", "told"), [(b"png", "is of type bytes"), (2**63, "is beyond the integers of 64 bits")]
)
def test_a_value_that_no_verifier_can_be_given_names_its_column(value: object, told: str) -> None:
    with pytest.raises(DataError, match=f"data.jsonl:1: image: {told}"):
        plain(image={"bytes": [value]})
