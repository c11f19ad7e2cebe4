"""Verifiers: functions (prompt, response text) -> Verdict, and the judging of a rollout's groups."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.errors import UserError
from megatron_rl.rewards.arithmetic import verify_arithmetic
from megatron_rl.rewards.math import verify_math

Verifier = Callable[[Prompt, str], Verdict]

VERIFIERS: dict[str, Verifier] = {"arithmetic": verify_arithmetic, "math": verify_math}


class RewardError(UserError):
    """A verifier that does not exist, fails or gives a reward that cannot be used; names the prompt."""


def get_verifier(name: str) -> Verifier:
    """One of VERIFIERS, or a user's own as `package.module:function`."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise RewardError(f"verifier {name!r}: there are {', '.join(VERIFIERS)}, or package.module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RewardError(f"verifier {name!r}: {error}") from None


def grade(groups: Sequence[Group], decode: Callable[[Sequence[int]], str]) -> list[Group]:
    """The groups with every sample's verdict. `decode` turns response ids into text, special tokens left out."""
    return [
        dataclasses.replace(group, samples=tuple(_judge(sample, decode) for sample in group.samples))
        for group in groups
    ]


def _judge(sample: Sample, decode: Callable[[Sequence[int]], str]) -> Sample:
    prompt = sample.prompt
    text = decode(sample.response_ids.tolist())
    try:
        verdict = get_verifier(prompt.verifier)(prompt, text)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"prompt {prompt.id!r} sample {sample.index}: verifier {prompt.verifier!r} failed: "
            f"{type(error).__name__}: {error}; the response was {text[:200]!r}"
        ) from error
    if not math.isfinite(verdict.reward):
        raise RewardError(
            f"prompt {prompt.id!r} sample {sample.index}: verifier {prompt.verifier!r} gave a reward of {verdict.reward}"
        )
    return dataclasses.replace(sample, verdict=verdict)
