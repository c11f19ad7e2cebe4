"""Reference answers, tried when a data set is loaded: one that cannot be read would end the run at its first sample."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.judges import Answer, Failure, Judges
from megatron_rl.rewards.registry import check_answer, get_verifier

# Every verifier of answers can read one of these. Most data sets have no others, and then no process is started.
_NUMBER = re.compile(r"-?\d{1,100}(\.\d{1,100})?")

_NAME = f"{__name__}:verify_reference"


def check_references(prompts: Sequence[Prompt], judges: Callable[[], Judges] = Judges) -> dict[tuple[str, str], str]:
    """Why a (verifier, reference answer) of these prompts cannot be judged by; those that can are left out.

    Verifiers check in worker processes, of a pool that `judges` makes: to read a reference may never end, and a user's
    verifier is imported there only. Raises RewardError if they do not start.
    """
    asked: defaultdict[str, dict[str, Answer]] = defaultdict(dict)
    for prompt in prompts:
        if not _NUMBER.fullmatch(prompt.answer):
            asked[prompt.verifier].setdefault(prompt.answer, Answer(prompt, ""))
    problems: dict[tuple[str, str], str] = {}
    if asked:
        with judges() as pool:
            for verifier, answers in asked.items():
                for answer, problem in _ask(pool, list(answers.values())):
                    problems[verifier, answer] = problem
    return problems


def _ask(pool: Judges, answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """(reference answer, problem) of one verifier. The first answer tells whether there is a check at all."""
    results = pool.judge(_NAME, answers[:1])
    if results[0] != _UNCHECKED:
        results += pool.judge(_NAME, answers[1:])
    return [
        (answer.prompt.answer, result.reason.removeprefix("ValueError: "))
        for answer, result in zip(answers, results, strict=False)
        if isinstance(result, Failure)
    ]


_CHECKED, _UNCHECKED = Verdict(1.0, True), Verdict(0.0, False)


def verify_reference(prompt: Prompt, response: str) -> Verdict:
    """What the workers run. Raises ValueError with what is wrong with the prompt's reference answer."""
    problem = check_answer(prompt.verifier, prompt.answer)
    if problem is not None:
        raise ValueError(problem)
    return _CHECKED if hasattr(get_verifier(prompt.verifier), "check_answer") else _UNCHECKED
