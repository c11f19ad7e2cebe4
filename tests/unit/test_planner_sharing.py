"""The plan of a run whose servers share the trainer's GPUs: they are not counted twice, and phases are not added up."""

from __future__ import annotations

from pathlib import Path

import pytest
from planned_jobs import job

from megatron_rl.config.sharing import served_bytes
from megatron_rl.planner.memory import RESERVE, Job, largest_rank

SHARED = ("rollout.servers.colocate=true", "weights.route=ipc", "engine.dtype=bf16")


def planned(tmp_path: Path, *more: str, shared: bool = True) -> Job:
    servers = (*SHARED, "rollout.servers.launch=4", "rollout.servers.tp=2") if shared else ()
    return job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", *servers, *more)


def test_a_servers_process_costs_its_context_and_no_more_while_the_trainer_trains(tmp_path: Path) -> None:
    shared, alone = (largest_rank(planned(tmp_path, shared=shared)) for shared in (True, False))
    assert shared.total == alone.total + RESERVE


def test_a_sync_has_the_weights_of_both_and_a_bucket(tmp_path: Path) -> None:
    """A server on one GPU has the whole model, and experts that do not train cost a trainer little."""
    shared = planned(tmp_path, "rollout.servers.launch=8", "rollout.servers.tp=1", "optim.freeze=[expert]")
    rank = largest_rank(shared)
    assert rank.served == served_bytes(shared.arch, 1, 2) == pytest.approx(2 * 30.5e9, rel=0.01)
    assert rank.sync == 2 * RESERVE + rank.weights + rank.bucket + rank.served
    assert rank.total == rank.sync > 2 * (rank.static + rank.peak)
