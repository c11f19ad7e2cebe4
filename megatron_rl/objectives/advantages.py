"""Advantages: of a group of responses to one prompt, and by token from a critic's values. NumPy float64, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rl.config.switches import AdvantageConfig

# Rewards nearer to each other than this, and than this times the largest, are equal: shaped rewards carry rounding
# errors, those that cancel too, and dividing by the standard deviation would blow them up to +-1.
EQUAL_REWARDS = 1e-9

DEGREES_OF_FREEDOM = {"population": 0, "sample": 1}


def group_advantages(
    rewards: Sequence[float] | npt.NDArray[np.floating], config: AdvantageConfig
) -> npt.NDArray[np.float64]:
    """Advantages [G] of the rewards [G] of one group; groups may differ in size.

    (R - mean) / std is GRPO [2402.03300], R - mean is Dr.GRPO [2503.20783]. R less the mean of the others' rewards is
    RLOO [2402.14740], equal to G/(G - 1) (R - mean). `baseline: none` with `std: none` gives the rewards themselves.
    There is no epsilon beside the standard deviation. A group whose rewards are all equal, a group of one among them,
    has advantage 0 wherever a baseline or a std is asked for.

    Raises ValueError when the group is empty or a reward is not finite.
    """
    values = np.array(rewards, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"rewards: expected one number per response of a group, found shape {values.shape}")
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(
            f"rewards: response {bad} of its group has reward {values[bad]}; a verifier must give finite ones"
        )
    if config.baseline == "none" and config.std == "none":
        return values
    if all_equal(values):
        return np.zeros_like(values)
    centred = values if config.baseline == "none" else values - values.mean()
    if config.baseline == "leave-one-out":
        centred *= len(values) / (len(values) - 1)
    if config.std == "none":
        return centred
    return centred / values.std(ddof=DEGREES_OF_FREEDOM[config.std])


def all_equal(rewards: npt.NDArray[np.float64]) -> bool:
    """True when the group teaches nothing: its rewards [G] differ by no more than rounding."""
    return bool(np.ptp(rewards) <= EQUAL_REWARDS * max(np.abs(rewards).max(), 1.0))


def gae(
    rewards: npt.NDArray[np.floating], values: npt.NDArray[np.floating], gamma: float, gae_lambda: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Generalised advantages [n] of the n masked-in tokens of one response, and their returns A + V [n].

    delta_t = R_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lambda)^l delta_{t+l} [1506.02438, equations 14 and 16];
    after the last token there is nothing to come. Observation tokens are not among the n: the recursion skips them.
    """
    here = np.array(values, dtype=np.float64)
    following = np.append(here[1:], 0.0)[: len(here)]
    deltas = np.asarray(rewards, dtype=np.float64) + gamma * following - here
    advantages = np.empty_like(deltas)
    ahead = 0.0
    for t in range(len(deltas) - 1, -1, -1):
        ahead = deltas[t] + gamma * gae_lambda * ahead
        advantages[t] = ahead
    return advantages, advantages + here


def token_rewards(reward: float, penalties: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """[n] rewards of a response's masked-in tokens: the response's own at its last, less each token's penalty [n]."""
    rewards = -np.array(penalties, dtype=np.float64)
    if len(rewards):
        rewards[-1] += reward
    return rewards


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations of all masked-in tokens' advantages; they add up over replicas.

    Deviations are from the mean, and merged as such (Chan, Golub, LeVeque 1979): the squares less those of the mean
    would leave, where advantages are all but equal, nothing but rounding, which differs from layout to layout.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    """Sum of squared differences from the mean."""

    @classmethod
    def of(cls, values: npt.NDArray[np.float64]) -> Moments:
        if not len(values):
            return cls()
        mean = float(values.mean())
        return cls(len(values), mean, float(np.square(values - mean).sum()))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        share = other.count / max(count, 1)
        apart = other.mean - self.mean
        deviation = self.deviation + other.deviation + apart * apart * self.count * share
        return Moments(count, self.mean + apart * share, deviation)

    def normalise(self, values: npt.NDArray[np.float64], config: AdvantageConfig) -> npt.NDArray[np.float64]:
        """Less the mean and over the standard deviation, as the switches say; 0 where all are equal."""
        centred = values - self.mean if config.baseline == "mean" else values
        if config.std == "none":
            return centred
        freedom = self.count - DEGREES_OF_FREEDOM[config.std]
        spread = math.sqrt(self.deviation / max(freedom, 1))
        size = math.sqrt(self.mean * self.mean + self.deviation / max(self.count, 1))
        if spread <= EQUAL_REWARDS * max(size, 1.0):
            return np.zeros_like(centred)
        return centred / spread
