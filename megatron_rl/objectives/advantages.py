"""Advantages of one group of responses to the same prompt. NumPy in float64, no torch: leaders call it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_rl.config.schema import AdvantageConfig

# Rewards nearer to each other than this, relative to the largest, are equal: shaped rewards carry rounding
# errors, and dividing by the standard deviation would blow them up to +-1.
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
    return bool(np.ptp(rewards) <= EQUAL_REWARDS * np.abs(rewards).max())
