"""`megatron-rl plan` as a user runs it; its parts are in tests/unit/test_planner.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import RL, SFT, write, write_model
from forks import Forks


@pytest.mark.parametrize(("memory", "status"), [("80", 0), ("1", 1)])
def test_a_plan_tells_whether_the_run_fits(forks: Forks, tmp_path: Path, memory: str, status: int) -> None:
    write(tmp_path / "a.yaml", RL)
    write_model(tmp_path / "model")  # without weights
    more = ["parallel.pp=2", "engine.device=cuda", "--gpus", "4", "--memory", memory]
    done = forks.run("-m", "megatron_rl", "plan", "a.yaml", *more, directory=tmp_path)
    assert done.returncode == status, done.stderr
    assert "rank 0, stage 0" in done.stdout
    assert "rank 2, stage 1" in done.stdout
    assert f"{'does not fit' if status else 'fits'}: rank 0 needs 3." in done.stdout
    assert ("no single change of tp" in done.stdout) == bool(status)
    assert ("layouts that fit, by estimated time" in done.stdout) != bool(status)


def test_a_plan_of_supervised_fine_tuning(forks: Forks, tmp_path: Path) -> None:
    write(tmp_path / "sft.yaml", SFT)
    write_model(tmp_path / "model")
    done = forks.run("-m", "megatron_rl", "plan", "sft.yaml", "--sft", "--gpus", "2", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "exported buckets" not in done.stdout


def test_what_transformer_engine_alone_does_is_planned_too(forks: Forks, tmp_path: Path) -> None:
    """The model is built with layers in plain PyTorch, which would refuse it."""
    write(tmp_path / "a.yaml", RL)
    write_model(tmp_path / "model")
    more = ["engine={device: cuda, layers: te, recompute: moe_act, cp_comm: a2a, deterministic: true}", "parallel.cp=2"]
    more.append("optim.offload=0.5")
    done = forks.run("-m", "megatron_rl", "plan", "a.yaml", *more, "--gpus", "2", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recompute moe_act" in done.stdout
    assert "optimizers take 0.0 GiB of the host's memory for each rank" in done.stdout


@pytest.mark.parametrize(("fraction", "status"), [("0.8", 0), ("0.000001", 1)])
def test_a_plan_with_shared_gpus_tells_what_each_turn_needs(
    forks: Forks, tmp_path: Path, fraction: str, status: int
) -> None:
    write(tmp_path / "a.yaml", RL)
    write_model(tmp_path / "model")
    more = [
        "rollout.servers={colocate: true, launch: 2, tp: 2}",
        "weights.route=ipc",
        "engine={device: cuda, dtype: bf16}",
    ]
    more.append(f"rollout.servers.extra_flags=[--mem-fraction-static={fraction}]")
    done = forks.run("-m", "megatron_rl", "plan", "a.yaml", *more, "--gpus", "4", directory=tmp_path)
    assert done.returncode == status, done.stderr
    assert "servers share the GPUs in turns (2 of 2 GPUs)" in done.stdout
    assert ("gives a server 0.0 GiB of each GPU" in done.stdout) == bool(status)
