"""The digest of a data set: equal if and only if records and their order are equal."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest

from megatron_rl.data.files import DataError
from megatron_rl.data.prompts import data_digest

LINES = '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+1=", "answer": "3"}\n'


def jsonl(path: Path, text: str = LINES) -> str:
    path.write_text(text)
    return str(path)


def saved(path: Path, answers: list[int]) -> str:
    datasets.Dataset.from_dict({"answer": answers}).save_to_disk(str(path), num_shards=2)
    return str(path)


def test_a_copy_under_another_name_has_the_same_digest(tmp_path):
    digest = data_digest(jsonl(tmp_path / "data.jsonl"))
    assert digest == data_digest(jsonl(tmp_path / "other.jsonl"))
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64


@pytest.mark.parametrize(
    "changed",
    [
        LINES + '{"prompt": "9+9=", "answer": "18"}\n',
        LINES.replace('"3"', '"4"'),
        LINES[:-1],
        "".join(LINES.splitlines(True)[::-1]),
    ],
)
def test_every_change_of_a_file_changes_the_digest(tmp_path, changed):
    assert data_digest(jsonl(tmp_path / "a.jsonl")) != data_digest(jsonl(tmp_path / "b.jsonl", changed))


def test_the_digest_of_a_directory_covers_all_data_files_in_order(tmp_path):
    digests = set()
    for name, parts in {"whole": ["ab"], "cut": ["a", "b"], "turned": ["b", "a"]}.items():
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            jsonl(tmp_path / name / f"part-{number}.jsonl", part)
        (tmp_path / name / "README.md").write_text(name)
        digests.add(data_digest(str(tmp_path / name)))
    assert len(digests) == 3


def test_the_digest_of_a_saved_data_set_covers_only_its_rows(tmp_path):
    source = saved(tmp_path / "a", [1, 2, 3])
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "dataset_info.json").write_text("{}")
    assert data_digest(str(copy)) == data_digest(source)
    assert data_digest(saved(tmp_path / "b", [1, 2, 4])) != data_digest(source)


def test_the_digest_of_the_arithmetic_task_depends_only_on_its_values():
    assert data_digest("arithmetic:") == data_digest("arithmetic:seed=0,terms=9")
    assert data_digest("arithmetic:count=20001") != data_digest("arithmetic:")


def test_a_missing_source_has_no_digest(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        data_digest(str(tmp_path / "none.jsonl"))
