"""Training tokens/s of the engine against transformers and a bare Megatron-Core schedule, side by side in one run.

    python benchmarks/train_throughput.py [--model DIR] [--repeats 7]

Three things are timed in turn, again and again, on the same tokens in one process: transformers' forward and backward
pass (padded to the longest); Megatron-Core's schedule over the same packed batch with a loss that is a plain sum; and
the policy's whole RL gradient (GSPO's loss, its metrics and those of the routers). Machines are noisy, so what counts
is the median of the ratios of neighbouring runs, which is what is printed.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, EngineConfig, RoutingConfig
from megatron_rl.cores import usable_cores
from megatron_rl.data.packing import PackedBatch, pack
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.schedule import Denominators
from megatron_rl.engine.device import use_device

if TYPE_CHECKING:  # Megatron-Core is imported once the device is ready for it
    from megatron_rl.engine.policy import Policy
    from megatron_rl.routing.modes import MiniBatchRouting

SEQUENCES, PROMPT_TOKENS = 64, 18


def make_samples(vocab_size: int) -> list[Sample]:
    """About what the demo trains on: 18 prompt tokens, 49 to 65 response tokens."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(SEQUENCES):
        ids = tuple(rng.integers(0, vocab_size, PROMPT_TOKENS).tolist())
        response = rng.integers(0, vocab_size, rng.integers(49, 66)).tolist()
        prompt = Prompt(str(number), "", ids, "", "")
        samples.append(Sample.start(prompt, 0).extend(response, [-1.0] * len(response), 0))
    return samples


def transformers_step(model_dir: Path, samples: list[Sample]) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    longest = max(len(s.token_ids) for s in samples)
    ids, mask = torch.zeros(2, len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.token_ids)] = torch.as_tensor(sample.token_ids)
        mask[row, : len(sample.token_ids)] = 1

    def step() -> None:
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        (-(chosen * mask[:, 1:]).sum() / mask.sum()).backward()

    return step


def engine_steps(model_dir: Path, samples: list[Sample]) -> tuple[Callable[[], None], Callable[[], None]]:
    """(bare Megatron-Core schedule, RL gradient)."""
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29533")
    device = use_device("cpu")
    from megatron_rl.engine.distribute import MiniBatch, Outcome
    from megatron_rl.engine.packed_losses import PolicyLoss
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups

    layout = Layout.resolve(*parse_layout("tp=1"))
    place = start_process_groups(layout, device, seed=0)
    policy = Policy(model_dir, layout, place, EngineConfig(dtype="fp32"), device, optim=None)
    packed: PackedBatch = pack(samples, [1.0, -1.0] * (SEQUENCES // 2))
    denominators = Denominators(sum(s.response_tokens for s in samples), SEQUENCES)
    outcomes = tuple(Outcome(i, i // 2, 0.0) for i in range(SEQUENCES))
    mini_batch = MiniBatch(0, (packed,), (outcomes,), denominators)
    config = load_config(Config, Path(__file__).parent.parent / "examples" / "demo" / "gspo.yaml")
    routing = make_routing(policy, packed)
    old = [logprobs for logprobs, _ in policy.logprobs([packed], routing=routing.old_pass())]

    def bare() -> None:
        policy.gradients([packed], lambda _, logprobs, __: -logprobs.sum() / packed.tokens)

    def rl() -> None:
        policy.gradients([packed], PolicyLoss(config.objective, mini_batch, old, device), routing.update_pass())

    return bare, rl


def make_routing(policy: Policy, packed: PackedBatch) -> MiniBatchRouting:
    from megatron_rl.routing.drift import RoutingStats
    from megatron_rl.routing.exchange import valid_rows
    from megatron_rl.routing.modes import MiniBatchRouting

    arch = policy.arch
    stats = RoutingStats(arch.moe_layers, arch.num_experts, arch.experts_per_token, policy.device)
    valid = [valid_rows(packed, policy.layout, policy.place, policy.device)]
    return MiniBatchRouting(RoutingConfig(), policy.routers, None, valid, stats)


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory; else the demo's architecture")] = None,
    repeats: Annotated[int, typer.Option()] = 7,
) -> None:
    import torch

    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            from tools.make_demo_model import make_demo_model

            model = Path(scratch) / "model"
            make_demo_model(model)
        samples = make_samples(16)
        reference = transformers_step(model, samples)
        bare, rl = engine_steps(model, samples)
        names = ("transformers", "bare schedule", "RL gradient")
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats + 1):
            for name, step in zip(names, (reference, bare, rl), strict=True):
                start = time.perf_counter()
                step()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    tokens = sum(len(s.token_ids) for s in samples)
    for name in names:
        print(f"{name:14} {tokens / statistics.median(seconds[name]):8.0f} tokens/s")

    def ratio(a: str, b: str) -> float:
        return statistics.median(y / x for x, y in zip(seconds[a], seconds[b], strict=True))

    print(f"bare schedule / transformers: {ratio('bare schedule', 'transformers'):.2f}  (tokens/s; goal: at least 0.9)")
    print(f"RL gradient / transformers:   {ratio('RL gradient', 'transformers'):.2f}")
    print(f"RL gradient / bare schedule:  {ratio('RL gradient', 'bare schedule'):.2f}  (goal: at least 0.91)")


if __name__ == "__main__":
    typer.run(main)
