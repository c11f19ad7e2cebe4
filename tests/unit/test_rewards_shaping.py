"""DAPO's rewards: values and properties of equation 13; shaping happens only once, and filtering last."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.sample import FinishReason, Group, Prompt, Sample, Verdict
from megatron_rl.data.store import read_groups, write_groups
from megatron_rl.rewards.shaping import filter_overlong, overlong_punishment, shape_rewards

PROMPT = Prompt("p", "2+2=", (1, 2, 3), "4", "math")
LONGEST = 10
DAPO = RewardConfig(correct=1.0, wrong=-1.0, overlong_cache=4)


def sample(index: int, length: int, reward: float, correct: bool, finish: FinishReason = "stop") -> Sample:
    grown = Sample.start(PROMPT, index).extend([7] * length, [-0.5] * length, 3)
    return dataclasses.replace(grown, finish_reason=finish, verdict=Verdict(reward, correct))


def group(*samples: Sample) -> Group:
    return Group(0, PROMPT, samples)


def verdicts(groups: list[Group]) -> list[Verdict | None]:
    return [sample.verdict for group in groups for sample in group.samples]


MIXED = group(
    sample(0, 6, 0.7, True),
    sample(1, 8, 0.7, True),
    sample(2, 10, 0.2, False, "length"),
    sample(3, 0, 0.2, False),
)


# ---- the soft overlong punishment --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "punishment"),
    [
        (0, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1.0),
        (20481, -1.0),
        (90000, -1.0),
    ],
)
def test_the_overlong_punishment_equals_equation_13_at_the_papers_lengths(tokens: int, punishment: float) -> None:
    assert overlong_punishment(tokens, longest=20480, cache=4096) == punishment


lengths = st.integers(2, 50000).flatmap(lambda longest: st.tuples(st.just(longest), st.integers(1, longest - 1)))


@given(lengths, st.integers(0, 60000))
def test_the_punishment_falls_from_0_to_minus_1_linearly(bounds: tuple[int, int], tokens: int) -> None:
    longest, cache = bounds
    here, next_ = (overlong_punishment(n, longest, cache) for n in (tokens, tokens + 1))
    assert -1 <= next_ <= here <= 0
    inside = longest - cache <= tokens < longest
    assert here - next_ == pytest.approx(1 / cache if inside else 0.0, abs=1e-12)


@given(lengths)
def test_the_punishment_is_continuous_at_both_knots(bounds: tuple[int, int]) -> None:
    """The middle piece of the function meets the outer pieces at both of its ends."""
    longest, cache = bounds
    middle = {n: ((longest - cache) - n) / cache for n in (longest - cache, longest)}
    assert middle == {n: overlong_punishment(n, longest, cache) for n in middle} == {longest - cache: 0, longest: -1}


# ---- shaping -----------------------------------------------------------------------------------------------------


def test_shaping_replaces_and_punishes_the_reward_but_keeps_accuracy() -> None:
    found = verdicts(shape_rewards([MIXED], DAPO, LONGEST))
    assert found == [Verdict(1.0, True), Verdict(0.5, True), Verdict(-2.0, False), Verdict(-1.0, False)]
    assert verdicts([MIXED])[0] == Verdict(0.7, True)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (RewardConfig(), [0.7, 0.7, 0.2, 0.2]),
        (RewardConfig(correct=2.0), [2.0, 2.0, 0.2, 0.2]),
        (RewardConfig(wrong=0.0), [0.7, 0.7, 0.0, 0.0]),
        (RewardConfig(overlong_cache=8), [0.7 - 0.5, 0.7 - 0.75, 0.2 - 1.0, 0.2]),
        (RewardConfig(overlong_filter=True), [0.7, 0.7, 0.2, 0.2]),
    ],
)
def test_unset_rewards_keep_the_verifiers_value(reward: RewardConfig, expected: list[float]) -> None:
    found = verdicts(shape_rewards([MIXED], reward, LONGEST))
    assert [v.reward for v in found if v] == pytest.approx(expected)
    assert [v.correct for v in found if v] == [True, True, False, False]


def test_tokens_not_generated_by_the_policy_are_not_punished() -> None:
    grown = sample(0, 5, 0.0, True).extend([9] * 50, None, 3)
    assert verdicts(shape_rewards([group(grown)], DAPO, LONGEST)) == [Verdict(1.0, True)]


def test_empty_groups_and_single_samples_are_shaped() -> None:
    assert shape_rewards([], DAPO, LONGEST) == filter_overlong([], DAPO) == []
    assert verdicts(shape_rewards([group(), group(sample(0, 0, 0.0, False))], DAPO, LONGEST)) == [Verdict(-1.0, False)]


def test_the_error_names_a_sample_without_a_verdict() -> None:
    unjudged = dataclasses.replace(MIXED.samples[1], verdict=None)
    with pytest.raises(ValueError, match="prompt 'p' sample 1: no verdict"):
        shape_rewards([group(unjudged)], DAPO, LONGEST)


def test_saved_rollouts_are_shaped_like_fresh_ones(tmp_path: Path) -> None:
    """The file has the verifier's unshaped verdicts, so a replay does not punish a response twice."""
    write_groups(tmp_path / "a.jsonl", [MIXED], weight_version=3)
    saved = read_groups(tmp_path / "a.jsonl")
    assert verdicts(saved) == verdicts([MIXED])
    assert verdicts(shape_rewards(saved, DAPO, LONGEST)) == verdicts(shape_rewards([MIXED], DAPO, LONGEST))


# ---- overlong filtering ------------------------------------------------------------------------------------------


def test_only_truncated_responses_are_masked_out() -> None:
    shaped = shape_rewards([MIXED], DAPO, LONGEST)
    (filtered,) = filter_overlong(shaped, RewardConfig(overlong_filter=True))
    assert [s.response_tokens for s in filtered.samples] == [6, 8, 0, 0]
    assert verdicts([filtered]) == verdicts(shaped)
    gone = filtered.samples[2]
    assert not gone.rollout_logprobs.any()
    np.testing.assert_array_equal(gone.token_ids, MIXED.samples[2].token_ids)
    assert MIXED.samples[2].response_tokens == 10
    assert all(a is b for a, b in zip(filtered.samples[:2], shaped[0].samples[:2], strict=True))


def test_nothing_is_filtered_by_default() -> None:
    assert filter_overlong([MIXED], DAPO) == [MIXED]
