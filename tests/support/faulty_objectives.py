"""A user's objectives that fail."""

from __future__ import annotations

import dataclasses

from megatron_rl.objectives.policy_loss import policy_loss

_calls = 0


def not_finite_in_the_second_mini_batch(inputs, config, denominators):  # type: ignore[no-untyped-def]
    """Gives one replica of two a non-finite loss in one micro-batch; all ranks must skip the step."""
    import torch.distributed as dist

    global _calls
    _calls += 1
    outputs = policy_loss(inputs, config, denominators)
    if _calls == 2 and dist.get_rank() == 0:
        return dataclasses.replace(outputs, loss=outputs.loss * float("nan"))
    return outputs


def never_finite(inputs, config, denominators):  # type: ignore[no-untyped-def]
    outputs = policy_loss(inputs, config, denominators)
    return dataclasses.replace(outputs, loss=outputs.loss * float("inf"))


def refuses_an_empty_micro_batch(inputs, config, denominators):  # type: ignore[no-untyped-def]
    """Works on every micro-batch with a response, like a mean over tokens."""
    if not inputs.loss_mask.any():
        raise ValueError("no token to take a mean of")
    return policy_loss(inputs, config, denominators)
