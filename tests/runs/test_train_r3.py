"""A whole run with its own server, with R3 and score centering: the trainer would choose the routes that SGLang reports
and replays them, and its log-probs of the likely tokens that SGLang reports are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from declared_names import LIVE, written
from family_models import make_family_model
from forks import Forks
from quantised_models import set_config
from rl_runs import run_all, write_config
from tiny_models import VOCAB_SIZE, make_tiny_model

from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics

STEPS = 2
# Routers with sigmoids and a bias, with softmaxes over the chosen and over all experts, and beside a shared expert.
# What SGLang needs of each family: as many key-value heads as query heads, and experts in every layer.
SERVED: dict[str, dict[str, Any]] = {
    "glm4_moe": {},
    "mixtral": {},
    "olmoe": {"num_key_value_heads": 4},
    "qwen2_moe": {"mlp_only_layers": []},
    "minimax_m2": {},
}
# What transformers does not write into config.json.
NEEDED: dict[str, dict[str, Any]] = {
    "minimax_m2": {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True},
}


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
@pytest.mark.slow
@pytest.mark.parametrize("family", SERVED)
def test_r3_replays_the_routes_of_families_that_the_servers_cpu_path_computes(
    forks: Forks, tmp_path: Path, family: str
) -> None:
    model = make_family_model(tmp_path / "model", family, num_hidden_layers=2, **SERVED[family])
    set_config(model, **NEEDED.get(family, {}))
    lines = train_live(forks, tmp_path, model, "routing.replay=r3", "parallel.ep=2")
    for line in lines:
        assert line["routing/set_mismatch/rollout_old/effective/max"] == 0
        assert line["routing/set_mismatch/rollout_old/live/max"] < 0.02


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", "llama3", "qwen2"])
def test_dense_families_are_served_and_synced(forks: Forks, tmp_path: Path, family: str) -> None:
    train_live(forks, tmp_path, make_family_model(tmp_path / "model", family, num_hidden_layers=2), "parallel.tp=2")


def train_live(forks: Forks, tmp_path: Path, model: Path, *overrides: str) -> list[dict[str, Any]]:
    """Trains on two ranks with a server; returns the metrics. The second step's rollouts are of synced weights."""
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "unused")
    options = (
        "data.train=arithmetic:terms=3,split=train,count=64",
        "rollout.replay_from=null",
        "rollout.servers.max_total_tokens=4096",
        f"train.steps={STEPS}",
        "weights.verify=1",
        *overrides,
    )
    run_all(forks, config, 2, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {line["step"] for line in lines} == set(range(1, STEPS + 1))
    assert all(line["abs_logprob_gap/max"] < 1e-3 for line in lines)
    return lines
