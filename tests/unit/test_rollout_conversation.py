"""Conversations with made answers of a server: what a turn adds to a sample, and where a sample ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from tiny_models import make_tokenizer

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.sample import FinishReason, Prompt, Sample, Verdict
from megatron_rl.data.top_tokens import TopTokens
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.environments.dialogue import PlainDialogue
from megatron_rl.environments.env import Message, Opening
from megatron_rl.environments.episodes import Environments
from megatron_rl.rollout.answers import Completion
from megatron_rl.rollout.turns import MultiTurn, append_completion, converse

TOKENIZER = make_tokenizer()
PROMPT = Prompt("p", "guess", (), "7", "arithmetic")


def completion(text: str, reason: FinishReason = "stop", version: int = 0) -> Completion:
    ids = [*TOKENIZER.encode(text), *([TOKENIZER.eos_token_id] if reason == "stop" else [])]
    return Completion(tuple(ids), (-1.0,) * len(ids), reason, (VersionSpan(version, 0, len(ids)),), text)


def play(
    answers: Sequence[Completion],
    *,
    dialogue: PlainDialogue | None = None,
    max_turns: int = 8,
    max_tokens: int = 99,
) -> tuple[Sample, list[tuple[str, int, int]]]:
    """Returns the sample, and (history, most tokens, number) of each turn."""
    asked = []

    async def ask(sample: Sample, most: int, turn: int) -> Sample:
        asked.append((TOKENIZER.decode(sample.token_ids.tolist()), most, turn))
        return append_completion(sample, answers[turn])

    with Environments("guessing", RewardConfig()) as environments:
        turns = MultiTurn(environments, dialogue or PlainDialogue(TOKENIZER), max_turns, 9)
        return asyncio.run(converse(turns, PROMPT, 3, max_tokens, ask)), asked


def test_each_turn_is_asked_for_with_all_that_came_before() -> None:
    sample, asked = play([completion("3"), completion("9"), completion("7")])
    assert [(most, turn) for _, most, turn in asked] == [(99, 0), (96, 1), (93, 2)]
    assert [history for history, _, _ in asked] == ["guess", "guess3<eos><pad>", "guess3<eos><pad>9<eos><pad>"]
    assert (sample.index, sample.turns, sample.finish_reason) == (3, 3, "stop")
    assert sample.verdict == Verdict(1.0, True)


def test_an_answer_that_fills_the_limit_ends_the_sample() -> None:
    """One token of the environment would leave none to the policy."""
    for most, turns in ((3, 1), (4, 2)):
        sample, asked = play([completion("3"), completion("9", "length")], max_tokens=most)
        assert (sample.turns, sample.finish_reason) == (turns, "length")
        assert sample.loss_mask[-1]
        assert [most for _, most, _ in asked] == [most, 1][:turns]


def test_a_message_that_nothing_can_be_appended_to_ends_the_sample() -> None:
    class Closed(PlainDialogue):
        def answer(
            self, history: list[int], completion: list[int], messages: list[Message], opening: Opening
        ) -> list[int] | None:
            return None

    sample, _ = play([completion("3")], dialogue=Closed(TOKENIZER))
    assert (sample.turns, sample.finish_reason, sample.verdict) == (1, "stop", Verdict(0.0, False))


def trace(rows: int, expert: int, *versions: int) -> RoutingTrace:
    """All rows go to the expert; the first version has all rows but one for each of the others."""
    first = rows - len(versions) + 1
    starts = [0, *range(first, rows)]
    spans = [VersionSpan(v, s, e) for v, s, e in zip(versions, starts, [*starts[1:], rows], strict=True)]
    ids = np.full((rows, 1, 1), expert)
    return RoutingTrace.from_ids(ids, layers=(0,), num_experts=4, source="rollout", versions=spans)


def answer(tokens: int, version: int, found: RoutingTrace, top: int) -> Completion:
    likely = TopTokens(np.full((tokens, 1), top, np.int32), np.full((tokens, 1), -1.0, np.float32))
    spans = (VersionSpan(version, 0, tokens),)
    return Completion((5,) * tokens, (-1.0,) * tokens, "stop", spans, "", trace=found, top_tokens=likely)


def test_a_turn_keeps_the_routes_and_versions_of_the_turns_before() -> None:
    """The second turn's answer reports other routes for the first turn's tokens, as another server would."""
    start = Sample.start(Prompt("p", "", (1, 2), "", ""), 0)
    sample = append_completion(start, answer(3, 4, trace(4, 1, 4), top=5))
    sample = append_completion(sample.extend([8, 8], None, 4), answer(2, 6, trace(8, 2, 5, 6), top=7))
    assert sample.trace is not None
    assert sample.trace.experts[:, 0, 0].tolist() == [1] * 4 + [2] * 4
    assert sample.trace.versions == (VersionSpan(4, 0, 4), VersionSpan(5, 4, 7), VersionSpan(6, 7, 8))
    assert sample.versions == (VersionSpan(4, 2, 5), VersionSpan(4, 5, 7), VersionSpan(6, 7, 9))
    assert sample.top_tokens is not None
    assert sample.top_tokens.ids[:, 0].tolist() == [5, 5, 5, 0, 0, 7, 7]
    assert np.isneginf(sample.top_tokens.logprobs[:, 0]).tolist() == [False] * 3 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("start", [0, 2, 3, 5])
def test_the_tail_of_a_trace_has_its_rows_and_their_versions(start: int) -> None:
    whole = trace(5, 1, 4, 5, 6)
    tail = whole.tail(start)
    assert tail.rows == 5 - start
    by_row = [v.version for v in whole.versions for _ in range(v.start, v.end)]
    assert [v.version for v in tail.versions for _ in range(v.start, v.end)] == by_row[start:]
