"""The directory of a study: what it refuses, what several processes may do at once, what it says of results."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import orjson
import pytest
from study_files import outcomes

from megatron_rl.study.fingerprint import differences, source_digests
from megatron_rl.study.outcome import RunOutcome
from megatron_rl.study.planning import Plan, PlannedRun
from megatron_rl.study.study_dir import StudyDir, StudyError, verdict_of
from megatron_rl.study.study_file import StudyFile

NOW = {"megatron_rl": {"a.py": "1", "b.py": "2"}, "model": {"m": "3"}}


@pytest.fixture
def study(tmp_path: Path) -> StudyFile:
    return StudyFile.model_validate(
        {
            "question": "?",
            "hypothesis": "!",
            "source": "a test",
            "directory": tmp_path / "s",
            "base": "base.yaml",
            "seeds": (0, 1),
            "arms": {"a": {}, "b": {}},
            "metrics": {"m": {"name": "loss"}},
            "rule": {"kind": "threshold", "metric": "m", "arm": "a", "confirms": {"min": 1}},
            "also": {"other": {"kind": "threshold", "metric": "m", "arm": "b", "confirms": {"min": 1}}},
        }
    )


def planned(results: list[RunOutcome], needs: str | None = None) -> list[PlannedRun]:
    config: Any = None
    return [
        PlannedRun(number, each.run, each.arm, each.seed, {}, 1, needs, config) for number, each in enumerate(results)
    ]


def opened(study: StudyFile, fingerprint: dict[str, dict[str, str]] | None = None) -> StudyDir:
    return StudyDir.open(Plan(study, (), (), (), {}), b"question: ?\n", fingerprint or NOW)


# ---- the start -------------------------------------------------------------------------------------------------


def test_the_study_file_is_kept_byte_for_byte(study: StudyFile) -> None:
    assert (opened(study).path / "study.yaml").read_bytes() == b"question: ?\n"
    assert opened(study).path == study.directory  # and is gone on with


def test_only_the_first_of_several_processes_begins_a_study(study: StudyFile) -> None:
    """All others go on with it if they have the same files, and are refused if not."""
    refused: list[str] = []

    def begin(number: int) -> None:
        try:
            opened(study, {"model": {"m": str(number % 2)}})
        except StudyError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 8
    assert all("model: m has changed" in each for each in refused)
    assert sorted(path.name for path in study.directory.iterdir() if path.name.startswith(".")) == []


def test_a_directory_with_other_files_is_refused(study: StudyFile) -> None:
    study.directory.mkdir()
    (study.directory / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match=r"is not empty and holds no study, but notes\.txt; name a new directory"):
        opened(study)
    assert [path.name for path in study.directory.iterdir()] == ["notes.txt"]


def test_a_start_that_broke_off_can_be_repeated(study: StudyFile) -> None:
    """It was killed after it had written the fingerprint alone."""
    opened(study)
    whole = sorted(study.directory.rglob("*"))
    for path in reversed(whole):
        if path.name != "fingerprint.json":
            path.rmdir() if path.is_dir() else path.unlink()
    opened(study)
    assert sorted(study.directory.rglob("*")) == whole


def test_a_refused_start_changes_no_file(study: StudyFile) -> None:
    opened(study)
    with pytest.raises(StudyError):
        StudyDir.open(Plan(study, (), (), (), {}), b"question: other\n", {"study file": {"s": "other"}})
    assert (study.directory / "study.yaml").read_bytes() == b"question: ?\n"


def test_the_error_names_what_has_changed(study: StudyFile) -> None:
    opened(study)
    with pytest.raises(StudyError) as refused:
        opened(study, {"megatron_rl": {"a.py": "1", "b.py": "9", "c.py": "1"}, "model": {}})
    assert "megatron_rl: b.py has changed, c.py was added" in str(refused.value)
    assert "model: m was removed" in str(refused.value)
    (study.directory / "fingerprint.json").write_bytes(b"{")
    with pytest.raises(StudyError, match=r"fingerprint\.json: not JSON"):
        opened(study)


def test_many_changes_are_counted() -> None:
    old, new = ({"x": {str(n): value for n in range(9)}} for value in "ab")
    assert differences(old, new) == ["x: 0 has changed, 1 has changed, 2 has changed and 6 more"]
    assert differences(old, old) == []


def test_code_and_presets_are_the_package(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/x.py", "y.yaml", "z.txt", "a/x.pyc"):
        (tmp_path / name).write_text("1")
    before = source_digests(tmp_path)
    assert list(before) == ["a/x.py", "y.yaml"]
    (tmp_path / "y.yaml").write_text("2")
    assert source_digests(tmp_path)["y.yaml"] != before["y.yaml"]


# ---- results ---------------------------------------------------------------------------------------------------


def test_results_are_in_the_order_of_the_plan_and_the_verdict_waits_for_all(study: StudyFile) -> None:
    directory = opened(study)
    results = outcomes("a", [2.0, 3.0]) + outcomes("b", [0.5, 2.0])
    runs = planned(results)
    for each in (results[3], results[0], results[2]):
        directory.record(each)
    verdict = directory.refresh(study, runs)
    lines = [orjson.loads(line) for line in directory.results_file.read_bytes().splitlines()]
    assert [line["run"] for line in lines] == ["a-seed-0", "b-seed-0", "b-seed-1"]
    assert (verdict["verdict"], verdict["left"]) == ("incomplete", 1)
    assert verdict["text"].startswith("1 of 4 runs are left; so far: underpowered: ")
    directory.record(results[1])
    verdict = directory.refresh(study, runs)
    assert verdict == orjson.loads(directory.verdict_file.read_bytes())
    assert (verdict["verdict"], verdict["done"], verdict["left"]) == ("confirmed", 4, 0)
    assert verdict["also"]["other"]["verdict"] == "undecided"
    assert directory.read_results(runs) == {each.run: each for each in results}


def test_a_result_that_comes_while_results_are_written_is_not_lost(
    study: StudyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another task records its result after this one has read all results, and before this one has written them."""
    directory = opened(study)
    results = outcomes("a", [2.0, 3.0])
    directory.record(results[0])
    replace = StudyDir._replace

    def late(self: StudyDir, name: str, content: bytes) -> None:
        if name == "results.jsonl" and not self.has_result("a-seed-1"):
            self.record(results[1])
        replace(self, name, content)

    monkeypatch.setattr(StudyDir, "_replace", late)
    assert directory.refresh(study, planned(results))["done"] == 2
    assert len(directory.results_file.read_bytes().splitlines()) == 2


def test_a_run_that_waits_for_a_failed_one_is_not_left(study: StudyFile) -> None:
    source = outcomes("a", [None])[0]
    runs = planned([source]) + planned(outcomes("b", [1.0]), needs="a-seed-0")
    assert verdict_of(study, runs, [source])["left"] == 0
    stopped = dataclasses.replace(source, status="stopped")
    assert verdict_of(study, runs, [stopped])["left"] == 1
    assert verdict_of(study, runs, [source])["left_out"] == 1
    third = dataclasses.replace(planned(outcomes("c", [1.0]), needs="b-seed-0")[0], needs_model=True)
    assert verdict_of(study, [*runs, third], [source])["left"] == 0  # the chain breaks at its first link
    starts = [runs[0], dataclasses.replace(runs[1], needs_model=True)]
    assert verdict_of(study, starts, [stopped])["left"] == 0  # it has saved rollouts, and made no model
    assert verdict_of(study, starts, [dataclasses.replace(source, status="done")])["left"] == 1
    late = dataclasses.replace(source, status="done", reason="max_minutes")
    assert verdict_of(study, starts, [late])["left"] == 0  # it had no time to make one
    assert verdict_of(study, runs, [late])["left"] == 1


def test_rules_see_the_runs_that_were_left_out(study: StudyFile) -> None:
    """Two seeds confirm, and the third could not be done: that is not `all seeds`."""
    results = outcomes("a", [2.0, 2.0, 2.0])
    assert verdict_of(study, planned(results), results)["verdict"] == "confirmed"
    collect = outcomes("collect", [None])
    runs = planned(collect) + planned(results[:2]) + planned(results[2:], needs="collect-seed-0")
    found = verdict_of(study, runs, [*collect, *results[:2]])
    assert (found["verdict"], found["left"], found["left_out"]) == ("underpowered", 0, 1)


def test_a_damaged_result_is_named(study: StudyFile) -> None:
    directory = opened(study)
    (directory.path / "results" / "a-seed-0.json").write_bytes(b"[")
    with pytest.raises(StudyError, match=r"a-seed-0\.json: not a result .*remove it to do the run again"):
        directory.read_results(planned(outcomes("a", [1.0])))


# ---- one run ---------------------------------------------------------------------------------------------------


def test_a_run_has_one_owner_and_is_done_once(study: StudyFile) -> None:
    directory = opened(study)
    with (
        directory.claim("a-seed-0") as mine,
        directory.claim("a-seed-0") as second,
        directory.claim("b-seed-0") as other,
    ):
        assert (mine, second, other) == (True, False, True)
    with directory.claim("a-seed-0") as again:
        assert again
        directory.record(outcomes("a", [1.0])[0])
    with directory.claim("a-seed-0") as ended:
        assert not ended


def test_a_try_with_a_checkpoint_is_resumed_and_one_without_is_moved_away(study: StudyFile) -> None:
    directory = opened(study)
    assert directory.make_way("a-seed-0") is False
    run_dir = directory.path / "runs" / "a-seed-0"
    for number in range(2):
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(str(number))
        assert directory.make_way("a-seed-0") is False
        assert not run_dir.exists()
        assert (directory.path / "abandoned" / f"a-seed-0-{number}" / "config.yaml").read_text() == str(number)
    checkpoint = run_dir / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (run_dir / "config.yaml").touch()
    assert directory.make_way("a-seed-0") is True
    assert checkpoint.is_dir()


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ((), {"rollouts"}),
        (("model",), {"rollouts", "model", "critic"}),
        (("checkpoints",), {"rollouts", "checkpoints"}),
    ],
)
def test_an_ended_run_keeps_what_the_study_asks_for(study: StudyFile, keep: tuple[str, ...], left: set[str]) -> None:
    directory = opened(study)
    for name in ("rollouts", "checkpoints", "model", "critic"):
        (directory.path / "runs" / "a-seed-0" / name).mkdir(parents=True)
    directory.prune("a-seed-0", keep)
    assert {path.name for path in (directory.path / "runs" / "a-seed-0").iterdir()} == left
