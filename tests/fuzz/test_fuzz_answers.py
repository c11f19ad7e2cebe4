"""Randomly damaged answers of a server: a RolloutError, or the same content as an independent reader finds."""

from __future__ import annotations

from typing import Any

import pytest
from fuzzing import FEW, MANY
from hypothesis import given
from spoilt_answers import GOOD, LONGEST, PROMPT, SPEC, VERSIONS, VOCAB, as_read, read_strictly, spoilt

from megatron_rl.rollout.answers import RolloutError, read_completion


def check_decoder(found: Any) -> None:
    wanted = read_strictly(found)
    try:
        completion = read_completion(
            found,
            where="here",
            prompt_tokens=len(PROMPT),
            max_new_tokens=LONGEST,
            vocab_size=VOCAB,
            versions=VERSIONS,
            routes=SPEC,
        )
    except RolloutError as error:
        refusal = str(error)
    else:
        assert as_read(completion) == wanted
        return
    assert wanted is None, f"refused: {refusal}"
    assert len(refusal) < 600


@FEW
@given(spoilt())
def test_a_damaged_answer_is_refused_or_read_correctly(found: Any) -> None:
    check_decoder(found)


@pytest.mark.slow
@MANY
@given(spoilt())
def test_many_damaged_answers_are_refused_or_read_correctly(found: Any) -> None:
    check_decoder(found)


def test_good_answers_are_accepted() -> None:
    """Otherwise a decoder that refuses everything would pass."""
    for found in GOOD:
        assert read_strictly(found) is not None
        check_decoder(found)
