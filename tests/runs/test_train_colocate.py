"""Runs whose servers share the trainer's GPUs in turns. Memory moves as on a GPU, which is pretended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from forks import Forks
from resume_runs import TRAIN, figures, read_steps
from rl_runs import weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics

pytestmark = [pytest.mark.server, pytest.mark.distributed]
STEPS = 2


@pytest.fixture(scope="module")
def rl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with held-out prompts and rewards that a random model gets."""
    root = tmp_path_factory.mktemp("colocate")
    model = make_tiny_model(root / "model", num_layers=2, hidden_size=32, num_experts=4, expert_hidden_size=16)
    lines = "".join(f'{{"prompt": "{n} 2", "answer": "7"}}\n' for n in range(64))
    (root / "prompts.jsonl").write_text(lines)
    return write_config(root / "config.yaml", model, root / "unused")


def command(rl: Path, run_dir: Path, ranks: int, *options: str) -> tuple[Any, ...]:
    data = rl.with_name("prompts.jsonl")
    common = (f"run_dir={run_dir}", f"data.train={data}", "data.verifier=verifier_examples:longer")
    return (*TRAIN, rl, *common, f"parallel.ep={ranks}", f"train.steps={STEPS}", *options)


def colocated(ranks: int, *, tp: int = 1) -> tuple[str, ...]:
    servers = ("rollout.servers.colocate=true", f"rollout.servers.launch={ranks // tp}", f"rollout.servers.tp={tp}")
    return ("rollout.replay_from=null", "weights.route=ipc", "rollout.servers.max_total_tokens=4096", *servers)


def share(
    forks: Forks,
    rl: Path,
    root: Path,
    ranks: int,
    *,
    tp: int = 1,
    dtype: str = "bf16",
    more: tuple[str, ...] = (),
    resumes: bool = True,
) -> Path:
    """Trains with evaluations and verified syncs; with `resumes` a step, and then from its checkpoint on."""
    run_dir, turns = root / "run", root / "turns"
    turns.mkdir()
    bound = 1e-5 if dtype == "fp32" else 0.5
    verified = (f"weights.verify_bound={bound}", "weights.verify=1", "checkpoint.every=1")
    held_out = (f"data.heldout={rl.with_name('prompts.jsonl')}", "eval.every=1", "eval.prompts=2")
    for steps, resumed in ((1, ()), (STEPS, ("--resume",))) if resumes else ((STEPS, ()),):
        now = (f"train.steps={steps}", f"engine.dtype={dtype}", *colocated(ranks, tp=tp), *verified, *held_out)
        done = forks.run(
            *command(rl, run_dir, ranks, *more, *now, *resumed),
            ranks=ranks,
            before=[("turn_patches:record_turns", str(turns), 0.2)],
        )
        assert done.status == [0] * ranks, done.stderr
    assert read_steps(run_dir)[-1] == STEPS
    assert sum("weights/probe_max_abs_diff" in line for line in read_metrics(run_dir / "metrics.jsonl")) == STEPS
    return run_dir


def assert_trains_alike_alone(forks: Forks, rl: Path, run_dir: Path, alone: Path, ranks: int, *options: str) -> None:
    """Replays the run's rollouts without servers, and compares all that was trained, bit for bit."""
    done = forks.run(*command(rl, alone, ranks, *options, f"rollout.replay_from={run_dir}"), ranks=ranks)
    assert done.status == [0] * ranks, done.stderr
    for line, expected in zip(figures(run_dir), figures(alone), strict=True):
        assert (line["loss"], line["grad_norm"]) == (expected["loss"], expected["grad_norm"])
    for name, weight in weights(alone).items():
        assert torch.equal(weight, weights(run_dir)[name]), name


@pytest.fixture(scope="module")
def shared(forks: Forks, rl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks and one server of two GPUs."""
    return share(forks, rl, tmp_path_factory.mktemp("shared"), 2, tp=2, resumes=False)


def test_a_run_that_shares_its_gpus_trains_as_one_without_servers(
    forks: Forks, rl: Path, shared: Path, tmp_path: Path
) -> None:
    assert_trains_alike_alone(forks, rl, shared, tmp_path / "alone", 2, "engine.dtype=bf16")


@pytest.mark.parametrize(
    ("ranks", "dtype", "more"),
    [
        pytest.param(
            1,
            "bf16",
            ("objective.kl.kind=k3", "objective.kl.beta=0.01", "optim.freeze=[router]"),
            marks=pytest.mark.slow,
        ),
        pytest.param(2, "fp32", (), marks=pytest.mark.slow),
    ],
    ids=["with a reference and frozen weights", "two servers"],
)
def test_other_runs_that_share_their_gpus_do_too(
    forks: Forks, rl: Path, tmp_path: Path, ranks: int, dtype: str, more: tuple[str, ...]
) -> None:
    run_dir = share(forks, rl, tmp_path, ranks, dtype=dtype, more=more)
    assert_trains_alike_alone(forks, rl, run_dir, tmp_path / "alone", ranks, f"engine.dtype={dtype}", *more)


@pytest.mark.slow
def test_responses_that_a_turn_cuts_go_on_with_the_next_weights(forks: Forks, rl: Path, tmp_path: Path) -> None:
    """Two leaders, two servers. With few requests at a time responses are in flight when a turn ends."""
    run_dir, turns = tmp_path / "run", tmp_path / "turns"
    turns.mkdir()
    lag = ("rollout.lag=1", "rollout.over_sampling=2", "rollout.concurrency=2", "rollout.max_response_tokens=96")
    options = (*colocated(2), *lag, "train.steps=3", "weights.verify_bound=1e-5", "weights.verify=1", "optim.lr=1e-3")
    done = forks.run(
        *command(rl, run_dir, 2, *options), ranks=2, before=[("turn_patches:record_turns", str(turns), 0.2)]
    )
    assert done.status == [0, 0], done.stderr
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert max(line.get("rollout/several_versions", 0) for line in lines) > 0, "no turn cut a response"
    assert max(line.get("rollout/staleness/max", 0) for line in lines) == 1
    # Tokens of each version were sampled as its weights say; a cache of the old ones would show.
    assert 0 < max(line.get("mismatch/abs_logprob_gap/lag_0") or 0 for line in lines) < 1e-4
    caches = True
    for event in events(run_dir, 0):
        if "kv_cache" in event.what:
            caches = event.what.startswith("resume_memory")
        assert caches or event.what != "continue_generation", "servers answer without the memory of their caches"


class Event(NamedTuple):
    what: str
    begun: float
    ended: float


def events(run_dir: Path, rank: int) -> list[Event]:
    return [Event(*json.loads(line)) for line in (run_dir.with_name("turns") / f"rank-{rank}").read_text().splitlines()]


CYCLE = """
pause_generation retract, release_memory weights,kv_cache
restore weights, restore gradients, restore optimizer
offload optimizer, offload gradients
resume_memory weights, abandon_weight_update, end_weight_update, offload weights
resume_memory kv_cache, continue_generation
pause_generation retract, release_memory kv_cache, restore weights
offload weights, resume_memory kv_cache, continue_generation
"""
"""A step and its sync, which is verified: for that the servers have their cache once more. An open update that another
trainer may have left is ended first."""


def test_each_step_is_one_cycle_of_turns(shared: Path) -> None:
    cycle = CYCLE.strip().replace("\n", ", ").split(", ")
    done = [event.what for event in events(shared, 0)]
    # Before the servers start, which measure what is free.
    assert done[:4] == ["offload optimizer", "offload gradients", "offload weights", "continue_generation"]
    first = done.index(cycle[1])
    assert done[first - 1 :][: len(cycle)] == cycle


def test_servers_take_memory_only_when_all_ranks_have_freed_theirs(shared: Path) -> None:
    """Rank 1 is slow to free its memory."""
    taken = [event for event in events(shared, 0) if event.what.startswith("resume_memory")]
    freed = [event for rank in (0, 1) for event in events(shared, rank) if event.what.startswith("offload")]
    assert max(event.ended - event.begun for event in freed) > 0.2
    for take in taken:
        assert not [event for event in freed if event.begun < take.begun < event.ended]


@pytest.mark.slow
def test_a_server_that_cannot_take_its_memory_back_ends_the_run_with_one_error(
    forks: Forks, rl: Path, tmp_path: Path
) -> None:
    """It holds the memory already, at which SGLang ends."""
    done = forks.run(
        *command(rl, tmp_path / "run", 2, *colocated(2, tp=2)),
        ranks=2,
        before=[("turn_patches:resume_twice",)],
    )
    assert done.status == [2, 2], done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "rollout.servers.colocate: a server did not take back its memory (if a GPU is full" in error
    assert "Traceback" not in done.stderr
