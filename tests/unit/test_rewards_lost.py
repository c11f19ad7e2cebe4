"""A sample with a lost verdict has no effect on its group's advantages, on the loss and on reward metrics."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_rl.config.schema import Config, RewardConfig
from megatron_rl.config.switches import GroupAdvantage
from megatron_rl.data.packing import pack_all
from megatron_rl.data.sample import LOST, Group, Prompt, Sample, Verdict
from megatron_rl.data.schedule import Denominators
from megatron_rl.data.store import decode_samples, encode_samples, read_groups, write_groups
from megatron_rl.engine import packed_advantages
from megatron_rl.engine.distribute import MiniBatch, Outcome
from megatron_rl.lab.metrics import ROLLOUT, rollout_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.advantages import group_advantages
from megatron_rl.rewards.shaping import shape_rewards, without_lost
from megatron_rl.rollout.dynamic import LostVerdictsError, Tally, check_verdicts
from megatron_rl.rollout.evaluate import evaluation
from megatron_rl.train import with_advantages

PROMPT = Prompt("p", "2+2=", (1, 2, 3), "4", "math")
RIGHT, WRONG = Verdict(1.0, True), Verdict(0.25, False)


def group(*verdicts: Verdict, index: int = 0) -> Group:
    samples = []
    for number, verdict in enumerate(verdicts):
        grown = Sample.start(PROMPT, number).extend([7] * (number + 1), [-0.5] * (number + 1), 3)
        samples.append(dataclasses.replace(grown, finish_reason="stop", verdict=verdict))
    return Group(index, PROMPT, tuple(samples))


def config(advantage: GroupAdvantage) -> Config:
    sections = {"objective": {"advantage": advantage.model_dump()}, "model": {"path": "/m"}, "data": {"train": "/d"}}
    return Config.model_validate({"run_dir": "/r", "train": {"steps": 1}, **sections})


MIXED = group(RIGHT, LOST, WRONG, LOST, RIGHT)


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "none"])
@pytest.mark.parametrize("std", ["population", "sample", "none"])
def test_advantages_ignore_samples_with_lost_verdicts(baseline: str, std: str) -> None:
    advantage = GroupAdvantage.model_validate({"baseline": baseline, "std": std})
    found = with_advantages([MIXED, group(LOST, LOST, index=1)], config(advantage))
    expected = group_advantages([1.0, 0.25, 1.0], advantage)
    assert [sample.index for sample in found] == [0, 1, 2, 3, 4, 8, 9]
    np.testing.assert_array_equal([found[i].advantage for i in (0, 2, 4)], expected)
    assert [found[i].advantage for i in (1, 3, 5, 6)] == [0.0] * 4


def test_penalised_advantages_ignore_samples_with_lost_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With KL in the reward, advantages are computed after the forward passes (engine.packed_advantages)."""
    monkeypatch.setattr(packed_advantages, "_gather", lambda mine, _: [mine])
    place = SimpleNamespace(speaks_for_stage=True)
    advantage = GroupAdvantage(baseline="mean", std="none")
    found = {}
    for name, groups in (("with", without_lost([MIXED])), ("without", [group(RIGHT, LOST, WRONG, LOST, RIGHT)])):
        samples = [s for s in groups[0].samples if name == "with" or s.verdict != LOST]
        packed = pack_all([[(sample, 0.0) for sample in samples]], cp=1, tp=1, equal=False)
        outcomes = tuple(Outcome(s.index, 0, s.verdict.reward, s.verdict.lost) for s in samples if s.verdict)
        batch = MiniBatch(0, packed, (outcomes,), Denominators(9, 3))
        penalties = [[0.125 * packed[0].loss_mask.astype(np.float64)]]
        (finished,) = packed_advantages.group_finish([batch], penalties, advantage, place)  # type: ignore[arg-type]
        values, mask = finished.micro_batches[0].advantages, packed[0].loss_mask
        found[name] = values[mask]
        assert not values[~mask].any()
    np.testing.assert_array_equal(found["with"], found["without"])
    assert found["with"].any()


def test_a_sample_with_a_lost_verdict_is_masked_out_and_keeps_its_position() -> None:
    (masked,) = without_lost([MIXED])
    assert [s.response_tokens for s in masked.samples] == [1, 0, 3, 0, 5]
    assert [s.verdict for s in masked.samples] == [s.verdict for s in MIXED.samples]
    np.testing.assert_array_equal(masked.samples[1].token_ids, MIXED.samples[1].token_ids)
    assert not masked.samples[1].rollout_logprobs.any()


def test_a_lost_verdict_is_not_shaped_into_a_reward() -> None:
    (shaped,) = shape_rewards([MIXED], RewardConfig(wrong=-1.0, correct=2.0, overlong_cache=4), 5)
    assert [s.verdict for s in shaped.samples if s.verdict and s.verdict.lost] == [LOST, LOST]
    assert [s.verdict.reward for s in shaped.samples if s.verdict and not s.verdict.lost] == [2.0, -1.5, 1.0]


def test_a_lost_verdict_is_kept_on_disk_and_between_ranks(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.jsonl", [MIXED], weight_version=3)
    saved = read_groups(tmp_path / "a.jsonl")[0].samples
    sent = decode_samples(encode_samples(MIXED.samples))
    assert [s.verdict for s in saved] == [s.verdict for s in sent] == [RIGHT, LOST, WRONG, LOST, RIGHT]


def test_metrics_count_lost_verdicts_and_leave_their_samples_out() -> None:
    metrics = MetricAccumulator(ROLLOUT)
    rollout_metrics(metrics, [MIXED, group(LOST, LOST, index=1), group(RIGHT, LOST, index=2)], 3)
    report = metrics.finalize()
    assert (report["lost_verdicts"], report["samples"]) == (5, 9)
    assert report["accuracy"] == pytest.approx(3 / 4)
    assert report["reward/mean"] == pytest.approx((1 + 0.25 + 1 + 1) / 4)
    assert report["reward/min"] == 0.25
    assert report["response_length/correct/mean"] == pytest.approx((1 + 5 + 1) / 3)
    assert report["response_length/wrong/mean"] == 3
    assert report["group/dead"] == pytest.approx(2 / 3)
    assert report["group/dead/all_correct"] == pytest.approx(1 / 3)
    assert report["group/dead/all_wrong"] == 0


def test_only_samples_with_a_verdict_decide_if_a_group_is_mixed() -> None:
    assert Tally.of(MIXED) == Tally(0, 2, 3)
    assert not Tally.of(group(RIGHT, LOST)).mixed  # even though not all samples are right
    assert not Tally.of(group(WRONG, LOST)).mixed
    assert not Tally.of(group(LOST)).mixed


def test_an_evaluation_counts_lost_verdicts_as_wrong_and_reports_them() -> None:
    report = evaluation([group(RIGHT, LOST), group(RIGHT, WRONG)])
    assert (report["avg_at_k"], report["pass_at_1"], report["lost_verdicts"]) == (0.5, 0.5, 1.0)
    assert report["reward"] == pytest.approx(2.25 / 3)
    assert evaluation([group(LOST)])["reward"] == 0.0


def test_a_step_without_any_verdict_is_an_error() -> None:
    check_verdicts([])
    check_verdicts([Tally.of(group(LOST)), Tally.of(group(LOST, WRONG))])
    with pytest.raises(LostVerdictsError, match=r"^data\.verifier: none of the responses to 2 prompts has a verdict"):
        check_verdicts([Tally.of(group(LOST, LOST)), Tally.of(group(LOST))])
