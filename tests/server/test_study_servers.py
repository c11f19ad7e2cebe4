"""A study whose runs sample from real servers: these are kept between runs, and other arms replay what was sampled."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from forks import Forks
from study_files import write_study

from megatron_rl.lab.run import read_metrics
from megatron_rl.stop import Stopped
from megatron_rl.study.conductor import run_study

pytestmark = pytest.mark.server


@pytest.mark.slow
def test_runs_share_a_server_and_replay_what_others_sampled(
    forks: Forks, forked_ranks: None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(
        f"""
presets: [grpo]
run_dir: unset
model: {{path: {tiny_model_dir}}}
engine: {{device: cpu, dtype: fp32}}
data:
  train: arithmetic:terms=3,count=50
  heldout: arithmetic:terms=3,split=heldout,count=4
  max_prompt_tokens: 8
rollout: {{prompts_per_step: 4, group_size: 2, max_response_tokens: 8, servers: {{max_total_tokens: 4096}}}}
optim: {{lr: 1.0e-3}}
train: {{steps: 1, mini_batches: 2}}
"""
    )
    arms = {
        "replay": {"replay": {"from": "collect"}, "set": {"data": {"heldout": None}}},
        "collect": {},
        "other": {"seeds": [0], "set": {"rollout": {"servers": {"max_total_tokens": 2048}}}},
    }
    metrics = {
        "accuracy": {"file": "eval", "name": "avg_at_k", "reduce": "last", "error": "binomial"},
        "reward": {"name": "rollout/reward/mean"},
    }
    file = write_study(tmp_path / "s.yaml", base, arms, seeds=[0, 1], metrics=metrics)
    with pytest.raises(Stopped, match=r"replay-seed-1 needs the rollouts of collect-seed-1.* when task 1 is done"):
        run_study(file, task=4)
    run_study(file)
    directory = tmp_path / "s"
    results = [orjson.loads(line) for line in (directory / "results.jsonl").read_bytes().splitlines()]
    assert [(each["run"], each["status"]) for each in results] == [
        ("collect-seed-0", "done"),
        ("collect-seed-1", "done"),
        ("other-seed-0", "done"),
        ("replay-seed-0", "done"),
        ("replay-seed-1", "done"),
    ]
    log = (directory / "logs" / "server-0.log").read_text()
    assert log.count("The server is fired up and ready to roll") == 2  # one for both runs of collect
    by_run = {each["run"]: each["metrics"] for each in results}
    for seed in (0, 1):
        assert by_run[f"replay-seed-{seed}"]["reward"] == by_run[f"collect-seed-{seed}"]["reward"]
    assert by_run["collect-seed-0"]["accuracy"] is not None
    assert by_run["replay-seed-0"]["accuracy"] is None
    for run in ("collect-seed-0", "collect-seed-1"):
        first = read_metrics(directory / "runs" / run / "metrics.jsonl")[0]
        assert first["rho/mean"] == pytest.approx(1.0, abs=1e-4)  # the kept server has the new run's weights
