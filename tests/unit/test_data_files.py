"""The files of a data set. An incomplete or ambiguous data set gives one error."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_rl.data.files import DataError, find_files
from megatron_rl.data.records import read_records

LINE = '{"prompt": "p", "answer": "1"}\n'


@pytest.fixture
def make(tmp_path):
    """Makes files in a directory, each with one row that holds its stem. Returns the directory."""

    def write(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                pq.write_table(pa.table({"prompt": [path.stem], "answer": ["1"]}), path)
            elif path.suffix == ".arrow":
                with pa.ipc.new_stream(path, pa.schema({"prompt": pa.string()})) as stream:
                    stream.write(pa.record_batch({"prompt": [path.stem]}))
            else:
                path.write_text(json.dumps({"prompt": path.stem}) + "\n")
        return tmp_path

    return write


def prompts(path: Path) -> list[str]:
    return [record.values["prompt"] for record in read_records(path)]


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet"],
        ["test.parquet"],
        ["b.parquet", "a.parquet"],
        ["gsm8k_train.parquet", "math_train.parquet"],
        ["part-00000-5c1-c000.snappy.parquet", "part-00002-5c1-c000.snappy.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-00000-of-00002-0123456789abcdef.parquet", "train-00001-of-00002-fedcba9876543210.parquet"],
        ["gsm8k-train-00000-of-00001.arrow"],
        ["train_0.jsonl", "train_1.jsonl"],
        ["train_1_of_2.jsonl", "train_2_of_2.jsonl"],
        ["a.ndjson", "b.jsonlines"],
        ["attestation.jsonl", "develop.jsonl"],  # no split's name is in them
    ],
)
def test_files_of_one_split_are_read_in_name_order(make, names):
    folder = make(*names, "README.md", "dataset_infos.json", ".hidden.parquet", "._train.parquet", "_metadata.parquet")
    make("_SUCCESS", ".cache/other.parquet", "_delta_log/other.parquet", "train.parquet.bak")
    assert prompts(folder) == [Path(name).stem for name in sorted(names)]


@pytest.mark.parametrize(
    "names",
    [
        ["train.parquet", "test.parquet"],
        ["gsm8k_train.parquet", "gsm8k_test.parquet"],
        ["train.jsonl", "validation.jsonl"],
        ["train.jsonl", "dev.jsonl"],
        ["TRAIN.jsonl", "Eval.jsonl"],
        ["train-v2.arrow", "val-v2.arrow"],
        ["math.heldout.jsonl", "math.train.jsonl"],
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        ["easy-00000-of-00001.parquet", "hard-00000-of-00001.parquet"],
        ["train-00000-of-00001.parquet", "extra.parquet"],
    ],
)
def test_files_of_several_splits_are_not_mixed(make, names):
    with pytest.raises(DataError, match="holds files of several splits") as caught:
        prompts(make(*names))
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], "without train-00001-of-00003.parquet"),
        (["data_1_of_2.jsonl"], "without data_0_of_2.jsonl"),
        (["t-00000-of-00001.arrow", "t-00000-of-00002.arrow", "t-00001-of-00002.arrow"], "several sets of shards"),
        (["t-00000-of-00001-0123456789abcdef.arrow", "t-00000-of-00001-fedcba9876543210.arrow"], "shard 0 twice"),
        (["t-00000-of-00001.arrow", "t-00001-of-00001.arrow"], "2 of 1 shards, numbered beyond"),
        (["t-00000-of-00000.arrow"], "1 of 0 shards, numbered beyond"),
        (["t-0-of-99999999999999999999.arrow"], "without t-1-of-99999999999999999999.arrow"),
        (["a.parquet", "b.jsonl"], r"several formats \(a.parquet, b.jsonl\)"),
        (["train/0.parquet", "test/0.parquet"], "in folders; name one of .*/test, .*/train"),
        (["data/train-00000-of-00001.parquet"], "in folders; name one of .*/data"),
        (["default/train/0.parquet", "default/test/0.parquet"], "in folders; name one of .*/default/test"),
        (["train.parquet", "old/train.parquet"], "and folders with more; name one of .*/old, or a file"),
        (["train.parquet", "more/train.parquet.part"], "and folders with more; name one of .*/more, or a file"),
        (["a.parquet", "b.parquet.incomplete"], "b.parquet.incomplete: is an unfinished download"),
        (["a.jsonl", "b.jsonl.tmp"], "b.jsonl.tmp: is an unfinished download"),
        (["a.jsonl", "b.jsonl.gz"], "b.jsonl.gz: is compressed"),
        (["notes.txt", "data.csv"], "no Parquet or Arrow or JSONL files in it; it has data.csv, notes.txt"),
    ],
)
def test_an_incomplete_or_ambiguous_directory_gives_one_error(make, names, message):
    with pytest.raises(DataError, match=message):
        prompts(make(*names))


def test_the_error_names_a_broken_link(make):
    folder = make("a.jsonl")
    (folder / "b.jsonl").symlink_to("blobs/b")
    with pytest.raises(DataError, match=r"b\.jsonl: links to a file that is not there"):
        prompts(folder)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (gzip.compress(LINE.encode(), mtime=0), "is compressed with gzip"),
        (b"\x28\xb5\x2f\xfd\0", "is compressed with zstd"),
    ],
)
def test_the_error_says_what_a_file_holds_if_it_is_not_data(tmp_path, suffix, content, message):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    for source in (path, tmp_path):
        with pytest.raises(DataError, match=rf"data\{suffix}: {message}"):
            prompts(source)


def test_the_error_names_a_file_whose_suffix_does_not_match_its_format(make, tmp_path):
    folder = make("a.parquet")
    (folder / "a.parquet").rename(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: holds Parquet data; name it \*\.parquet"):
        prompts(tmp_path / "a.jsonl")
    with zipfile.ZipFile(tmp_path / "a.json", "w") as archive:
        archive.writestr("a", LINE)
    with pytest.raises(DataError, match=r"a\.json: is a zip archive"):
        prompts(tmp_path / "a.json")


@pytest.mark.parametrize("path", ["no/such", "a\0b", "x" * 5000, ""])
def test_a_path_that_does_not_exist_gives_one_short_error(path, tmp_path):
    with pytest.raises(DataError) as caught:
        find_files(tmp_path / path)
    assert len(str(caught.value)) < 600


def test_the_error_names_an_unreadable_file(make, monkeypatch):
    path = make("a.jsonl") / "a.jsonl"

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl.*: cannot be read: Permission denied"):
        prompts(path)


# ---- written by save_to_disk -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]}).save_to_disk(str(tmp_path / "qa"), num_shards=2)
    return tmp_path / "qa"


def test_a_saved_data_set_consists_of_the_files_in_its_state(saved):
    (saved / "data-00000-of-00001.arrow").write_bytes(b"left from an older save")
    assert prompts(saved) == ["a", "b", "c"]
    assert [record.where for record in read_records(saved)] == [f"{saved}: row {i}" for i in range(3)]


def test_a_saved_data_set_without_a_state_is_read_as_shards(saved):
    (saved / "state.json").unlink()
    assert prompts(saved) == ["a", "b", "c"]
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"without data-00001-of-00002\.arrow"):
        prompts(saved)


def test_the_error_names_a_file_missing_from_a_saved_data_set(saved):
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: no such file, but state\.json names it"):
        prompts(saved)


@pytest.mark.parametrize(
    "state",
    [
        "{",
        "[]",
        "{}",
        '{"_data_files": 3}',
        '{"_data_files": [{"filename": "../../outside.arrow"}]}',
        '{"_data_files": [{"filename": 3}]}',
        '{"_data_files": [{"filename": ""}]}',
    ],
)
def test_the_error_names_a_damaged_state_file(saved, state):
    (saved / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state\.json: not the state of a saved data set"):
        prompts(saved)


def test_a_saved_data_set_with_indices_is_refused(saved):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="saved with indices by an old version"):
        prompts(saved)
