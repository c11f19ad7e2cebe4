"""The judging of a rollout's groups."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from megatron_rl.data.sample import LOST, Group, Sample, Verdict
from megatron_rl.rewards.judges import Failure, Judges, ResponseTask
from megatron_rl.rewards.registry import call_verifier, get_verifier

logger = logging.getLogger(__name__)

# Compares two strings. All others may be slow, hang or crash, and run in processes of their own.
_QUICK = ("arithmetic",)


def grade(groups: Sequence[Group], decode: Callable[[list[int]], str], judges: Judges | None = None) -> list[Group]:
    """The groups with every sample's verdict, and its text as it was judged. `decode` turns response ids into text,
    special tokens left out.

    The verdict is LOST for an answer on which the verifier fails, gives a reward that is not finite, or takes too long,
    or whose worker ends; a warning names some. Without `judges`, workers are started for this call and stopped after
    it. Raises RewardError for a verifier that cannot be started.
    """
    samples = [sample for group in groups for sample in group.samples]
    answers = [ResponseTask(s.prompt, decode(s.response_ids.tolist())) for s in samples]
    positions = defaultdict(list)
    for position, sample in enumerate(samples):
        positions[sample.prompt.verifier].append(position)
    verdicts: dict[int, Verdict] = {}
    with ExitStack() as stack:
        judges = judges or stack.enter_context(Judges())
        for verifier, places in positions.items():
            mine = [answers[p] for p in places]
            results = _judge_here(verifier, mine) if verifier in _QUICK else judges.judge(verifier, mine)
            verdicts.update(zip(places, _settle(verifier, [samples[p] for p in places], mine, results), strict=True))
    judged = (
        dataclasses.replace(sample, verdict=verdicts[p], response=answers[p].response)
        for p, sample in enumerate(samples)
    )
    return [dataclasses.replace(group, samples=tuple(next(judged) for _ in group.samples)) for group in groups]


def _judge_here(name: str, answers: Sequence[ResponseTask]) -> list[Verdict | Failure]:
    verifier = get_verifier(name)
    return [call_verifier(verifier, answer.prompt, answer.response) for answer in answers]


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
