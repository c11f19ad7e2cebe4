"""The run directory: creating it, refusing existing ones, and writing and reading its lines."""

import errno
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_runs import Started, changed, events, log_steps, start, start_and_end

from megatron_rl import disk
from megatron_rl.disk import DiskError
from megatron_rl.lab.console import Console
from megatron_rl.lab.journal import Journal
from megatron_rl.lab.owner import Owner
from megatron_rl.lab.run import RunDir, read_metrics
from megatron_rl.lab.run_records import RunDirError

# ---- create and refuse -------------------------------------------------------------------------------------


def test_create_freezes_configuration_versions_and_commit(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    made = start(path)
    assert (path / "config.yaml").read_text() == changed()
    versions = json.loads((path / "versions.json").read_text())
    assert torch.__version__.startswith(versions["torch"])  # without the build's local part, such as +cu130
    assert {
        "python",
        "megatron-core",
        "transformers",
        "sglang",
        "megatron_rl",
        "platform",
        "cpu_count",
    } <= set(versions)
    assert all(directory.is_dir() for directory in (made.run.rollouts, made.run.checkpoints, made.run.logs))
    assert not list(path.glob(".*")), "a partial file was left behind"


def test_create_accepts_an_empty_directory(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("exists", [False, True])
def test_a_start_that_fails_leaves_the_directory_as_it_was(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    RunDir.open(path, changed(), resume=False).close()
    assert path.exists() is exists
    assert not exists or not any(path.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_a_start_that_fails_keeps_the_logs_of_its_servers_elsewhere(
    tmp_path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    run = RunDir.open(path, changed(), resume=False)
    for name in ("logs", "weights", "wandb", "pending"):
        (path / name).mkdir()
    (run.logs / "server-0.log").write_text("out of memory")
    run.close()
    assert path.exists() is exists
    assert not exists or not any(path.iterdir())
    (kept,) = (tmp_path / "tmp").iterdir()
    assert (kept / "server-0.log").read_text() == "out of memory"
    assert f"{run.logs} is now {kept}" in capsys.readouterr().err


def test_a_start_that_fails_leaves_what_an_earlier_one_has_left(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server-0.log").write_text("mine")
    RunDir.open(tmp_path, changed(), resume=False).close()
    assert [each.name for each in tmp_path.rglob("*")] == ["logs", "server-0.log"]


def test_a_start_removes_nothing_of_a_run_that_another_process_begins_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, take = tmp_path / "run", Owner.take

    def take_later(directory: Path) -> Owner:
        monkeypatch.undo()
        made = start(directory)
        (made.run.logs / "server-0.log").write_text("of the other run")
        made.close()
        return take(directory)

    monkeypatch.setattr(Owner, "take", take_later)
    with pytest.raises(FileExistsError, match="not an empty directory"):
        RunDir.open(path, changed(), resume=False)
    assert (path / "logs" / "server-0.log").read_text() == "of the other run"
    assert (path / "config.yaml").exists()
    assert (path / "checkpoints").is_dir()


def test_a_start_that_cannot_take_the_directory_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("megatron_rl.lab.run.Owner.take", full)
    with pytest.raises(DiskError, match="no space left"):
        RunDir.open(tmp_path / "run", changed(), resume=False)
    assert not (tmp_path / "run").exists()


def test_create_refuses_a_directory_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt is in it\. Name another run_dir") as error:
        RunDir.open(tmp_path, changed(), resume=False)
    assert str(tmp_path) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("left", ["rollouts/step-000001-dp-0000.jsonl", "checkpoints/step-000001/manifest.json"])
def test_a_directory_with_rollouts_or_checkpoints_is_not_empty(tmp_path: Path, left: str) -> None:
    """Even if the records of the run that wrote them are gone."""
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).touch()
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        RunDir.open(tmp_path, changed(), resume=False)


def test_a_new_run_takes_no_groups_of_a_start_that_failed(tmp_path: Path) -> None:
    (tmp_path / "pending").mkdir()
    (tmp_path / "pending" / "group-000000000.jsonl").touch()
    run = RunDir.open(tmp_path, changed(), resume=False)
    run.begin()
    run.close()
    assert not (tmp_path / "pending").exists()


def test_create_refuses_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        RunDir.open(file, changed(), resume=False)
    assert file.read_text() == "mine"


def test_an_interrupted_start_leaves_nothing_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml is written last, so an incomplete start never looks like a run."""
    replaced: list[str] = []
    replace = disk.os.replace

    def replace_until_config(source: Path, target: Path) -> None:
        if target.name == "config.yaml":
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced.append(target.name)
        replace(source, target)

    monkeypatch.setattr(disk.os, "replace", replace_until_config)
    broken = RunDir.open(tmp_path / "a", changed(), resume=False)
    with pytest.raises(DiskError, match=r"was not written: .*no space left on device; .* free there\. Free some space"):
        broken.begin()
    monkeypatch.undo()
    broken.close()
    assert "versions.json" in replaced
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        RunDir.open(tmp_path / "a", changed(), resume=True)
    start(tmp_path / "a").close()  # and it does not block the next start


# ---- lines -------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_skipped_when_read_and_removed_on_resume(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 1)
    made.close()
    whole = made.run.metrics_file.read_bytes()
    made.run.metrics_file.write_bytes(whole + b'{"step":2,"loss":0.')
    assert [line["step"] for line in read_metrics(made.run.metrics_file)] == [1, 1]
    start_and_end(tmp_path, resume=True)
    assert made.run.metrics_file.read_bytes() == whole


def test_each_logged_line_is_complete_in_the_file_at_once(tmp_path: Path) -> None:
    made = start(tmp_path)
    for step in range(1, 4):
        made.log(step, 0, 0, {f"metric/{i}": float(i) for i in range(2000)})
        content = made.run.metrics_file.read_bytes()
        assert content.endswith(b"}\n")
        assert content.count(b"\n") == step


def test_sync_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 1)
    synced = []
    monkeypatch.setattr(
        "megatron_rl.lab.sinks.os.fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink())
    )
    made.journal.sync()
    assert {file.name for file in synced} >= {"metrics.jsonl", "eval.jsonl"}


def test_a_metrics_line_has_its_tags_and_plain_numbers(tmp_path: Path) -> None:
    made = start(tmp_path)
    values = {"a": np.float32(0.5), "b": torch.tensor(2.5), "tokens": 7, "c": np.int64(3)}
    made.log(4, 1, 3, values)  # type: ignore[arg-type]
    (line,) = read_metrics(made.run.metrics_file)
    assert line.pop("time") > 1.6e9
    assert line == {
        "step": 4,
        "mini_batch": 1,
        "weight_version": 3,
        "a": 0.5,
        "b": 2.5,
        "tokens": 7,
        "c": 3.0,
    }
    assert isinstance(line["tokens"], int)


def test_non_finite_values_become_null_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = start(tmp_path)
    with caplog.at_level(logging.WARNING):
        made.log(1, 0, 0, {"loss": float("nan"), "kl": 1.0})
        made.log(2, 0, 0, {"loss": float("inf"), "kl": float("-inf")})
    assert [(line["loss"], line["kl"]) for line in read_metrics(made.run.metrics_file)] == [
        (None, 1.0),
        (None, None),
    ]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "metric loss is nan at step 1",
        "metric kl is -inf at step 2",
    ]
    made.close()
    assert events(tmp_path, "kl") == [(1, 1.0)]


def test_a_metric_cannot_have_the_name_of_a_tag(tmp_path: Path) -> None:
    made = start(tmp_path)
    with pytest.raises(ValueError, match="'weight_version' has the name of a tag"):
        made.log(1, 0, 0, {"weight_version": 3})
    assert not made.run.metrics_file.exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    created = start(tmp_path)
    log_steps(created, 1, 2)
    created.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    attached = Started(RunDir.attach(tmp_path), Journal(Console(10, shows=False)))
    assert attached.run.checkpoints == created.run.checkpoints
    log_steps(attached, 3, 3)
    attached.close()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("bad", [b"not json\n", b"[1]\n", b'{"loss": 1}\n'])
def test_the_error_names_the_file_and_the_bad_line(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step":1}\n' + bad + b'{"step":2}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl, line 2"):
        read_metrics(file)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"step": 1, "loss": "high"}', "line 1: loss is 'high'; expected a number. Remove it."),
        ('{"step": 1, "loss": [1, 2]}', "line 1: loss is [1, 2]; expected a number"),
        ('{"step": 1, "loss": true}', "line 1: loss is True; expected a number"),
        ('{"step": 1, "mini_batch": 0.5}', "line 1: mini_batch is 0.5; expected a number"),
    ],
)
def test_an_edited_line_is_an_error_that_names_it(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{line}\n")
    with pytest.raises(RunDirError) as error:
        read_metrics(file)
    assert words in str(error.value)
