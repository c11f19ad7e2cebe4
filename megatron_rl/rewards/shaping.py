"""Turns verdicts into the rewards that are trained on: DAPO's rewards and overlong rules [2503.14476].

These are pure functions of judged groups. Rollouts are saved with the verifiers' own verdicts and shaped afterwards, in
a replay too. So shaping happens once, and a replay may use other rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.sample import Group, Sample, Verdict


def overlong_punishment(tokens: int, longest: int, cache: int) -> float:
    """Equation 13, in [-1, 0], for a response of `tokens` = |y|; L_max = `longest` > L_cache = `cache` > 0.

    0 for |y| <= L_max - L_cache, then ((L_max - L_cache) - |y|)/L_cache, and -1 beyond L_max.
    """
    return min(max((longest - cache - tokens) / cache, -1.0), 0.0)


def shape_rewards(groups: Sequence[Group], reward: RewardConfig, longest: int) -> list[Group]:
    """Replaces rewards by `reward.correct` and `reward.wrong`, if set, and adds the soft overlong punishment.

    `longest` is rollout.max_response_tokens. The verdict's `correct` does not change. Raises ValueError, which names
    the sample, if a sample has no verdict.
    """

    def shape(sample: Sample) -> Sample:
        verdict = sample.verdict
        if verdict is None:
            raise ValueError(f"prompt {sample.prompt.id!r} sample {sample.index}: no verdict; judge it before shaping")
        if verdict.lost:
            return sample
        given = reward.correct if verdict.correct else reward.wrong
        value = verdict.reward if given is None else given
        if reward.overlong_cache is not None:
            value += overlong_punishment(sample.response_tokens, longest, reward.overlong_cache)
        return dataclasses.replace(sample, verdict=Verdict(value, verdict.correct))

    return _with_samples(groups, shape)


def filter_overlong(groups: Sequence[Group], reward: RewardConfig) -> list[Group]:
    """Masks out every truncated response if `reward.overlong_filter` is on: no loss, no denominator counts its tokens.

    Its reward still counts in the mean and std of its group.
    """
    if not reward.overlong_filter:
        return list(groups)
    return _with_samples(groups, lambda sample: _masked_out(sample) if is_truncated(sample) else sample)


def without_lost(groups: Sequence[Group]) -> list[Group]:
    """Masks out every sample whose verdict was lost: no loss and no denominator counts its tokens.

    The sample keeps its place, so mini-batches stay as planned. with_advantages and group_finish leave it out of the
    mean and std of its group.
    """
    return _with_samples(groups, lambda sample: _masked_out(sample) if is_lost(sample) else sample)


def is_lost(sample: Sample) -> bool:
    """Whether the verifier failed on the response."""
    return sample.verdict is not None and sample.verdict.lost


def is_truncated(sample: Sample) -> bool:
    """Whether the response ended because it reached the length limit."""
    return sample.finish_reason == "length"


def _masked_out(sample: Sample) -> Sample:
    return dataclasses.replace(
        sample,
        loss_mask=np.zeros_like(sample.loss_mask),
        rollout_logprobs=np.zeros_like(sample.rollout_logprobs),  # zero outside the mask, as in every sample
    )


def _with_samples(groups: Sequence[Group], change: Callable[[Sample], Sample]) -> list[Group]:
    return [dataclasses.replace(group, samples=tuple(map(change, group.samples))) for group in groups]
