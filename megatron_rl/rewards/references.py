"""Reference answers, tried when a data set is loaded: one that cannot be read would end the run at its first sample."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.judges import Answer, Failure, Judges
from megatron_rl.rewards.registry import check_answer, get_verifier

# Every verifier of answers can read one of these. Most data sets have no others, and then no process is started.
_NUMBER = re.compile(r"-?\d{1,100}(\.\d{1,100})?")
ANSWERS_PER_WORKER = 50
MAX_WORKERS = 8
DEADLINE = 10.0  # seconds for one answer, as for a response

_NAME = f"{__name__}:verify_reference"


def check_references(prompts: Sequence[Prompt]) -> dict[tuple[str, str], str]:
    """Why a (verifier, reference answer) of these prompts cannot be judged by; those that can are left out.

    A verifier checks in worker processes: a reference can be such that to read it never ends. Raises RewardError for a
    verifier that does not exist.
    """
    answers: defaultdict[str, dict[str, Prompt]] = defaultdict(dict)
    for prompt in prompts:
        answers[prompt.verifier].setdefault(prompt.answer, prompt)
    problems = {}
    for verifier, by_answer in answers.items():
        if not hasattr(get_verifier(verifier), "check_answer"):
            continue
        asked = [Answer(prompt, "") for answer, prompt in by_answer.items() if not _NUMBER.fullmatch(answer)]
        workers = min(MAX_WORKERS, -(-len(asked) // ANSWERS_PER_WORKER))
        with Judges(workers, DEADLINE) as judges:
            for one, result in zip(asked, judges.judge(_NAME, asked) if asked else (), strict=True):
                if isinstance(result, Failure):
                    problems[verifier, one.prompt.answer] = result.reason.removeprefix("ValueError: ")
    return problems


def verify_reference(prompt: Prompt, response: str) -> Verdict:
    """What the worker processes run. Raises ValueError with what is wrong with the prompt's reference answer."""
    problem = check_answer(prompt.verifier, prompt.answer)
    if problem is not None:
        raise ValueError(problem)
    return Verdict(0.0, False)
