"""What the choice of a step's groups needs of other keys. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_rl.config.schema import RolloutConfig


def check_choice(rollout: RolloutConfig) -> Iterator[str]:
    """Yields one line for each key that cannot be met."""
    if rollout.dynamic_sampling is not None and rollout.group_size == 1:
        yield "rollout.dynamic_sampling: a group of rollout.group_size 1 has no right and wrong answers; set it to null"
    times, lag = rollout.over_sampling, rollout.lag
    if times is not None and times > 1 + lag and rollout.replay_from is None:
        lower = "set over_sampling to null" if lag == 0 else f"lower over_sampling to {1 + lag}"
        yield (
            f"rollout.over_sampling: {times:g}, but with rollout.lag {lag} a group may be trained on in {1 + lag} "
            f"steps at most, which take {1 + lag} times prompts_per_step; raise lag to {math.ceil(times) - 1}, or "
            f"{lower}"
        )
