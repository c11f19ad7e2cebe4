"""The run directory on resume: allowed changes of its configuration, and files cut back to a checkpoint."""

import errno
from pathlib import Path

import pytest
from lab_runs import changed, events, log_steps, start, start_and_end, without_time

from megatron_rl.config.load import dump_config
from megatron_rl.config.schema import Config
from megatron_rl.lab.run import RunDir, read_metrics
from megatron_rl.lab.run_records import RunDirError


def test_resume_requires_an_existing_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Start without --resume"):
        RunDir.open(tmp_path / "a", changed(), resume=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"train__steps": 20},
        {"eval__every": 5},
        {"optim__max_skipped": 9},
        {"rollout__dynamic_sampling__max_refills": 9},
        {"rollout__servers__urls": ["http://localhost:1"]},
        {"run_dir": "elsewhere/a"},
        {"merged_presets": []},
        {"optim__lr": 2e-6},
        {"optim__schedule": "cosine", "optim__decay_steps": 9, "optim__min_lr": 0.0, "optim__warmup_steps": 2},
    ],
)
def test_resume_lets_some_keys_change_and_keeps_the_earlier_records(tmp_path: Path, change: dict) -> None:
    start_and_end(tmp_path)
    start_and_end(tmp_path, changed(**change), resume=True)
    assert (tmp_path / "config.yaml").read_text() == changed(**change)
    assert (tmp_path / "history" / "0" / "config.yaml").read_text() == changed()
    assert (tmp_path / "history" / "0" / "versions.json").exists()
    start_and_end(tmp_path, resume=True)
    assert (tmp_path / "history" / "1" / "config.yaml").read_text() == changed(**change)


def test_resume_without_changes_adds_no_history(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    start_and_end(tmp_path, resume=True)
    assert not (tmp_path / "history").exists()


def test_resume_refuses_another_configuration_and_names_every_key(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    other = changed(
        optim__lr=2e-6,
        optim__weight_decay=0.1,
        train__mini_batches=4,
        train__steps=20,
        optim__betas=[0.9, 0.99],
        kl=0.1,
        rollout__dynamic_sampling=None,
    )
    with pytest.raises(RunDirError, match="another configuration") as error:
        RunDir.open(tmp_path, other, resume=True)
    message = str(error.value)
    assert "optim.weight_decay: absent in the run, 0.1 now" in message
    assert "train.mini_batches: 2 in the run, 4 now" in message
    assert "optim.betas: [0.9, 0.95] in the run, [0.9, 0.99] now" in message
    assert "kl: absent in the run, 0.1 now" in message
    assert "rollout.dynamic_sampling: absent in the run, null now" in message
    assert "train.steps:" not in message
    assert "optim.lr:" not in message
    assert (tmp_path / "config.yaml").read_text() == changed(), "a refused resume must change nothing"


def test_a_key_added_by_a_later_version_counts_as_its_default(tmp_path: Path) -> None:
    def config(coefficient: float) -> str:
        engine = {"aux_loss_coefficient": coefficient}
        keys = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": "arithmetic:"}, "train": {"steps": 1}}
        return dump_config(Config.model_validate({**keys, "engine": engine}))

    (added,) = (line for line in config(0.0).splitlines(keepends=True) if "aux_loss_coefficient" in line)
    start_and_end(tmp_path, config(0.0).replace(added, ""))
    RunDir.open(tmp_path, config(0.0), resume=True).close()
    with pytest.raises(RunDirError, match=r"engine\.aux_loss_coefficient: 0\.0 in the run, 0\.5 now"):
        RunDir.open(tmp_path, config(0.5), resume=True)


def test_a_key_that_the_run_alone_has_is_refused(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    (tmp_path / "config.yaml").write_text(changed() + "forgotten: 1\n")
    with pytest.raises(RunDirError, match="forgotten: 1 in the run, absent now"):
        RunDir.open(tmp_path, changed(), resume=True)


def test_a_key_that_shares_a_prefix_with_a_changeable_key_is_compared(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    with pytest.raises(RunDirError, match=r"evaluation\.every"):
        RunDir.open(tmp_path, changed(evaluation={"every": 1}), resume=True)


def test_files_of_a_resumed_run_equal_an_uninterrupted_run(tmp_path: Path) -> None:
    straight = start(tmp_path / "straight")
    log_steps(straight, 1, 6)
    straight.close()

    broken = start(tmp_path / "broken")
    log_steps(broken, 1, 4)
    broken.log(5, 0, 4, {"loss": -1.0})  # step 5 is interrupted after its first mini-batch
    broken.close()
    with broken.run.metrics_file.open("ab") as file:
        file.write(b'{"step":5,"mini_ba')
    resumed = start(tmp_path / "broken", resume=True, last_step=3)
    log_steps(resumed, 4, 6)
    resumed.close()

    assert without_time(resumed.run.metrics_file) == without_time(straight.run.metrics_file)
    assert without_time(resumed.run.eval_file) == without_time(straight.run.eval_file)
    assert without_time(resumed.run.checkpoints_file) == without_time(straight.run.checkpoints_file)
    assert without_time(straight.run.checkpoints_file)[-1] == {"step": 6, "time/checkpoint": 3.0}
    assert events(resumed.run.path, "loss") == events(straight.run.path, "loss")
    assert events(resumed.run.path, "eval/accuracy") == events(straight.run.path, "eval/accuracy")
    assert [step for step, _ in events(straight.run.path, "loss")] == list(range(1, 13))


def test_resume_cuts_files_by_rollout_step_and_keeps_removed_lines(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 3)
    made.close()
    for step in (1, 2, 3):
        (made.run.rollouts / f"step-{step:06d}-dp-0000.jsonl").write_text(str(step))
        made.run.tokens.mkdir(exist_ok=True)
        (made.run.tokens / f"step-{step:06d}-dp-0000.parquet").write_text(str(step))
    (made.run.checkpoints / "step-000003").mkdir()
    whole = {
        file.name: file.read_bytes() for file in (made.run.metrics_file, made.run.eval_file, made.run.checkpoints_file)
    }

    resumed = RunDir.open(tmp_path, changed(), resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole, "cut before there is a checkpoint"
    resumed.begin(2, [made.run.checkpoints / "step-000003"])
    assert [(line["step"], line["mini_batch"]) for line in read_metrics(made.run.metrics_file)] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert [line["step"] for line in read_metrics(made.run.eval_file)] == [1, 2]
    history = tmp_path / "history" / "0"
    assert {name: (tmp_path / name).read_bytes() + (history / name).read_bytes() for name in whole} == whole
    assert sorted(file.name[:11] for file in made.run.rollouts.iterdir()) == ["step-000001", "step-000002"]
    assert (history / "rollouts" / "step-000003-dp-0000.jsonl").read_text() == "3"
    assert sorted(file.name[:11] for file in made.run.tokens.iterdir()) == ["step-000001", "step-000002"]
    assert (history / "tokens" / "step-000003-dp-0000.parquet").read_text() == "3"
    assert (history / "checkpoints" / "step-000003").is_dir()
    resumed.close()


def test_an_abandoned_resume_changes_nothing(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 3)
    made.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    RunDir.open(tmp_path, changed(train__steps=20), resume=True).close()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "left", [["logs/server-0.log"], ["owner-000003.json", "versions.json", ".config.yaml.partial"], ["checkpoints/"]]
)
def test_files_left_by_a_failed_start_are_not_a_run(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text('{"ended": 1}')
    made = start(tmp_path)
    assert (tmp_path / "config.yaml").exists()
    made.close()


def test_resume_without_a_checkpoint_is_refused_if_lines_would_be_lost(tmp_path: Path) -> None:
    made = start(tmp_path)
    assert made.run.refuses_step_0() == ""
    log_steps(made, 1, 3)
    assert "no whole checkpoint, but 6 lines in metrics.jsonl" in made.run.refuses_step_0()
    made.run.pending.mkdir()
    (made.run.pending / "group-000000000.jsonl").touch()  # groups are deleted once a checkpoint has them
    assert "no whole checkpoint" in made.run.refuses_step_0()
    made.run.checkpoints_file.unlink()
    assert made.run.refuses_step_0() == ""
    made.close()


def test_tensorboard_events_survive_a_resume(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    made = start(tmp_path, resume=True)
    log_steps(made, 1, 2)
    made.close()
    made = start(tmp_path, resume=True, last_step=2)
    log_steps(made, 3, 3)
    made.close()
    assert [step for step, _ in events(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]


def test_a_line_that_cannot_be_written_is_reported_without_raising(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log_steps(made, 1, 1)
    before = made.run.metrics_file.read_bytes()
    monkeypatch.setattr(Path, "open", full)
    made.log(2, 0, 1, {"loss": 1.0})
    monkeypatch.undo()
    assert "the line of step 2 in metrics.jsonl was not written" in made.journal.failure
    assert "no space left on device" in made.journal.failure
    assert made.run.metrics_file.read_bytes() == before
    made.close()


def test_a_run_that_lost_its_directory_writes_no_line(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 1)
    before = made.run.metrics_file.read_bytes()
    (tmp_path / "owner-000002.json").write_text("{}")  # another process took it
    made.log(2, 0, 1, {"loss": 1.0})
    assert made.run.metrics_file.read_bytes() == before
    assert "belongs to" in made.journal.failure
