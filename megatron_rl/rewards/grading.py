"""Judges the groups of a rollout."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from megatron_rl.data.sample import LOST, Group, Sample, Verdict
from megatron_rl.named_code import ResultError
from megatron_rl.rewards.judges import Failure, Judges, ResponseTask
from megatron_rl.rewards.verifiers import call_verifier, get_verifier

logger = logging.getLogger(__name__)

# This verifier compares two strings. All others may be slow, hang or crash, so they run in processes of their own.
_QUICK = ("arithmetic",)


def grade(groups: Sequence[Group], decode: Callable[[list[int]], str], judges: Judges | None = None) -> list[Group]:
    """The groups with a verdict and a text on every sample. `decode` turns response ids into text, without special
    tokens. An environment may have given the verdict; else the verifier judges the last that the policy said.

    The verdict is LOST if the verifier fails, gives a reward that is not finite, takes too long, or ends its worker; a
    warning names some of these samples. Without `judges`, workers are started for this call and stopped after it.
    Raises RewardError if a verifier cannot be started.
    """
    samples = [sample for group in groups for sample in group.samples]
    answers = [
        ResponseTask(sample.prompt, decode(sample.last_turn_ids.tolist()), number)
        for number, group in enumerate(groups)
        for sample in group.samples
    ]
    positions = defaultdict(list)
    verdicts: dict[int, Verdict] = {}
    for position, sample in enumerate(samples):
        if sample.verdict is None:
            positions[sample.prompt.verifier].append(position)
        else:
            verdicts[position] = sample.verdict
    with ExitStack() as stack:
        judges = judges or stack.enter_context(Judges())
        for verifier, places in positions.items():
            mine = [answers[p] for p in places]
            results = _judge_here(verifier, mine) if verifier in _QUICK else judges.judge(verifier, mine)
            verdicts.update(zip(places, _settle(verifier, [samples[p] for p in places], mine, results), strict=True))
    judged = (
        dataclasses.replace(sample, verdict=verdicts[p], response=decode(sample.response_ids.tolist()))
        for p, sample in enumerate(samples)
    )
    return [dataclasses.replace(group, samples=tuple(next(judged) for _ in group.samples)) for group in groups]


def _judge_here(name: str, answers: Sequence[ResponseTask]) -> list[Verdict | Failure]:
    verifier = get_verifier(name)
    results = [call_verifier(verifier, answer.prompt, [answer.response])[0] for answer in answers]
    return [Failure(str(result)) if isinstance(result, ResultError) else result for result in results]


def _settle(
    verifier: str, samples: Sequence[Sample], answers: Sequence[ResponseTask], results: Sequence[Verdict | Failure]
) -> list[Verdict]:
    lost = [
        f"prompt {sample.prompt.id!r} sample {sample.index}: {result.reason}; response {answer.response[:100]!r}"
        for sample, answer, result in zip(samples, answers, results, strict=True)
        if isinstance(result, Failure)
    ]
    if lost:
        some = "; ".join(lost[:3]) + ("; ..." if len(lost) > 3 else "")
        logger.warning(
            "verifier %r: %d of %d answers have no verdict and are left out: %s",
            verifier,
            len(lost),
            len(samples),
            some,
        )
    return [LOST if isinstance(result, Failure) else result for result in results]
