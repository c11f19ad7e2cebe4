"""pass@k against a count of all draws, and the metrics of an evaluation."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_rl.data.sample import FinishReason, Group, Prompt, Sample, Verdict
from megatron_rl.rollout.evaluate import evaluation, pass_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_fraction_of_draws_with_a_right_answer(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(range(samples), k))
            share = sum(any(i < correct for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(10_000, 0, 5_000) == 0.0


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_more_draws_than_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} of 4 samples"):
        pass_at_k(4, 2, k)


def judged(number: int, correct: bool, tokens: int, finish_reason: FinishReason) -> Sample:
    sample = Sample.start(Prompt("p", "", (1, 2), "", "arithmetic"), number)
    sample = sample.extend([3] * tokens, [-1.0] * tokens, 0)
    return dataclasses.replace(sample, verdict=Verdict(2.0 * correct, correct), finish_reason=finish_reason)


def test_evaluation_metrics_by_hand() -> None:
    prompt = Prompt("p", "", (1, 2), "", "arithmetic")
    right = [judged(n, True, 10, "stop") for n in range(4)]
    half = [judged(n, n == 3, 20, "length" if n else "stop") for n in range(4)]
    report = evaluation([Group(0, prompt, tuple(right)), Group(1, prompt, tuple(half))])
    assert report["prompts"] == 2
    assert report["k"] == 4
    assert report["avg_at_k"] == 5 / 8
    assert report["reward"] == 10 / 8
    assert report["truncated"] == 3 / 8
    assert report["response_length/mean"] == 15
    assert report["response_length/max"] == 20
    assert [report[f"pass_at_{j}"] for j in (1, 2, 4)] == pytest.approx([5 / 8, 3 / 4, 1.0])
