"""save_rollouts.py DIR [ID]: two steps of 4 groups of 4 random responses; with ID the first holds that token."""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.store import write_groups

rng = np.random.default_rng(3)


def group(step: int, index: int, first: list[int]) -> Group:
    prompt = Prompt(f"p{step}-{index}", "", tuple(rng.integers(2, 45, 5).tolist()), "", "arithmetic")
    samples = []
    for number in range(4):
        ids = [*first, *rng.integers(2, 45, int(rng.integers(4, 20))).tolist(), 1]
        logprobs = (-rng.uniform(2, 5, len(ids))).tolist()
        sample = Sample.start(prompt, number).extend(ids, logprobs, weight_version=step - 1)
        right = bool(rng.random() < 0.5)
        samples.append(dataclasses.replace(sample, finish_reason="stop", verdict=Verdict(float(right), right)))
    return Group(index, prompt, tuple(samples))


for step in (1, 2):
    groups = [
        group(step, index, [int(i) for i in sys.argv[2:]] if step == index + 1 == 1 else []) for index in range(4)
    ]
    write_groups(Path(sys.argv[1]) / f"rollouts/step-{step:06d}-dp-0000.jsonl", groups, weight_version=step - 1)
