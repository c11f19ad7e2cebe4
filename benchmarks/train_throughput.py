"""Training tokens/s of the engine against transformers and a bare Megatron-Core schedule, side by side in one run.

    PYTHONPATH=. python benchmarks/train_throughput.py [--model DIR | --size 1b] [--device cuda --dtype bf16]
        [--layers torch] [--repeats 7]

Timed in turn, again and again, on the same tokens in one process: transformers' forward and backward pass (padded to
the longest); Megatron-Core's schedule over the same packed batch with a loss that is a plain sum; the policy's whole RL
gradient (GSPO's loss, its metrics and those of the routers), with live routing and under R2; its pass of log-probs; and
an update, which is the RL gradient and the optimizer's step. Machines are noisy, so what counts is the median of the
ratios of neighbouring runs, which is what is printed. On two shared cores its standard error is .03 after 25 repeats.

The share of the hardware's arithmetic is of what one large matrix product reaches in the same process. It counts 6
operations for each active weight and token, and causal attention at its exact lengths.

Memory is the most that torch's allocator has given out in an update, beside what `megatron-rl plan` says of it. Only
the plan's constant for a GPU's context is left out.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, Device, EngineConfig, EngineDtype, OptimConfig, RoutingConfig
from megatron_rl.cores import usable_cores
from megatron_rl.data.packing import PackedBatch, pack
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.schedule import Denominators
from megatron_rl.demo.first_run import CONFIGS
from megatron_rl.engine.device import use_device
from megatron_rl.models.weights_io import torch_dtype
from megatron_rl.planner.forecast import read_job
from megatron_rl.planner.memory import GIB, largest_rank

if TYPE_CHECKING:
    import torch

    from megatron_rl.engine.policy import Policy
    from megatron_rl.routing.modes import MiniBatchRouting

Steps = dict[str, Callable[[], Any]]
Size = Literal["demo", "100m", "1b"]
Layers = Literal["auto", "te", "torch"]
GSPO = CONFIGS / "gspo.yaml"
PROMPT_TOKENS = 18

SIZES: dict[str, dict[str, int]] = {
    "100m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 192,
        "vocab_size": 16384,
    },
    "1b": {
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 384,
        "vocab_size": 32768,
    },
}
"""Random models, apart from the demo's; experts' widths and number in about Qwen3-30B-A3B's proportions."""


def make_model(directory: Path, size: Size, dtype: EngineDtype, device: torch.device) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    if size == "demo":
        from megatron_rl.demo.demo_model import make_demo_model

        return make_demo_model(directory)
    fields: dict[str, Any] = {
        **SIZES[size],
        "intermediate_size": 2 * SIZES[size]["hidden_size"],
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields))
    model.to(torch_dtype(dtype)).save_pretrained(directory)


def make_samples(vocab_size: int, sequences: int, response_tokens: int) -> list[Sample]:
    """Responses of 3/4 to all of `response_tokens`, at random."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(sequences):
        ids = tuple(rng.integers(0, vocab_size, PROMPT_TOKENS).tolist())
        response = rng.integers(0, vocab_size, rng.integers(response_tokens * 3 // 4, response_tokens + 1)).tolist()
        prompt = Prompt(str(number), "", ids, "", "")
        samples.append(Sample.start(prompt, 0).extend(response, [-1.0] * len(response), 0))
    return samples


def transformers_step(
    model_dir: Path, samples: list[Sample], dtype: EngineDtype, device: torch.device, rows: int
) -> Callable[[], None]:
    """`rows` sequences at a time, as many as are in a micro-batch of the engine."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch_dtype(dtype)).to(device)
    longest = max(len(s.token_ids) for s in samples)
    ids, mask = torch.zeros(2, len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.token_ids)] = torch.as_tensor(sample.token_ids)
        mask[row, : len(sample.token_ids)] = 1
    ids, mask = ids.to(device), mask.to(device)
    total = mask.sum()

    def step() -> None:
        model.zero_grad()
        for first in range(0, len(samples), rows):
            here, present = ids[first : first + rows], mask[first : first + rows]
            logits = model(input_ids=here, attention_mask=present).logits[:, :-1].float()
            chosen = logits.log_softmax(-1).gather(2, here[:, 1:, None]).squeeze(2)
            (-(chosen * present[:, 1:]).sum() / total).backward()

    return step


def engine_steps(policy: Policy, samples: list[Sample], rows: int) -> Steps:
    from megatron_rl.engine.distribute import MiniBatch, Outcome
    from megatron_rl.engine.packed_losses import PolicyLoss

    parts = [samples[first : first + rows] for first in range(0, len(samples), rows)]
    packed: list[PackedBatch] = [pack(part, [1.0, -1.0] * (rows // 2)) for part in parts]
    tokens = sum(batch.tokens for batch in packed)
    denominators = Denominators(sum(s.response_tokens for s in samples), len(samples))
    outcomes = tuple(tuple(Outcome(i, i // 2, 0.0) for i in range(len(part))) for part in parts)
    mini_batch = MiniBatch(0, tuple(packed), outcomes, denominators)
    config = load_config(Config, GSPO)
    routing = {replay: make_routing(policy, packed, replay) for replay in ("none", "r2")}
    old = {
        replay: [logprobs for logprobs, _ in policy.logprobs(packed, routing=each.old_pass())]
        for replay, each in routing.items()
    }

    def loss(replay: str) -> PolicyLoss:
        return PolicyLoss(config.objective, mini_batch, old[replay], policy.device, weight_version=0)

    return {
        "bare schedule": lambda: policy.gradients(packed, lambda _, logprobs, __: -logprobs.sum() / tokens),
        "RL gradient": lambda: policy.gradients(packed, loss("none"), routing["none"].update_pass()),
        "RL gradient, R2": lambda: policy.gradients(packed, loss("r2"), routing["r2"].update_pass()),
        "log-probs": lambda: policy.logprobs(packed),
        "update": lambda: policy.update(packed, loss("none"), routing["none"].update_pass()),
    }


def make_policy(model_dir: Path, engine: EngineConfig, device: torch.device) -> Policy:
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29533")
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups

    layout = Layout.resolve(*parse_layout("tp=1"))
    place = start_process_groups(layout, device, seed=0)
    return Policy(model_dir, layout, place, engine, device, optim=OptimConfig(lr=1e-9))


def make_routing(policy: Policy, packed: list[PackedBatch], replay: str) -> MiniBatchRouting:
    from megatron_rl.routing.drift import RoutingStats
    from megatron_rl.routing.exchange import valid_rows
    from megatron_rl.routing.modes import MiniBatchRouting

    arch = policy.arch
    stats = RoutingStats(
        arch.moe_layers, arch.num_experts, arch.experts_per_token, policy.device, micro_batches=len(packed)
    )
    valid = [valid_rows(batch, policy.layout, policy.place, policy.device) for batch in packed]
    config = RoutingConfig(replay=replay)  # type: ignore[arg-type]
    return MiniBatchRouting(config, policy.routers, None, valid, stats)


def operations(policy: Policy, samples: list[Sample]) -> float:
    """Floating-point operations of a forward and a backward pass."""
    arch = policy.arch
    active = sum(
        p.numel() * (arch.experts_per_token / arch.num_experts if ".experts." in name else 1)
        for name, p in policy.models[0].named_parameters()
        if not name.startswith("embedding.")
    )
    lengths = [len(s.token_ids) for s in samples]
    attention = 6 * arch.num_layers * arch.num_heads * arch.head_dim * sum(n * n for n in lengths)
    return 6 * active * sum(lengths) + attention


def matrix_product_rate(dtype: EngineDtype, device: torch.device) -> float:
    """Operations a second of a large matrix product."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(torch_dtype(dtype)) for _ in "ab")
    seconds = timed({"product": lambda: a @ b}, 10)["product"]
    return float(2 * size**3 / statistics.median(seconds))


def timed(steps: Steps, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, in turn; the first round warms up."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_bytes(step: Callable[[], Any], policy: Policy) -> int:
    """Bytes that a step has allocated at most, with what was there before (on a CPU: weights, gradients, optimizer)."""
    import torch

    from benchmarks.allocations import allocated_peak
    from megatron_rl.planner.pretended import count_network

    if policy.device.type == "cpu":
        return count_network(policy, OptimConfig()).total + allocated_peak(step)
    torch.cuda.reset_peak_memory_stats()
    step()
    return int(torch.cuda.max_memory_allocated())


def planned_bytes(policy: Policy, samples: list[Sample], rows: int, response_tokens: int) -> int:
    """What `megatron-rl plan` says of an update in these micro-batches, without its constant for a GPU's context."""
    tokens = max(sum(len(s.token_ids) for s in samples[i : i + rows]) for i in range(0, len(samples), rows))
    layers = "te" if policy.layers.fused_kernels else "torch"
    engine = policy.engine.model_copy(update={"max_tokens_per_micro_batch": tokens, "layers": layers})
    overrides = [
        f"model.path={policy.model_dir}",
        f"engine={engine.model_dump_json()}",
        f"data.max_prompt_tokens={PROMPT_TOKENS}",
        f"rollout.max_response_tokens={response_tokens}",
        f"rollout.prompts_per_step={len(samples) // 2}",
        "rollout.group_size=2",
        "train.mini_batches=1",
    ]
    memory = largest_rank(read_job(Config, GSPO, overrides, gpus=1))
    passing = max(memory.activations + max(memory.layer, memory.logits), memory.step)
    return memory.static - memory.reserve + passing


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory; default: a random one of --size")] = None,
    size: Annotated[Size, typer.Option()] = "demo",
    device: Annotated[Device, typer.Option()] = "cpu",
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    recompute: Annotated[str, typer.Option(help="as engine.recompute")] = "none",
    layers: Annotated[Layers, typer.Option(help="as engine.layers")] = "auto",
    sequences: Annotated[int, typer.Option(help="in a step")] = 64,
    rows: Annotated[int, typer.Option(help="sequences in a micro-batch, an even number")] = 64,
    response_tokens: Annotated[int, typer.Option(help="at most")] = 65,
    repeats: Annotated[int, typer.Option()] = 7,
) -> None:
    if sequences % rows or rows % 2:
        raise typer.BadParameter(f"--sequences {sequences}, --rows {rows}: rows must be even and divide the sequences")
    used = use_device(device)
    import torch

    torch.set_num_threads(usable_cores())
    engine = EngineConfig(device=device, dtype=dtype, recompute=recompute, layers=layers)
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            model = Path(scratch) / "model"
            make_model(model, size, dtype, used)
        policy = make_policy(model, engine, used)
        samples = make_samples(policy.arch.vocab_size, sequences, response_tokens)
        steps = engine_steps(policy, samples, rows)
        steps["update"]()  # makes the optimizer's moments
        planned = planned_bytes(policy, samples, rows, response_tokens)
        found = {name: peak_bytes(step, policy) for name, step in steps.items()}
        steps = {"transformers": transformers_step(model, samples, dtype, used, rows)} | steps
    seconds = timed(steps, repeats)
    tokens, work = sum(len(s.token_ids) for s in samples), operations(policy, samples)
    print(
        f"{policy.parameters() / 1e6:.0f}M parameters, {dtype} on {used}, layers {type(policy.layers).__name__}, "
        f"recompute {recompute}, {tokens} tokens in {sequences // rows} micro-batches"
    )
    rate = matrix_product_rate(dtype, used)
    print(f"matrix product: {rate / 1e12:.1f} TFLOP/s")
    for name, took in seconds.items():
        share = work / statistics.median(took) / rate / (3 if name == "log-probs" else 1)
        print(f"{name:16} {tokens / statistics.median(took):9.0f} tokens/s, {share:.1%} of the matrix product's rate")
    print("GiB at most, without transformers' model:", ", ".join(f"{k} {v / GIB:.2f}" for k, v in found.items()))
    measured = found["update"]
    print(f"memory of an update: {measured / GIB:.3f} GiB, planned {planned / GIB:.3f}: ratio {measured / planned:.2f}")

    def ratio(a: str, b: str) -> float:
        return statistics.median(y / x for x, y in zip(seconds[a], seconds[b], strict=True))

    print(
        f"bare schedule / transformers: {ratio('bare schedule', 'transformers'):.2f}  (tokens/s; goal: at least 1.18)"
    )
    print(f"RL gradient / transformers:   {ratio('RL gradient', 'transformers'):.2f}")
    print(f"RL gradient / bare schedule:  {ratio('RL gradient', 'bare schedule'):.2f}  (goal: at least 0.97)")
    print(f"R2 / live RL gradient:        {ratio('RL gradient, R2', 'RL gradient'):.2f}")


if __name__ == "__main__":
    typer.run(main)
