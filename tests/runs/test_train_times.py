"""The seconds of each phase are logged with the step or the evaluation that they belong to."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks
from resume_runs import TRAIN
from rl_runs import write_config

from megatron_rl.lab.run import read_metrics

SLOW = 3.0


@pytest.fixture
def run_dir(forks: Forks, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The directory of a run of three steps with evaluations before the first step, and after the second and the last.
    Its first weight sync and its evaluations are slow."""
    config = write_config(tmp_path / "config.yaml", tiny_model_dir, tmp_path / "unused")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{n} 2", "answer": "7"}}\n' for n in range(16)))
    data = (f"data.train={prompts}", f"data.heldout={prompts}", "data.verifier=arithmetic", "eval.prompts=1")
    options = (f"run_dir={tmp_path / 'run'}", "rollout.replay_from=null", "train.steps=3", "eval.every=2")
    slow = [("patches:made_up_rollouts",), ("patches:slow_first_sync", SLOW), ("patches:slow_evaluations", SLOW)]
    done = forks.run(*TRAIN, config, *data, *options, before=slow)
    assert done.status == [0], done.stderr[-9000:]
    return tmp_path / "run"


def test_steps_and_evaluations_log_the_times_of_their_own_phases(run_dir: Path) -> None:
    """No step's line has the seconds of an evaluation or of the first weight sync, which is before the first step."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    for step in (1, 2, 3):
        (times,) = [
            {name: value for name, value in line.items() if name.startswith("time/")}
            for line in lines
            if line["step"] == step and "time/rollout" in line
        ]
        assert times["time/update"] > 0
        assert times["time/weight_sync"] < SLOW
        assert "time/evaluation" not in times
    evaluations = [
        (line["step"], [name for name in line if name.startswith("time/")], line["time/evaluation"] >= SLOW)
        for line in read_metrics(run_dir / "eval.jsonl")
    ]
    assert evaluations == [(step, ["time/evaluation"], True) for step in (0, 2, 3)]
