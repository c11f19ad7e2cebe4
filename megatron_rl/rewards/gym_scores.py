"""The verifier of the package reasoning-gym's problems (megatron_rl.data.gym_task)."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any

from megatron_rl.data.gym_task import GymTask
from megatron_rl.data.sample import Prompt, Verdict

with contextlib.suppress(ImportError):
    import reasoning_gym  # noqa: F401  it takes seconds, which would count as the first answer's

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def verify_gym(prompt: Prompt, response: str) -> Verdict:
    """The score of the problem's generator for the last `<answer>`, or for the whole response if there is none; correct
    if it is 1. Raises ValueError if the generator does not make the prompt's problem again."""
    spec, _, number = prompt.id.rpartition(":")
    made = _made(spec)
    item = _item(spec, int(number))
    if item["question"].strip() not in prompt.text:
        raise ValueError(f"{spec} makes another problem {number} than the prompt's; it is not reproducible")
    answers = _TAGGED.findall(response)
    score = float(made.score_answer((answers[-1] if answers else response).strip(), item))
    return Verdict(score, score >= 1.0)


@functools.lru_cache(maxsize=8)
def _made(spec: str) -> Any:
    return GymTask.parse(spec).make()


@functools.lru_cache(maxsize=4096)
def _item(spec: str, number: int) -> Any:
    return _made(spec)[number]
