"""Measures how good the plans of data/schedule.py are on lognormal lengths, and how long planning takes.

    python benchmarks/schedule_quality.py [--seeds 3] [--times]

Each line is one number of samples a replica, one number of replicas and one sigma. Its columns are token budgets of a
micro-batch, as multiples of the longest sample or of the mean. `count` is the number of micro-batches over its lower
bound. `tokens` and `cost` are the excess of the fullest replica over the mean. All are the worst of the seeds. `least`
is a lower bound of the excess of tokens: it is above 0 if the longest samples allow no even division.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import numpy as np
import typer

from megatron_rl.data.bin_packing import fewest_bins
from megatron_rl.data.replica_balance import least_fullest
from megatron_rl.data.schedule import SampleSize, StepPlan, plan

MEDIAN = 1000
BUDGETS = [(times, of) for of in ("longest", "mean") for times in (1, 2, 8, 32)]


@dataclass(frozen=True)
class Quality:
    count: float  # micro-batches of a replica over the fewest possible, at least 1
    tokens: float  # excess of the fullest replica's tokens over the mean
    cost: float  # excess of the costliest replica's cost over the mean


def lognormal(samples: int, sigma: float, seed: int) -> list[SampleSize]:
    rng = random.Random(seed)
    lengths = [max(2, round(MEDIAN * rng.lognormvariate(0, sigma))) for _ in range(samples)]
    return [SampleSize(i, i // 4, n, n - 1) for i, n in enumerate(lengths)]


def judge(sizes: Sequence[SampleSize], step: StepPlan, max_tokens: int) -> Quality:
    dp = len(step.micro_batches)
    here = [[sizes[i] for part in replica for i in part] for replica in step.micro_batches]
    tokens = [sum(s.tokens for s in replica) for replica in here]
    costs = [sum(s.cost for s in replica) for replica in here]
    bound = -(-fewest_bins([min(s.tokens, max_tokens) for s in sizes], max_tokens) // dp)
    return Quality(
        len(step.micro_batches[0]) / bound, max(tokens) * dp / sum(tokens) - 1, max(costs) * dp / sum(costs) - 1
    )


def main(
    seeds: Annotated[int, typer.Option(help="Batches for each setting.")] = 3,
    times: Annotated[bool, typer.Option(help="Only time the planning of 8k and 64k samples.")] = False,
) -> None:
    if times:
        return show_times()
    print("samples dp sigma | least | " + " | ".join(f"{times}x {of}: count tokens cost" for times, of in BUDGETS))
    found: dict[tuple[int, ...], list[Quality]] = defaultdict(list)
    for samples, dp, sigma in product((4, 8, 16, 64), (1, 2, 8, 64), (0.5, 1.0, 1.5)):
        cells, least = [], 0.0
        for times_longer, of in BUDGETS:
            worst: list[Quality] = []
            for seed in range(seeds):
                sizes = lognormal(samples * dp, sigma, seed)
                lengths = [s.tokens for s in sizes]
                unit = max(lengths) if of == "longest" else -(-sum(lengths) // len(lengths))
                step = plan(sizes, mini_batches=1, dp=dp, max_tokens=times_longer * unit).steps[0]
                worst.append(judge(sizes, step, times_longer * unit))
                least = max(least, least_fullest(np.array(lengths), dp) * dp / sum(lengths) - 1)
            found[(samples, dp)] += worst
            count, tokens, cost = (max(getattr(q, key) for q in worst) for key in ("count", "tokens", "cost"))
            cells.append(f"{count:.2f} {tokens:6.1%} {cost:6.1%}")
        print(f"{samples:2} {dp:2} {sigma} | {least:6.1%} | " + " | ".join(cells), flush=True)
    for (samples, dp), each in found.items():
        over = sum(q.count > 1.1 for q in each) / len(each)
        print(
            f"{samples} samples on each of {dp}: {over:.1%} of the plans have over 1.1 x the bound of micro-batches; "
            f"worst {max(q.count for q in each):.2f}"
        )


def show_times() -> None:
    for samples, dp, times_mean in product((8192, 65536), (1, 8, 64), (1, 2, 8, 32)):
        sizes = lognormal(samples, 1.0, 0)
        mean = sum(s.tokens for s in sizes) // samples
        start = time.perf_counter()
        step = plan(
            sizes, mini_batches=1, dp=dp, max_tokens=times_mean * mean, home=[s.group % dp for s in sizes]
        ).steps[0]
        seconds = time.perf_counter() - start
        quality = judge(sizes, step, times_mean * mean) if samples < 10000 else None
        print(f"{samples} samples, dp {dp}, budget {times_mean} x mean: {seconds:.2f} s {quality or ''}", flush=True)


if __name__ == "__main__":
    typer.run(main)
