"""Reference answers, tried when a data set is loaded: one that cannot be read would lose all its prompt's verdicts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.judges import Failure, Judges
from megatron_rl.rewards.registry import UNCHECKED, VERIFIERS

# Every built-in verifier can read one of these. Most data sets have no others, and then no process is started.
_NUMBER = re.compile(r"-?\d{1,100}(\.\d{1,100})?", re.ASCII)


def check_references(prompts: Sequence[Prompt], judges: Callable[[], Judges] = Judges) -> dict[tuple[str, str], str]:
    """Why a (verifier, reference answer) of these prompts cannot be judged by; those that can are left out.

    Verifiers check in worker processes, of a pool that `judges` makes: to read a reference may never end, and a user's
    verifier is imported there only. A built-in verifier that takes too long over a reference says nothing against it.
    Raises RewardError, naming the verifier, if a user's does, or if one does not start.
    """
    asked: defaultdict[str, dict[str, Prompt]] = defaultdict(dict)
    for prompt in prompts:
        if prompt.verifier not in VERIFIERS or not _NUMBER.fullmatch(prompt.answer):
            asked[prompt.verifier].setdefault(prompt.answer, prompt)
    problems: dict[tuple[str, str], str] = {}
    if asked:
        with judges() as pool:
            for verifier, answers in asked.items():
                for answer, problem in _ask(pool, verifier, list(answers.values())):
                    problems[verifier, answer] = problem
    return problems


def _ask(pool: Judges, verifier: str, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """(reference answer, problem) of one verifier. The first answer tells whether there is a check at all."""
    results = pool.check(verifier, prompts[:1])
    if results[0] != UNCHECKED:
        results += pool.check(verifier, prompts[1:])
    return [
        (prompt.answer, result.reason.removeprefix("ValueError: "))
        for prompt, result in zip(prompts, results, strict=False)
        if isinstance(result, Failure) and not result.silent
    ]
