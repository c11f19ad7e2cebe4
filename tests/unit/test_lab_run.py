"""The run directory: created once, refused, resumed, cut back to a checkpoint, and read."""

import errno
import json
import logging
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl import disk
from megatron_rl.config.load import dump_config
from megatron_rl.config.schema import Config
from megatron_rl.disk import DiskError
from megatron_rl.lab import provenance, run_records
from megatron_rl.lab.run import RunDir, read_metrics
from megatron_rl.lab.run_records import RunDirError

CONFIG = {
    "merged_presets": ["gspo"],
    "run_dir": "runs/a",
    "seed": 7,
    "optim": {"lr": 1e-6, "betas": [0.9, 0.95]},
    "train": {"steps": 10, "mini_batches": 2},
    "eval": {"every": 0},
    "rollout": {"group_size": 8, "dynamic_sampling": {"max_refills": 8}, "servers": {"urls": [], "launch": 1}},
}


def changed(**dotted: object) -> str:
    config = yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in dotted.items():
        *above, last = key.split("__")
        node = config
        for name in above:
            node = node[name]
        node[last] = value
    return yaml.safe_dump(config)


def start(path: Path, config: str | None = None, *, resume: bool = False, last_step: int = 0) -> RunDir:
    made = RunDir.open(path, config or changed(), resume)
    made.begin(last_step)
    return made


def start_and_end(path: Path, config: str | None = None, *, resume: bool = False) -> None:
    start(path, config, resume=resume, last_step=9).close()


def log_steps(run_dir: RunDir, first: int, last: int) -> None:
    for step in range(first, last + 1):
        for mini_batch in range(2):
            run_dir.log_metrics(step, mini_batch, step - 1, {"loss": step + mini_batch / 10})
        run_dir.log_eval(step, step, {"accuracy": step / 10})
        run_dir.log_checkpoint(step, {"time/checkpoint": step / 2})


def without_time(path: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(path)]


def events(path: Path, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(path / "tensorboard"))
    reader.Reload()
    return [(event.step, round(event.value, 4)) for event in reader.Scalars(tag)]


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
    assert all(directory.is_dir() for directory in (made.rollouts, made.checkpoints, made.logs))
    assert not list(path.glob(".*")), "a partial file was left behind"


def test_create_takes_an_empty_directory(tmp_path: Path) -> None:
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


def test_create_refuses_a_directory_that_holds_anything(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"Resume the run that is in it, name another run_dir") as error:
        RunDir.open(tmp_path, changed(), resume=False)
    assert str(tmp_path) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_create_refuses_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        RunDir.open(file, changed(), resume=False)
    assert file.read_text() == "mine"


def test_start_that_breaks_off_leaves_nothing_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml is the last record to be written, so a half-written start never passes for a run."""
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
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        RunDir.open(tmp_path / "a", changed(), resume=True)
    start(tmp_path / "a").close()  # nor does it stand in the way


# ---- resume ------------------------------------------------------------------------------------------------


def test_resume_needs_a_run(tmp_path: Path) -> None:
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


def test_resume_with_nothing_changed_adds_no_history(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    start_and_end(tmp_path, resume=True)
    assert not (tmp_path / "history").exists()


def test_resume_refuses_another_configuration_and_names_every_key(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    other = changed(
        optim__lr=2e-6,
        train__mini_batches=4,
        train__steps=20,
        optim__betas=[0.9, 0.99],
        kl=0.1,
        rollout__dynamic_sampling=None,
    )
    with pytest.raises(RunDirError, match="another configuration") as error:
        RunDir.open(tmp_path, other, resume=True)
    message = str(error.value)
    assert "optim.lr: 1.0e-06 in the run, 2.0e-06 now" in message
    assert "train.mini_batches: 2 in the run, 4 now" in message
    assert "optim.betas: [0.9, 0.95] in the run, [0.9, 0.99] now" in message
    assert "kl: absent in the run, 0.1 now" in message
    assert "rollout.dynamic_sampling: absent in the run, null now" in message
    assert "train.steps:" not in message
    assert (tmp_path / "config.yaml").read_text() == changed(), "a refused resume must change nothing"


def test_a_key_that_a_later_version_adds_had_its_default(tmp_path: Path) -> None:
    def config(logit_chunk_tokens: int) -> str:
        engine = {"logit_chunk_tokens": logit_chunk_tokens}
        data = {"train": "arithmetic:"}
        return dump_config(Config(run_dir="r", model={"path": "m"}, data=data, train={"steps": 1}, engine=engine))

    (added,) = (line for line in config(1024).splitlines(keepends=True) if "logit_chunk_tokens" in line)
    start_and_end(tmp_path, config(1024).replace(added, ""))
    RunDir.open(tmp_path, config(1024), resume=True).close()
    with pytest.raises(RunDirError, match=r"engine\.logit_chunk_tokens: 1024 in the run, 64 now"):
        RunDir.open(tmp_path, config(64), resume=True)


def test_keys_that_only_begin_like_a_free_one_are_compared(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    with pytest.raises(RunDirError, match=r"evaluation\.every"):
        RunDir.open(tmp_path, changed(evaluation={"every": 1}), resume=True)


def test_resumed_files_equal_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    straight = start(tmp_path / "straight")
    log_steps(straight, 1, 6)
    straight.close()

    broken = start(tmp_path / "broken")
    log_steps(broken, 1, 4)
    broken.log_metrics(5, 0, 4, {"loss": -1.0})  # step 5 breaks off after its first mini-batch
    broken.close()
    with broken.metrics_file.open("ab") as file:
        file.write(b'{"step":5,"mini_ba')
    resumed = start(tmp_path / "broken", resume=True, last_step=3)
    log_steps(resumed, 4, 6)
    resumed.close()

    assert without_time(resumed.metrics_file) == without_time(straight.metrics_file)
    assert without_time(resumed.eval_file) == without_time(straight.eval_file)
    assert without_time(resumed.checkpoints_file) == without_time(straight.checkpoints_file)
    assert without_time(straight.checkpoints_file)[-1] == {"step": 6, "time/checkpoint": 3.0}
    assert events(resumed.path, "loss") == events(straight.path, "loss")
    assert events(resumed.path, "eval/accuracy") == events(straight.path, "eval/accuracy")
    assert [step for step, _ in events(straight.path, "loss")] == list(range(1, 13))


def test_a_resume_counts_rollout_steps_not_lines_and_keeps_what_it_takes_out(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 3)
    made.close()
    for step in (1, 2, 3):
        (made.rollouts / f"step-{step:06d}-dp-0000.jsonl").write_text(str(step))
    (made.checkpoints / "step-000003").mkdir()
    whole = {file.name: file.read_bytes() for file in (made.metrics_file, made.eval_file, made.checkpoints_file)}

    resumed = RunDir.open(tmp_path, changed(), resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole, "cut before there is a checkpoint"
    resumed.begin(2, [made.checkpoints / "step-000003"])
    assert [(line["step"], line["mini_batch"]) for line in read_metrics(made.metrics_file)] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert [line["step"] for line in read_metrics(made.eval_file)] == [1, 2]
    history = tmp_path / "history" / "0"
    assert {name: (tmp_path / name).read_bytes() + (history / name).read_bytes() for name in whole} == whole
    assert sorted(file.name[:11] for file in made.rollouts.iterdir()) == ["step-000001", "step-000002"]
    assert (history / "rollouts" / "step-000003-dp-0000.jsonl").read_text() == "3"
    assert (history / "checkpoints" / "step-000003").is_dir()
    resumed.close()


def test_a_resume_that_is_given_up_changes_nothing(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 3)
    made.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    RunDir.open(tmp_path, changed(train__steps=20), resume=True).close()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "left", [["logs/server-0.log"], ["owner-000003.json", "versions.json", ".config.yaml.partial"], ["checkpoints/"]]
)
def test_what_a_failed_start_leaves_is_no_run(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text('{"ended": 1}')
    made = start(tmp_path)
    assert (tmp_path / "config.yaml").exists()
    made.close()


def test_a_resume_without_checkpoint_would_lose_lines(tmp_path: Path) -> None:
    made = start(tmp_path)
    assert made.refuses_step_0() == ""
    log_steps(made, 1, 3)
    assert "no whole checkpoint, but 6 lines in metrics.jsonl" in made.refuses_step_0()
    made.close()


def test_events_reopen_without_hiding_what_they_hold(tmp_path: Path) -> None:
    start_and_end(tmp_path)
    made = start(tmp_path, resume=True)
    log_steps(made, 1, 2)
    made.close()
    made = start(tmp_path, resume=True, last_step=2)
    log_steps(made, 3, 3)
    made.close()
    assert [step for step, _ in events(tmp_path, "loss")] == [1, 2, 3, 4, 5, 6]


def test_a_line_that_cannot_be_written_is_told_and_does_not_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log_steps(made, 1, 1)
    before = made.metrics_file.read_bytes()
    monkeypatch.setattr(Path, "open", full)
    made.log_metrics(2, 0, 1, {"loss": 1.0})
    monkeypatch.undo()
    assert "the line of step 2 in metrics.jsonl was not written" in made.failure
    assert "no space left on device" in made.failure
    assert made.metrics_file.read_bytes() == before
    made.close()


def test_an_owner_that_lost_the_directory_writes_no_line(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 1)
    before = made.metrics_file.read_bytes()
    (tmp_path / "owner-000002.json").write_text("{}")  # another process took it
    made.log_metrics(2, 0, 1, {"loss": 1.0})
    assert made.metrics_file.read_bytes() == before
    assert "belongs to" in made.failure


# ---- lines -------------------------------------------------------------------------------------------------


def test_torn_last_line_is_left_out_when_read_and_cut_on_resume(tmp_path: Path) -> None:
    made = start(tmp_path)
    log_steps(made, 1, 1)
    made.close()
    whole = made.metrics_file.read_bytes()
    made.metrics_file.write_bytes(whole + b'{"step":2,"loss":0.')
    assert [line["step"] for line in read_metrics(made.metrics_file)] == [1, 1]
    start_and_end(tmp_path, resume=True)
    assert made.metrics_file.read_bytes() == whole


def test_every_line_is_whole_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    made = start(tmp_path)
    for step in range(1, 4):
        made.log_metrics(step, 0, 0, {f"metric/{i}": float(i) for i in range(2000)})
        content = made.metrics_file.read_bytes()
        assert content.endswith(b"}\n")
        assert content.count(b"\n") == step


def test_line_carries_its_tags_and_plain_numbers(tmp_path: Path) -> None:
    made = start(tmp_path)
    values = {"a": np.float32(0.5), "b": torch.tensor(2.5), "tokens": 7, "c": np.int64(3)}
    made.log_metrics(4, 1, 3, values)  # type: ignore[arg-type]
    (line,) = read_metrics(made.metrics_file)
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


def test_values_that_are_not_finite_become_null_and_are_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = start(tmp_path)
    with caplog.at_level(logging.WARNING):
        made.log_metrics(1, 0, 0, {"loss": float("nan"), "kl": 1.0})
        made.log_metrics(2, 0, 0, {"loss": float("inf"), "kl": float("-inf")})
    assert [(line["loss"], line["kl"]) for line in read_metrics(made.metrics_file)] == [
        (None, 1.0),
        (None, None),
    ]
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [
        "metric loss is nan at step 1",
        "metric kl is -inf at step 2",
    ]
    made.close()
    assert events(tmp_path, "kl") == [(1, 1.0)]


def test_metric_may_not_take_the_name_of_a_tag(tmp_path: Path) -> None:
    made = start(tmp_path)
    with pytest.raises(ValueError, match="'weight_version' has the name of a tag"):
        made.log_metrics(1, 0, 0, {"weight_version": 3})
    assert not made.metrics_file.exists()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    created = start(tmp_path)
    log_steps(created, 1, 2)
    created.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    attached = RunDir.attach(tmp_path)
    assert attached.checkpoints == created.checkpoints
    log_steps(attached, 3, 3)
    attached.close()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("bad", [b"not json\n", b"[1]\n", b'{"loss": 1}\n'])
def test_reading_names_the_file_and_the_bad_line(tmp_path: Path, bad: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step":1}\n' + bad + b'{"step":2}\n')
    with pytest.raises(RunDirError, match=r"metrics\.jsonl, line 2"):
        read_metrics(file)


# ---- provenance --------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return package / "__init__.py"


def test_git_state_of_a_clean_and_of_a_changed_checkout(checkout: Path) -> None:
    clean = provenance.git_state(checkout)
    assert clean is not None
    assert len(clean.commit) == 40
    assert not clean.dirty
    checkout.write_text("a = 2\n")
    (checkout.parent / "new.py").write_text("")
    dirty = provenance.git_state(checkout)
    assert dirty is not None
    assert dirty.commit == clean.commit
    assert dirty.dirty
    assert "-a = 1\n+a = 2\n" in dirty.diff
    assert dirty.untracked == ("package/new.py",)


def test_a_package_installed_below_a_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout.parent / "site-packages" / "__init__.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert provenance.git_state(installed) is None


def test_git_records_are_written_with_the_diff(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.write_text("a = 2\n")
    monkeypatch.setattr(run_records.megatron_rl, "__file__", str(checkout))
    start_and_end(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "git.json").read_text())
    assert state["dirty"] is True
    assert "+a = 2" in (tmp_path / "run" / "git.diff").read_text()
