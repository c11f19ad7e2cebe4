"""How a start begins: with or without a run in the directory, and with keys that it changes."""

from pathlib import Path

import pytest
from lab_runs import changed, log_steps, start, start_and_end
from resume_runs import contents

from megatron_rl.lab.run import RunDir
from megatron_rl.lab.run_records import History, RunDirError, write_records

# ---- keys that a resume changes --------------------------------------------------------------------------------


def test_each_key_that_a_resume_changes_is_a_line(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    assert not (tmp_path / "changes.jsonl").exists()
    more = changed(train__steps=20, optim__lr=2e-6)
    first: list[tuple[int, str, object, object]] = [
        (9, "optim.lr", "1.0e-06", "2.0e-06"),
        (9, "train.steps", "10", "20"),
    ]
    assert start_and_end(tmp_path, more, resume=True) == first
    then: tuple[int, str, object, object] = (12, "rollout.servers.urls", [], ["http://a", "http://b"])
    most = changed(train__steps=20, optim__lr=2e-6, rollout__servers__urls=["http://a", "http://b"])
    assert start_and_end(tmp_path, most, resume=True, last_step=12) == [*first, then]
    made = start(tmp_path, more, resume=True, last_step=15)
    made.close()
    said = "rollout.servers.urls: [http://a, http://b] up to step 15, [] from then on"
    assert [str(each) for each in made.run.changes] == [said]


def test_a_resume_from_an_earlier_checkpoint_takes_changes_of_later_steps_back(tmp_path: Path) -> None:
    """Else the file would say that steps were made with a value that they were not made with."""
    other = changed(optim__lr=2e-6)
    start_and_end(tmp_path)
    assert start_and_end(tmp_path, other, resume=True, last_step=5) == [(5, "optim.lr", "1.0e-06", "2.0e-06")]
    assert start_and_end(tmp_path, other, resume=True, last_step=3) == [(3, "optim.lr", "1.0e-06", "2.0e-06")]
    kept = tmp_path / "history" / "1" / "changes.jsonl"
    assert kept.read_bytes().startswith(b'{"step":5,')
    # From before the change, with the value that the run began with: nothing has changed.
    assert start_and_end(tmp_path, resume=True, last_step=2) == []
    last = changed(optim__lr=3e-6)
    assert start_and_end(tmp_path, last, resume=True, last_step=4) == [(4, "optim.lr", "1.0e-06", "3.0e-06")]
    # Once more from this checkpoint, with another value: no step has been made with 3e-6.
    assert start_and_end(tmp_path, other, resume=True, last_step=4) == [(4, "optim.lr", "1.0e-06", "2.0e-06")]


def test_a_resume_that_is_repeated_keeps_its_lines(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    start_and_end(tmp_path, changed(optim__lr=2e-6), resume=True)
    before = (tmp_path / "changes.jsonl").read_bytes()
    start_and_end(tmp_path, changed(optim__lr=2e-6), resume=True)
    assert (tmp_path / "changes.jsonl").read_bytes() == before
    assert [each.name for each in (tmp_path / "history").iterdir()] == ["0"], "the first resume's records alone"


def test_a_change_is_known_even_if_the_start_dies_after_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(path: Path, config: str, history: History) -> None:
        write_records(path, config, history)
        raise KeyboardInterrupt

    start_and_end(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("megatron_rl.lab.run.write_records", dies)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, changed(optim__lr=2e-6), resume=True, last_step=5)
    (tmp_path / "owner-000002.json").unlink()  # as if the process were gone
    expected = [(5, "optim.lr", "1.0e-06", "2.0e-06")]
    assert start_and_end(tmp_path, changed(optim__lr=2e-6), resume=True, last_step=5) == expected


@pytest.mark.parametrize("line", ["", "{", "[]", '{"step": 1, "key": "a"}', '{"step": "1", "time": 0, "key": "a"}'])
def test_a_damaged_line_of_changes_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    start_and_end(tmp_path)
    start_and_end(tmp_path, changed(optim__lr=2e-6), resume=True)
    with (tmp_path / "changes.jsonl").open("a") as file:
        file.write(f"{line}\n")
    before = contents(tmp_path)
    with pytest.raises(RunDirError, match=r"changes\.jsonl, line 2: expected an object with step, time, key, old"):
        RunDir.open(tmp_path, changed(), resume=True)
    assert contents(tmp_path) == before


# ---- start or go on ----------------------------------------------------------------------------------------------


def opened(path: Path) -> bool:
    """Returns whether `--resume auto` goes on with a run."""
    run = RunDir.open(path, changed(), resume="auto")
    run.close()
    return run.resumes


@pytest.mark.parametrize(
    "left", ["nothing", "", "logs/server-0.log", "owner-000003.json", "versions.json", "weights/", "fork.json"]
)
def test_auto_begins_a_run_if_there_is_none(tmp_path: Path, left: str) -> None:
    """In a directory that is not there, or is empty, or has what a failed start has left."""
    path = tmp_path / "run"
    if left != "nothing":
        path.mkdir()
        file = path / left
        file.parent.mkdir(exist_ok=True)
        if left and not left.endswith("/"):
            file.write_text('{"ended": 1}')
    assert opened(path) is False
    start_and_end(path, resume="auto")
    assert (path / "config.yaml").exists()
    assert not (path / "fork.json").exists()
    assert opened(path) is True


def test_auto_goes_on_with_a_run_under_the_same_rules_as_resume(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    assert start_and_end(tmp_path, changed(train__steps=20), resume="auto") == [(9, "train.steps", "10", "20")]
    with pytest.raises(RunDirError, match="another configuration"):
        RunDir.open(tmp_path, changed(seed=8), resume="auto")


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/step-000001/manifest.json", "metrics.jsonl"])
def test_auto_refuses_a_directory_with_something_else(tmp_path: Path, name: str) -> None:
    """The rest of a run without its config.yaml, too: to begin anew would hide that the run is damaged."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=f"not an empty directory: {name.partition('/')[0]} is in it"):
        RunDir.open(tmp_path, changed(), resume="auto")
    assert contents(tmp_path) == before


def test_auto_makes_the_steps_again_of_a_run_that_never_had_a_checkpoint(tmp_path: Path) -> None:
    """A job that is killed before its first checkpoint is requeued with the same command."""
    made = start(tmp_path)
    for step in (1, 2):
        made.log(step, 0, step - 1, {"loss": 1.0})
    made.close()
    run = RunDir.open(tmp_path, changed(), resume=True)
    assert "no whole checkpoint, but 2 lines" in run.refuses_step_0()
    run.close()
    run = RunDir.open(tmp_path, changed(), resume="auto")
    assert run.refuses_step_0() == ""
    assert "no whole checkpoint" in run.refuses_step_0(had_checkpoint=True), "a damaged one may be mended"
    run.begin(-1)
    run.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert len((tmp_path / "history" / "0" / "metrics.jsonl").read_bytes().splitlines()) == 2


def test_auto_refuses_to_lose_a_checkpoint(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 2)
    made.close()
    run = RunDir.open(tmp_path, changed(), resume="auto")
    assert "no whole checkpoint, but 4 lines" in run.refuses_step_0()
    run.close()


def test_a_run_has_ended_once_its_models_of_the_last_step_are_written(tmp_path: Path) -> None:
    made = start(tmp_path)
    (tmp_path / "model").mkdir()
    made.close()

    def ended_after() -> int | None:
        run = RunDir.open(tmp_path, changed(), resume=True)
        run.close()
        return run.ended_after

    assert ended_after() is None
    made.run.end(3, ["model", "critic"])
    assert ended_after() is None, "the critic is missing"
    (tmp_path / "critic").mkdir()
    assert ended_after() == 3
    (tmp_path / "checkpoints" / "step-000002").mkdir()
    assert ended_after() is None, "the newest checkpoint has been deleted, to go on from the one before"
    (tmp_path / "checkpoints" / "step-000003").mkdir()
    assert ended_after() == 3
    start_and_end(tmp_path, resume=True)
    assert ended_after() is None, "the run has gone on: model/ may be of any step until it ends again"
