"""Whole runs with frozen weights: saved rollouts under several layouts, the exported model, resume and its refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Forks
from resume_runs import SFT, assert_exported, assert_refused, contents, figures
from rl_runs import losses, run_all, save_rollouts, weights, write_config
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from weight_kinds import kind_of

from megatron_rl.lab.run import read_metrics

ROUTER = "optim.freeze=[router] optim.weight_decay=0.1"
EMBEDDING = "optim.freeze=[embedding] engine.recompute=full routing.replay=r2"


def assert_frozen(model: Path, run_dir: Path, kinds: set[str]) -> None:
    before = load_file(model / "model.safetensors")
    for name, weight in weights(run_dir).items():
        assert torch.equal(weight, before[name]) == (kind_of(name) in kinds), name
    for line in read_metrics(run_dir / "metrics.jsonl"):
        assert not any(f"grad_norm/{kind}" in line for kind in kinds)
        parts = [value for name, value in line.items() if name.startswith("grad_norm/") and "/layer_" not in name]
        assert line["grad_norm"] == pytest.approx(np.linalg.norm(parts), rel=1e-9)


@pytest.mark.distributed
def test_a_run_on_saved_rollouts_leaves_frozen_weights_alone(forks: Forks, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_layers=4, hidden_size=32, num_experts=4, mlp_only_layers=(1,))
    save_rollouts(model, tmp_path / "saved", steps=1)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "saved")
    run_all(
        forks,
        config,
        1,
        [f"run_dir={tmp_path / name} train.steps=1 {keys}" for name, keys in (("r", ROUTER), ("e", EMBEDDING))],
    )
    run_all(forks, config, 2, [f"run_dir={tmp_path / 'e-pp'} train.steps=1 {EMBEDDING} parallel.pp=2 parallel.vpp=2"])
    for name in ("r", "e", "e-pp"):
        run_dir, reference = tmp_path / name, tmp_path / name[0]
        assert_frozen(model, run_dir, {"router"} if name[0] == "r" else {"embedding"})
        np.testing.assert_allclose(losses(run_dir)[:, 0], losses(reference)[:, 0], atol=1e-5)
        np.testing.assert_allclose(losses(run_dir)[:, 1:], losses(reference)[:, 1:], rtol=2e-3, atol=1e-4)
        for key, weight in weights(reference).items():
            assert (weights(run_dir)[key] - weight).abs().max() <= 1e-4 * weight.abs().max(), (name, key)
        assert_exported(forks, run_dir, tmp_path / f"out-{name}")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resumed_run_with_frozen_weights_equals_an_uninterrupted_one(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    """Checkpoints do not hold the frozen weights: a resume loads them from the model."""
    words = (*SFT, setting / "sft.yaml", "optim.freeze=[attention,router]", "optim.weight_decay=0.1")
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert forks.run(*words, f"run_dir={whole}", "steps=4", ranks=2).status == [0, 0]
    assert forks.run(*words, f"run_dir={run_dir}", "steps=2", ranks=2).status == [0, 0]
    shutil.rmtree(run_dir / "model")
    before = contents(run_dir)
    refused = forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "--resume", "optim.freeze=[router]")
    assert_refused(refused, "optim.freeze: [router, attention] in the run, [router] now")
    assert contents(run_dir) == before
    done = forks.run(*words, f"run_dir={run_dir}", "steps=4", "--resume", ranks=2)
    assert done.status == [0, 0], done.stderr
    assert figures(run_dir) == figures(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(run_dir)[name], weight), name
    assert_frozen(setting / "model", run_dir, {"attention", "router"})


def change_router(file: Path) -> None:
    """Changes one number of a router in place."""
    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start, end = json.loads(content[8 : 8 + size])["model.layers.0.mlp.gate.weight"]["data_offsets"]
    content[8 + size + (start + end) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.distributed
def test_a_resume_is_refused_if_frozen_weights_have_changed(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """The digest of the model's files may miss it: it only samples large files."""
    model, run_dir = tmp_path / "model", tmp_path / "run"
    shutil.copytree(setting / "model", model)
    words = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", f"model.path={model}", "optim.freeze=[router]")
    options: dict[str, Any] = {"before": [("patches:sample_little_of_a_model",)], "ranks": 2}
    assert forks.run(*words, "steps=2", **options).status == [0, 0]
    file = model / "model.safetensors"
    whole = file.read_bytes()
    change_router(file)
    before = contents(run_dir)
    refused = forks.run(*words, "--resume", **options)
    assert refused.status == [2, 2], refused.stderr
    assert f"step-000002: the policy in {model} has other weights of the kinds in optim.freeze than" in refused.stderr
    assert contents(run_dir) == before
    file.write_bytes(whole)
    assert forks.run(*words, "steps=3", "--resume", **options).status == [0, 0]


def test_a_start_says_that_the_load_balancing_loss_moves_no_router(forks: Forks, setting: Path, tmp_path: Path) -> None:
    words = (*SFT, setting / "sft.yaml", f"run_dir={tmp_path / 'run'}", "steps=1")
    done = forks.run(*words, "optim.freeze=[router]", "engine.aux_loss_coefficient=0.01")
    assert done.status == [0], done.stderr
    assert "engine.aux_loss_coefficient: 0.01 moves no router, because optim.freeze has router" in done.stderr
    assert_frozen(setting / "model", tmp_path / "run", {"router"})
