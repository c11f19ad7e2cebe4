"""The configuration of samples that take several turns. No torch."""

from __future__ import annotations

from pydantic import Field

from megatron_rl.config.bounds import Frozen, PositiveInt


class EnvironmentConfig(Frozen):
    """What answers the policy in samples of several turns (docs/multi-turn.md). Its steps run as verifiers do, within
    reward.timeout, reward.memory_mib and reward.environment."""

    name: str = Field(min_length=1)
    """`calculator`, `guessing`, or your own as `package.module:Class`."""
    max_turns: PositiveInt = 8
    """Messages of the policy after which a sample is cut off."""
    renderer: str | None = None
    """How messages become tokens: the name that the package `renderers` has for the model's chat template; null: their
    text alone."""
