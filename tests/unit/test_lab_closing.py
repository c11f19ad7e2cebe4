"""What a run says at its end, and the command that goes on with it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest

from megatron_rl.lab.closing import Closing, resume_command
from megatron_rl.lab.sinks import Line
from megatron_rl.ranks.world import World
from megatron_rl.stop import Stopped

ALONE = World(0, 1, 0, 1, joined=False, node="a", host="a")
FOUR = World(0, 4, 0, 4, joined=True, node="a", host="a")


def said_by(run: Path, error: BaseException | None, *, begun: bool = True, can_go_on: bool = True) -> list[str]:
    lines: list[str] = []
    closing = Closing(run, 9, lines.append, can_go_on=can_go_on)
    closing.has_begun = begun
    values = {"rollout/reward/mean": 0.75, "loss": 0.5}
    closing.write(Line("steps", {"step": 7, "weight_version": 6}, 0.0, values, 28))
    with contextlib.suppress(BaseException), closing:
        if error is not None:
            raise error
    return lines


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["megatron-rl", "train", "run.yaml", "a='b c'", "--resume"])
    for name in ("step-000004", "step-000006", "step-000008.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"step":1,"rollout/reward/mean":0.25}\n{"step":2,"rollout/reward')
    scores = "".join(f'{{"step":{s},"avg_at_k":{a}}}\n' for s, a in ((0, 0.1), (3, 0.5), (6, 0.4)))
    (tmp_path / "eval.jsonl").write_text(scores)
    return tmp_path


def test_a_finished_run_names_its_figures_and_files(run: Path) -> None:
    first, *rest = said_by(run, None)
    assert first == "finished: step 7 of 9, 0:00:00 since the start"
    assert [line.split(maxsplit=1)[0] for line in rest] == (
        ["reward", "held-out", "model", "metrics", "checkpoint", "logs", "report", "train"]
    )
    text = "\n".join(rest)
    assert "0.250 at step 1, 0.750 at step 7" in text
    assert "0.400 after step 6, best 0.500 after step 3" in text
    assert text.endswith("""megatron-rl train run.yaml 'a='"'"'b c'"'"'' train.steps=18 --resume""")
    assert str(run / "checkpoints" / "step-000006") in text
    assert f"megatron-rl report {run}" in text


@pytest.mark.parametrize(
    ("error", "how"), [(Stopped("why"), "stopped"), (RuntimeError(), "failed"), (KeyboardInterrupt(), "failed")]
)
def test_a_run_that_ended_early_says_so_and_names_no_model(run: Path, error: BaseException, how: str) -> None:
    lines = said_by(run, error)
    assert lines[0].startswith(f"{how}: step 7 of 9")
    assert not any(line.startswith("model") for line in lines)
    assert lines[-1].startswith("go on")
    assert "train.steps" not in lines[-1]


def test_no_command_trains_longer_on_saved_rollouts(run: Path) -> None:
    assert not any(line.startswith("train longer") for line in said_by(run, None, can_go_on=False))
    assert said_by(run, Stopped("why"), can_go_on=False)[-1].startswith("go on")


def test_a_start_that_failed_has_nothing_to_sum_up(run: Path) -> None:
    assert said_by(run, RuntimeError(), begun=False) == []


def test_the_command_leaves_out_what_asked_for_a_resume_or_a_fork() -> None:
    argv = ["prog", "train", "run.yaml", "--resume", "auto", "--fork", "runs/a@3", "train.steps=5", "--fork=x@1"]
    assert resume_command(argv, ALONE) == "megatron-rl train run.yaml train.steps=5 --resume"
    assert resume_command(argv, ALONE, 9) == "megatron-rl train run.yaml train.steps=9 --resume"
    sft = ["prog", "sft", "run.yaml", "steps=5", "a=1"]
    assert resume_command(sft, ALONE, 9) == "megatron-rl sft run.yaml a=1 steps=9 --resume"
    assert resume_command(argv[:3], FOUR) == "torchrun --nproc-per-node 4 -m megatron_rl train run.yaml --resume"
    nodes = dataclasses.replace(FOUR, size=8)
    assert (
        resume_command(argv[:3], nodes)
        == "torchrun on every node as before, with -m megatron_rl train run.yaml --resume"
    )
    assert resume_command(["pytest", "-q"], ALONE) == ""
