"""Whole runs with dynamic sampling over uneven leaders, its replay, overlong filtering and lost verdicts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import declared_names
import numpy as np
import orjson
import pytest
import torch
from forks import Forks
from rl_runs import run_all, weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.prompts import PromptCursor, take_indexes
from megatron_rl.data.sample import Group
from megatron_rl.data.store import read_groups, read_header, write_groups
from megatron_rl.lab.run import read_metrics
from megatron_rl.rewards.shaping import shape_rewards

STEPS, MINI_BATCHES, WANTED, SIZE, LONGEST = 2, 2, 4, 4, 8
# Right answers to each prompt, in the order in which a run takes prompts. Each step samples 6 = 4 * 1.5 prompts, finds
# 3 mixed groups and samples 2 more for the fourth. The second of two leaders has no mixed group in step 1, and 3 in
# step 2.
TAKEN = [[2, 0, 1, 0, 3, 0, 1, 4], [0, 1, 4, 3, 4, 2, 2, 1]]
KEPT = [[0, 2, 4, 6], [1, 3, 5, 6]]
FIGURES = [
    {"prompts": 8, "kept": 4, "surplus": 0, "all_correct": 1, "all_wrong": 3, "refills": 1},
    {"prompts": 8, "kept": 4, "surplus": 1, "all_correct": 2, "all_wrong": 1, "refills": 1},
]
# Wrong answers keep the verifier's reward. A replaced reward would hide a punishment that is applied twice.
SHAPED = "reward.correct=1 reward.overlong_cache=4"
LIVE = f"rollout.replay_from=null rollout.dynamic_sampling.oversample=1.5 {SHAPED}"
REWARD = RewardConfig(correct=1.0, overlong_cache=4)


def write_prompts(file: Path, correct: list[int]) -> Path:
    """Writes prompts so that a cursor of seed 0 takes p0, p1, ..., with `correct` right answers each."""
    order, _ = take_indexes(len(correct), PromptCursor(0), len(correct))
    lines = {
        index: orjson.dumps({"id": f"p{place}", "prompt": f"{place} {correct[place]}", "answer": "7"})
        for place, index in enumerate(order)
    }
    file.write_bytes(b"\n".join(lines[index] for index in sorted(lines)))
    return file


def run_made_up(forks: Forks, config: Path, ranks: int, runs: list[str]) -> None:
    forks.world(ranks, "dynamic_worker:main", config, runs)


@pytest.fixture(scope="module")
def root(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml, and `live`, the run directory of one rank."""
    root = tmp_path_factory.mktemp("dynamic")
    model = make_tiny_model(root / "model", num_layers=2)
    prompts = write_prompts(root / "prompts.jsonl", [*TAKEN[0], *TAKEN[1], *[0] * 8])
    path = write_config(root / "config.yaml", model, root / "unused", preset="dapo")
    path.write_text(
        path.read_text()
        + """
reward: {overlong_cache: null, correct: null, wrong: null}
routing: {replay: r3}
"""
    )
    text = path.read_text().replace("train: unused", f"train: {prompts}, verifier: 'verifier_examples:shaped'")
    text = text.replace("prompts_per_step: 8", f"prompts_per_step: {WANTED}\n  dynamic_sampling: null")
    text = text.replace("max_response_tokens: 32", f"max_response_tokens: {LONGEST}")
    text = text.replace("{steps: 2, mini_batches: 4}", f"{{steps: {STEPS}, mini_batches: {MINI_BATCHES}}}")
    path.write_text(text)
    run_made_up(forks, path, 1, [f"run_dir={root / 'live'} {LIVE}"])
    return root


def saved(run_dir: Path, step: int) -> list[Group]:
    files = sorted((run_dir / "rollouts").glob(f"step-{step:06d}-dp-*.jsonl"))
    return sorted((g for file in files for g in read_groups(file)), key=lambda g: g.index)


def first_lines(run_dir: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["mini_batch"] == 0]


def assert_same_training(run_dir: Path, reference: Path) -> None:
    lines = [read_metrics(directory / "metrics.jsonl") for directory in (run_dir, reference)]
    assert len(lines[1]) == STEPS * MINI_BATCHES
    for found, expected in zip(*lines, strict=True):
        for name in ("loss", "grad_norm", "advantage/mean", "advantage/max", "entropy/mean", "tokens", "sequences"):
            # Statistics of no tokens are left out of the line.
            assert found.get(name, 0) == pytest.approx(expected.get(name, 0), rel=2e-3, abs=1e-5), (run_dir.name, name)
    trained = weights(reference)
    for name, weight in weights(run_dir).items():
        assert (weight - trained[name]).abs().max() <= 1e-4 * trained[name].abs().max(), f"{name} in {run_dir.name}"


# ---- dynamic sampling --------------------------------------------------------------------------------------------


def assert_sampled_as_planned(run_dir: Path) -> None:
    assert declared_names.written(run_dir) >= declared_names.DYNAMIC
    for step, (taken, kept, figures) in enumerate(zip(TAKEN, KEPT, FIGURES, strict=True)):
        groups = saved(run_dir, step + 1)
        assert [g.index for g in groups] == [0, 1, 2, 3]
        assert [g.prompt.id for g in groups] == [f"p{8 * step + index}" for index in kept]
        line = first_lines(run_dir)[step]
        prefix = "rollout/dynamic_sampling/"
        assert {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)} == figures
        # The metrics cover all sampled groups; kept groups have other accuracies.
        assert line["rollout/accuracy"] == sum(taken) / (8 * SIZE) != sum(taken[i] for i in kept) / (4 * SIZE)
        assert (line["rollout/prompts"], line["rollout/samples"]) == (8, 8 * SIZE)


def test_mixed_groups_are_kept_in_prompt_order(root: Path) -> None:
    assert_sampled_as_planned(root / "live")
    (manifest,) = (root / "live" / "checkpoints").glob("*/manifest.json")
    assert orjson.loads(manifest.read_bytes())["state"]["cursor"] == {"seed": 0, "epoch": 0, "position": 16}


def test_saved_rollouts_have_the_verifiers_unshaped_rewards(root: Path) -> None:
    for group in saved(root / "live", 1):
        own = {True: 1.0, False: -0.5 - len(group.prompt.token_ids)}
        for sample in group.samples:
            assert sample.verdict is not None
            assert sample.verdict.reward == own[sample.verdict.correct]


@pytest.mark.distributed
def test_training_does_not_depend_on_how_many_groups_each_leader_keeps(forks: Forks, root: Path) -> None:
    run_made_up(
        forks,
        root / "config.yaml",
        2,
        [f"run_dir={root / 'two-leaders'} {LIVE}", f"run_dir={root / 'tp'} {LIVE} parallel.tp=2"],
    )
    files = sorted((root / "two-leaders" / "rollouts").glob("*.jsonl"))
    assert [len(read_groups(file)) for file in files] == [4, 0, 1, 3]
    assert [read_header(file).files for file in files] == [2, 2, 2, 2]
    for run_dir in (root / "two-leaders", root / "tp"):
        assert_sampled_as_planned(run_dir)
        assert_same_training(run_dir, root / "live")
        for found, expected in zip(first_lines(run_dir), first_lines(root / "live"), strict=True):
            for name in ("rollout/reward/mean", "rollout/overlong_punishment/mean", "rollout/truncated"):
                assert found[name] == pytest.approx(expected[name], rel=1e-12), name


@pytest.mark.distributed
def test_a_search_among_more_groups_than_it_needs_takes_each_once(forks: Forks, root: Path) -> None:
    run_dir = root / "over-sampled"
    keys = "rollout.lag=1 rollout.over_sampling=2"
    run_made_up(forks, root / "config.yaml", 2, [f"run_dir={run_dir} {LIVE} {keys}"])
    written = declared_names.written(run_dir)
    assert written >= declared_names.DYNAMIC | declared_names.OVER_SAMPLED
    (manifest,) = (run_dir / "checkpoints").glob("*/manifest.json")
    state = orjson.loads(manifest.read_bytes())["state"]
    sampled = sum(line["rollout/dynamic_sampling/prompts"] for line in first_lines(run_dir))
    assert state["cursor"]["epoch"] * 24 + state["cursor"]["position"] + len(state["taken"]) == sampled
    kept = [group for step in range(1, STEPS + 1) for group in saved(run_dir, step)]
    assert [group.index for group in kept] == [0, 1, 2, 3] * STEPS
    assert len({group.prompt.id for group in kept}) == len(kept)


def test_a_replay_trains_the_same_and_punishes_overlong_responses_once(forks: Forks, root: Path) -> None:
    run_all(forks, root / "config.yaml", 1, [f"run_dir={root / 'replay'} rollout.replay_from={root / 'live'} {SHAPED}"])
    assert_same_training(root / "replay", root / "live")
    for step, line in enumerate(first_lines(root / "replay"), start=1):
        samples = [s for g in saved(root / "live", step) for s in g.samples]
        own = [1.0 if s.verdict.correct else -0.5 - len(s.prompt.token_ids) for s in samples if s.verdict]
        punishments = [max(min((4 - s.response_tokens) / 4, 0), -1) for s in samples]
        assert line["rollout/overlong_punishment/mean"] == pytest.approx(np.mean(punishments))
        assert line["rollout/reward/mean"] == pytest.approx(np.mean(own) + np.mean(punishments))
        assert -1 < np.mean(punishments) < 0
        assert not any(name.startswith("rollout/dynamic_sampling/") for name in line)


@pytest.mark.distributed
def test_a_run_that_finds_too_few_mixed_groups_ends_on_every_rank(forks: Forks, root: Path) -> None:
    prompts = write_prompts(root / "dead.jsonl", TAKEN[0] + [0, 0, 4] * 20)
    options = f"run_dir={root / 'dead'} {LIVE} rollout.dynamic_sampling.max_refills=3 data.train={prompts}"
    run_made_up(forks, root / "config.yaml", 2, [options, f"--resume {options} train.steps=1"])
    told = [(root / "dead" / f"error-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith("rollout.dynamic_sampling: 0 of the 4 groups of a step have right and wrong answers")
    assert "of 24 prompts sampled, 8 were answered all right and 16 all wrong. --resume goes on" in told[0]
    assert "easier prompts" in told[0]
    assert told[0].endswith("saved: ['step-000001']")
    # The previous step is saved, and the prompts of the failed step will be sampled again.
    (manifest,) = (root / "dead" / "checkpoints").glob("*/manifest.json")
    state = orjson.loads(manifest.read_bytes())["state"]
    assert (state["step"], state["cursor"]["position"]) == (1, 8)
    assert weights(root / "dead")


# ---- overlong filtering ------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_a_filtered_response_counts_in_no_denominator(forks: Forks, root: Path) -> None:
    """The run equals one on a file with shaped rewards in which the truncated responses are masked out.

    Rewards of masked-out responses count in their groups. The first mini-batch has only such responses.
    """
    for step in range(1, STEPS + 1):
        groups = [_truncated(g) if step == 1 and g.index < 2 else g for g in saved(root / "live", step)]
        masked = [_masked(g) for g in shape_rewards(groups, REWARD, LONGEST)]
        for name, written in (("truncated", groups), ("masked", masked)):
            write_groups(root / name / "rollouts" / f"step-{step:06d}-dp-0000.jsonl", written, weight_version=step - 1)
    unfiltered = f"rollout.replay_from={root / 'truncated'} {SHAPED}"
    filtered = f"{unfiltered} reward.overlong_filter=true"
    by_hand = f"rollout.replay_from={root / 'masked'}"
    runs = {"filtered": filtered, "by-hand": by_hand, "unfiltered": unfiltered}
    run_all(forks, root / "config.yaml", 1, [f"run_dir={root / name} {run}" for name, run in runs.items()])
    run_all(forks, root / "config.yaml", 2, [f"run_dir={root / 'filtered-2'} {filtered}"])
    assert_same_training(root / "filtered", root / "by-hand")
    assert_same_training(root / "filtered-2", root / "by-hand")
    trained = weights(root / "unfiltered")
    assert any(not torch.equal(weight, trained[name]) for name, weight in weights(root / "filtered").items())

    lines, plain = first_lines(root / "filtered"), first_lines(root / "unfiltered")
    assert lines[0]["sequences"] == lines[0]["tokens"] == lines[0]["loss"] == 0
    for line, other in zip(lines, plain, strict=True):
        assert line["rollout/overlong_filtered"] == line["rollout/truncated"] == other["rollout/truncated"]
        assert 0.1 < line["rollout/overlong_filtered"] < 0.9
        assert line["rollout/tokens"] == other["rollout/tokens"]
        assert "rollout/overlong_filtered" not in other


def _truncated(group: Group) -> Group:
    samples = (dataclasses.replace(sample, finish_reason="length") for sample in group.samples)
    return dataclasses.replace(group, samples=tuple(samples))


def _masked(group: Group) -> Group:
    samples = (
        dataclasses.replace(s, loss_mask=np.zeros_like(s.loss_mask)) if s.finish_reason == "length" else s
        for s in group.samples
    )
    return dataclasses.replace(group, samples=tuple(samples))


# ---- lost verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_lost_verdicts_are_left_out_and_a_step_without_any_verdict_ends_the_run(forks: Forks, root: Path) -> None:
    prompts = write_prompts(root / "lost.jsonl", [2] * 16)
    common = f"rollout.replay_from=null rollout.dynamic_sampling=null data.train={prompts}"
    some, later = (f"run_dir={root / name} {common} data.verifier=verifier_examples:" for name in ("some", "later"))
    run_made_up(forks, root / "config.yaml", 2, [f"{some}loses_some", f"{later}loses_all_later reward.workers=1"])
    for step, line in enumerate(first_lines(root / "some"), start=1):
        samples = [s for g in saved(root / "some", step) for s in g.samples]
        lost = [s for s in samples if s.verdict and s.verdict.lost]
        assert line["rollout/lost_verdicts"] == len(lost) == 4
        assert line["rollout/samples"] == len(samples) == 16
        assert line["rollout/accuracy"] == 8 / 12
        trained = [m for m in read_metrics(root / "some" / "metrics.jsonl") if m["step"] == step]
        assert sum(m["sequences"] for m in trained) == 12
        assert sum(m["tokens"] for m in trained) == sum(s.response_tokens for s in samples if s not in lost)
    run_all(forks, root / "config.yaml", 1, [f"run_dir={root / 'again'} rollout.replay_from={root / 'some'}"])
    assert_same_training(root / "again", root / "some")
    told = [(root / "later" / f"error-{rank}").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert told[0].startswith("data.verifier: none of the responses to 4 prompts has a verdict")
    assert told[0].endswith("saved: ['step-000001']")
    (manifest,) = (root / "later" / "checkpoints").glob("*/manifest.json")
    assert orjson.loads(manifest.read_bytes())["state"]["cursor"]["position"] == 4
