"""Whole runs with a server and an environment of several turns, from the first token to the trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from declared_names import LIVE, written
from forks import Forks
from rl_runs import assert_same, run_all, write_config
from tiny_models import make_tiny_model

from megatron_rl.data.sample import Sample, Verdict
from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics
from megatron_rl.report.inspected import InspectOptions, load_step

pytestmark = [pytest.mark.server, pytest.mark.distributed]
STEPS = 2
SIZES = ("rollout.max_response_tokens=160", f"train.steps={STEPS}", "routing.replay=r3")
LIVE_RUN = (
    *SIZES,
    "data.train=arithmetic:terms=3,split=train,count=64",
    "data.heldout=arithmetic:terms=3,split=heldout,count=4",
    "rollout.replay_from=null",
    "rollout.environment.name=turn_environments:Adding",
    "rollout.servers.max_total_tokens=4096",
)


def samples_of(run: Path) -> list[Sample]:
    files = sorted((run / "rollouts").glob("*.jsonl"))
    assert len(files) == STEPS * 2
    return [sample for file in files for group in read_groups(file) for sample in group.samples]


def train(forks: Forks, root: Path, preset: str, *runs: tuple[str, ...]) -> None:
    model = make_tiny_model(root / "model", num_layers=2)
    config = write_config(root / "config.yaml", model, root / "unused", preset=preset)
    run_all(forks, config, 2, [" ".join(options) for options in runs])


def test_the_trainer_computes_what_was_sampled_over_several_turns(forks: Forks, tmp_path: Path) -> None:
    """A second run replays the rollouts of the first one, without servers or environment, with the same results."""
    live, replayed = tmp_path / "live", tmp_path / "replayed"
    again = (*SIZES, f"run_dir={replayed}", f"rollout.replay_from={live}")
    train(
        forks,
        tmp_path,
        "score_centering",
        (*LIVE_RUN, f"run_dir={live}", "weights.verify=1", "lab.record_steps=[1]"),
        again,
    )
    samples = samples_of(live)
    turns = [sample.turns for sample in samples]
    assert 3 in turns
    for sample in samples:
        assert sample.trace is not None
        assert sample.trace.rows == len(sample.token_ids) - 1
        assert sample.trace.present.all()
        assert sample.top_tokens is not None
        mask = sample.loss_mask[len(sample.prompt.token_ids) :]
        assert np.isfinite(sample.top_tokens.logprobs).any(axis=1).tolist() == mask.tolist()
        assert sample.verdict is not None
        assert (sample.finish_reason == "length") == (sample.verdict == Verdict(0.0, False))
        assert len(sample.response_ids) <= 160
    lines = read_metrics(live / "metrics.jsonl")
    for line in lines:
        # Both engines compute in fp32, so routes may differ only if two experts have almost equal scores.
        assert line["routing/set_mismatch/rollout_old/effective/max"] == 0
        assert line["routing/set_mismatch/rollout_old/live/max"] < 0.02
        assert line["abs_logprob_gap/max"] < 1e-3
        if line["mini_batch"] == 0:  # mu and pi_theta are the same model
            assert line["centering/drift/max"] < 1e-4
    rollouts = [line for line in lines if "rollout/turns/mean" in line]
    assert sum(line["rollout/turns/mean"] for line in rollouts) / STEPS == pytest.approx(np.mean(turns))
    assert sum(line["rollout/tokens"] for line in rollouts) == sum(sample.response_tokens for sample in samples)
    assert len(read_metrics(live / "eval.jsonl")) == 2
    assert written(live) >= LIVE
    assert_same(replayed, live, STEPS)
    step = load_step(live, InspectOptions(step=1))
    several = [response for response in step.responses if response.sample.turns == 3]
    assert several
    for response in several:
        spoken = response.sample.loss_mask[len(response.sample.prompt.token_ids) :]
        assert (np.isfinite(response.columns["logprob"]) == spoken).all()


@pytest.mark.slow
def test_conversations_go_on_during_updates_and_syncs(forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(forks, tmp_path, "gspo", (*LIVE_RUN, f"run_dir={run}", "rollout.lag=1", "rollout.concurrency=2"))
    for sample in samples_of(run):
        assert sample.trace is not None
        assert sample.trace.rows == len(sample.token_ids) - 1
    lines = read_metrics(run / "metrics.jsonl")
    assert max(line["rollout/staleness/max"] for line in lines if "rollout/staleness/max" in line) == 1
