"""Samples a conversation: the policy and an environment take turns, and the sample is only appended to.

Tokens of the environment are in no loss. One routing trace covers the sample: a row is that of the pass which sampled
the next token. The last token of a message, and the environment's tokens, are routed by the prefill of the turn after.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from megatron_rl.data.sample import LOST, FinishReason, Prompt, Sample, Verdict
from megatron_rl.environments.dialogue import Dialogue
from megatron_rl.environments.env import EnvError, Opening, Score
from megatron_rl.environments.episodes import Environments, Episode, EpisodeFailure
from megatron_rl.rollout.answers import Completion

logger = logging.getLogger(__name__)

Ask = Callable[[Sample, int, int], Coroutine[Any, Any, Sample]]
"""Has a server continue (the sample, by at most so many tokens, as turn number)."""


@dataclass(frozen=True)
class MultiTurn:
    """Whom the policy talks to."""

    environments: Environments
    dialogue: Dialogue
    max_turns: int
    max_prompt_tokens: int


async def converse(turns: MultiTurn, prompt: Prompt, number: int, max_tokens: int, ask: Ask) -> Sample:
    """Returns a sample of at most `max_tokens` after the opening messages, which are its prompt's token ids. It has a
    verdict unless that is left to the prompt's verifier. Raises EnvError if the conversation cannot be opened."""
    async with turns.environments.episode() as episode:
        prompt, opening = await open_conversation(turns, episode, prompt)
        sample = Sample.start(prompt, number)
        try:
            return await _take_turns(turns, episode, opening, sample, max_tokens, ask)
        except _Lost as lost:
            where = f"prompt {prompt.id!r} sample {number}"
            logger.warning("environment %r: %s: left out: %s", turns.environments.name, where, lost.why)
            return _ended(lost.sample, "stop", LOST)


async def open_conversation(turns: MultiTurn, episode: Episode, prompt: Prompt) -> tuple[Prompt, Opening]:
    """Returns the prompt with the ids of the opening messages. Raises EnvError."""
    where = f"environment {turns.environments.name!r}: prompt {prompt.id!r}"
    try:
        opening = await episode.reset(prompt)
    except EpisodeFailure as failure:
        raise EnvError(f"{where}: reset failed: {failure}") from None
    try:
        ids = turns.dialogue.open(opening)
    except Exception as error:  # a template may raise anything
        raise EnvError(f"{where}: its opening messages cannot be rendered: {error!r:.300}") from None
    if not 0 < len(ids) <= turns.max_prompt_tokens:
        raise EnvError(
            f"{where}: its opening messages have {len(ids)} tokens, expected 1 to data.max_prompt_tokens = "
            f"{turns.max_prompt_tokens}"
        )
    return dataclasses.replace(prompt, token_ids=tuple(ids)), opening


class _Lost(Exception):
    """The environment failed after `sample` was sampled."""

    def __init__(self, sample: Sample, why: object) -> None:
        super().__init__(why)
        self.sample = sample
        self.why = why


async def _take_turns(
    turns: MultiTurn, episode: Episode, opening: Opening, sample: Sample, max_tokens: int, ask: Ask
) -> Sample:
    score = Score()
    for turn in range(turns.max_turns):
        history = sample.token_ids.tolist()
        sample = await ask(sample, max_tokens - len(sample.response_ids), turn)
        if sample.finish_reason == "length":
            break
        said = sample.token_ids[len(history) :].tolist()
        try:
            step = await episode.step(turns.dialogue.read(history, said, opening))
        except EpisodeFailure as failure:
            raise _Lost(sample, failure) from None
        score = score.after(step)
        if step.done:
            return _ended(sample, "stop", score.of_whole())
        if (answer := turns.dialogue.answer(history, said, step.messages, opening)) is None:
            return _ended(sample, "stop", score.of_part())
        if turn + 1 == turns.max_turns or len(sample.response_ids) + len(answer) >= max_tokens:
            break
        sample = sample.extend(answer, None, sample.versions[-1].version)
    return _ended(sample, "length", score.of_part())


def _ended(sample: Sample, reason: FinishReason, verdict: Verdict | None) -> Sample:
    return dataclasses.replace(sample, finish_reason=reason, verdict=verdict)


def append_completion(sample: Sample, completion: Completion) -> Sample:
    """The sample with what a server sampled after its tokens: a span for each weight version, and the routes and mu's
    most likely tokens if the answer has them. What the sample has of both stays; the answer adds the rows after it."""
    before = len(sample.response_ids)
    for span in completion.versions:
        sample = sample.extend(
            list(completion.token_ids[span.start : span.end]),
            list(completion.logprobs[span.start : span.end]),
            span.version,
        )
    if (trace := completion.trace) is not None:
        had = sample.trace
        sample = sample.with_trace(trace if had is None else had.append(trace.tail(had.rows)))
    if (top := completion.top_tokens) is not None:
        tops = sample.top_tokens
        missing = before - (0 if tops is None else len(tops))
        top = top.after_missing(missing)
        sample = sample.with_top_tokens(top if tops is None else tops.append(top))
    return dataclasses.replace(sample, finish_reason=completion.finish_reason)
