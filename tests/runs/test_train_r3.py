"""A whole run with its own server, with R3 and score centering: the trainer would choose the routes that SGLang reports
and replays them, and its log-probs of the likely tokens that SGLang reports are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from declared_names import LIVE, written
from family_models import make_family_model
from forks import Forks
from rl_runs import run_all, write_config
from tiny_models import VOCAB_SIZE, make_tiny_model

from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics

STEPS = 2


@pytest.mark.server
@pytest.mark.distributed
def test_routes_and_likely_tokens_from_a_live_server_are_used(forks: Forks, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_layers=2)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "unused", preset="score_centering")
    options = (
        "data.train=arithmetic:terms=3,split=train,count=64",
        "data.heldout=arithmetic:terms=3,split=heldout,count=8",
        "rollout.replay_from=null",
        "rollout.servers.max_total_tokens=4096",
        f"train.steps={STEPS}",
        "routing.replay=r3",
        "weights.verify=1",
    )
    # Each of the two leaders holds the traces and the likely tokens of its own samples.
    run_all(forks, config, 2, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])

    files = sorted((tmp_path / "run" / "rollouts").glob("*.jsonl"))
    assert len(files) == STEPS * 2
    samples = [sample for file in files for group in read_groups(file) for sample in group.samples]
    for sample in samples:
        assert sample.trace is not None
        assert sample.trace.rows == len(sample.token_ids) - 1
        assert sample.trace.present.all()
        assert sample.top_tokens is not None
        assert sample.top_tokens.ids.shape == (len(sample.response_ids), VOCAB_SIZE)  # fewer than top_k: all of them
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for line in lines:
        assert line["routing/set_mismatch/rollout_old/effective/max"] == 0
        # Both engines compute in fp32, so routes may differ only if two experts have almost equal scores.
        assert line["routing/set_mismatch/rollout_old/live/max"] < 0.02
        assert line["abs_logprob_gap/max"] < 1e-3
        assert 0 < line["routing/fallback/mean"] < 0.2  # the last row of each sample
        for policy in ("rollout", "policy"):
            assert line[f"centering/{policy}_mass/min"] == pytest.approx(1, abs=1e-5)
        assert line["centering/score/mean"] > 0.1
        if line["mini_batch"] == 0:  # mu and pi_theta are the same model
            assert line["centering/drift/max"] < 1e-4
    assert len(read_metrics(tmp_path / "run" / "eval.jsonl")) == 2
    assert written(tmp_path / "run") >= LIVE


@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.parametrize(
    "family", ["glm4_moe", *(pytest.param(family, marks=pytest.mark.slow) for family in ("mixtral", "olmoe"))]
)
def test_r3_replays_the_routes_of_families_that_the_servers_cpu_path_computes(
    forks: Forks, tmp_path: Path, family: str
) -> None:
    """Routers with sigmoids and a bias, and with softmaxes over all and over the chosen experts."""
    changes = {"num_key_value_heads": 4} if family == "olmoe" else {}  # SGLang's needs as many as query heads
    model = make_family_model(tmp_path / "model", family, num_hidden_layers=2, **changes)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "unused")
    options = (
        "data.train=arithmetic:terms=3,split=train,count=64",
        "rollout.replay_from=null",
        "rollout.servers.max_total_tokens=4096",
        f"train.steps={STEPS}",
        "routing.replay=r3",
        "weights.verify=1",
        "parallel.ep=2",
    )
    run_all(forks, config, 2, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) >= STEPS
    for line in lines:
        assert line["routing/set_mismatch/rollout_old/effective/max"] == 0
        assert line["routing/set_mismatch/rollout_old/live/max"] < 0.02
        assert line["abs_logprob_gap/max"] < 1e-3
