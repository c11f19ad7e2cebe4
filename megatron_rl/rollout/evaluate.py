"""Computes avg@k and pass@k of a held-out evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rl.data.sample import Group


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    n is `samples` and c is `correct` [2107.03374, equation 1].
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} of {samples} samples")
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def evaluation(groups: Sequence[Group]) -> dict[str, float]:
    """avg_at_k, pass_at_j for powers of two up to k, lengths and truncation, from judged groups of k samples each.

    A sample whose verdict was lost counts as wrong, so that k is the same for all; `lost_verdicts` counts these.
    """
    samples = [sample for group in groups for sample in group.samples]
    verdicts = [sample.verdict for sample in samples if sample.verdict]
    correct = [sum(s.verdict.correct for s in group.samples if s.verdict) for group in groups]
    k = len(groups[0].samples)
    lengths = np.array([s.response_tokens for s in samples])
    report = {
        "prompts": float(len(groups)),
        "k": float(k),
        "avg_at_k": sum(correct) / len(samples),
        "reward": float(np.mean([verdict.reward for verdict in verdicts if not verdict.lost] or [0.0])),
        "lost_verdicts": float(sum(verdict.lost for verdict in verdicts)),
        "truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
        "response_length/mean": float(lengths.mean()),
        "response_length/p99": float(np.quantile(lengths, 0.99)),
        "response_length/max": float(lengths.max()),
    }
    for j in (2**power for power in range(k.bit_length())):
        report[f"pass_at_{j}"] = float(np.mean([pass_at_k(k, c, j) for c in correct]))
    return report
