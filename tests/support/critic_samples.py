"""Sequences of unequal length with observations in the middle, the same in every process. Without torch."""

from __future__ import annotations

import numpy as np

from megatron_rl.data.sample import Prompt, Sample

LENGTHS = (5, 17, 9, 24, 3, 12, 20, 11)
VOCABULARY = 40


def samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(2, VOCABULARY, length).tolist()
        sample = Sample.start(Prompt(str(number), "", tuple(ids[:2]), "", ""), 0)
        third = 2 + (length - 2) // 3
        sample = sample.extend(ids[2:third], [-1.0] * (third - 2), 0)
        if third + 2 < length:
            sample = sample.extend(ids[third : third + 2], None, 0)  # tool output
            third += 2
        made.append(sample.extend(ids[third:], [-1.0] * (length - third), 0))
    return made


def weight_of(sample: int) -> float:
    """Returns the weight of a sample's values in the test's loss."""
    return 0.5 + 0.25 * sample
