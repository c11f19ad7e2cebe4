"""A control for the demo: rewards by the toss of a coin, while accuracy is still judged by the answer.

    torchrun --nproc-per-node 2 -m megatron_rl train megatron_rl/demo/gspo.yaml \\
        data.verifier=megatron_rl.demo.coin:toss run_dir=.demo/runs/coin train.steps=30 optim.decay_steps=120

If accuracy rose here too, the demo's gain would not be the reward's.
"""

from __future__ import annotations

import zlib

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.arithmetic import verify_arithmetic


def toss(prompt: Prompt, response: str) -> Verdict:
    """The same response to the same prompt has the same toss, so that a replay of saved rollouts repeats the run."""
    heads = zlib.crc32(f"{prompt.id} {response}".encode()) & 1
    return Verdict(float(heads), verify_arithmetic(prompt, response).correct)
