"""Tries reference answers when a data set is loaded: an unreadable one would lose all verdicts of its prompt."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.judges import Failure, Judges
from megatron_rl.rewards.verifiers import UNCHECKED, VERIFIERS

# Every built-in verifier can read such a number. If a data set has no other references, no process is started.
_NUMBER = re.compile(r"-?\d{1,100}(\.\d{1,100})?", re.ASCII)


def check_references(prompts: Sequence[Prompt], pool: Judges) -> dict[tuple[str, str], str]:
    """Problems by (verifier, reference answer) of these prompts; pairs without a problem are left out.

    Verifiers run in worker processes of `pool`: reading a reference may never end, and a user's verifier is imported
    only there. If a built-in verifier takes too long, the reference passes. Raises RewardError,
    which names the verifier, if a user's verifier takes too long or if a verifier does not start.
    """
    asked: defaultdict[str, dict[str, Prompt]] = defaultdict(dict)
    for prompt in prompts:
        if prompt.verifier not in VERIFIERS or not _NUMBER.fullmatch(prompt.answer):
            asked[prompt.verifier].setdefault(prompt.answer, prompt)
    problems: dict[tuple[str, str], str] = {}
    for verifier, answers in asked.items():
        for answer, problem in _ask(pool, verifier, list(answers.values())):
            problems[verifier, answer] = problem
    return problems


def _ask(pool: Judges, verifier: str, prompts: Sequence[Prompt]) -> list[tuple[str, str]]:
    """Yields (reference answer, problem) of one verifier. The first result shows whether the verifier has a check."""
    results = pool.check(verifier, prompts[:1])
    if results[0] != UNCHECKED:
        results += pool.check(verifier, prompts[1:])
    return [
        (prompt.answer, result.reason)
        for prompt, result in zip(prompts, results, strict=False)
        if isinstance(result, Failure) and not result.silent
    ]
