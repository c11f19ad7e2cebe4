"""transformers' Qwen3-MoE with chosen experts forced on its routers, and saved rollouts that such a model samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import EOS, VOCAB_SIZE
from transformers import AutoModelForCausalLM

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.store import write_groups
from megatron_rl.data.top_tokens import TopTokens
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan

Choose = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of the MoE layer, probabilities [n, experts]) -> experts [n, K]."""
Chosen = list[torch.Tensor]
"""[n, K] for each MoE layer."""


def load(path: Path, dtype: torch.dtype = torch.float64) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager")
    model.get_input_embeddings().padding_idx = None
    return model


def moe_layers(model: Any) -> list[int]:
    return [number for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


def force(model: Any, choose: Choose | None = None, rounds_gates: bool = False) -> Chosen:
    """Makes `choose` decide (None: the top K); returns a list that each forward pass fills with its choices.

    `rounds_gates` makes gate weights from logits in bf16.
    """
    chosen: Chosen = []
    top_k = model.config.num_experts_per_tok
    for column, layer in enumerate(moe_layers(model)):
        router = model.model.layers[layer].mlp.gate

        def forward(hidden: torch.Tensor, router: Any = router, column: int = column) -> Any:
            logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
            probabilities = logits.softmax(-1)
            live = probabilities.topk(top_k, dim=-1).indices
            ids = live if choose is None else choose(column, probabilities)
            if column == 0:
                chosen.clear()
            chosen.append(ids)
            scores = (logits.bfloat16().float().softmax(-1) if rounds_gates else probabilities).gather(1, ids)
            return logits, scores / scores.sum(-1, keepdim=True), ids

        router.forward = forward
    return chosen


def response_logprobs(model: Any, token_ids: np.ndarray, prompt: int) -> torch.Tensor:
    """Returns the log-probs [|y|] of the tokens after the first `prompt` ones."""
    ids = torch.as_tensor(token_ids.astype(np.int64))
    return response_distributions(model, token_ids, prompt).gather(1, ids[prompt:, None])[:, 0]


def response_distributions(model: Any, token_ids: np.ndarray, prompt: int) -> torch.Tensor:
    """Returns the log-probs [|y|, V] of all tokens where those after the first `prompt` ones are sampled."""
    ids = torch.as_tensor(token_ids.astype(np.int64))
    logits: torch.Tensor = model(ids[None]).logits[0, prompt - 1 : -1]
    return logits.log_softmax(-1)


def save_sampled(
    model: Any,
    run_dir: Path,
    *,
    prompts: int = 4,
    group: int = 4,
    choose: Choose | None = None,
    rounds_gates: bool = False,
    top_k: int = 0,
) -> None:
    """Saves random responses of step 1 with the model's log-probs, routes and most likely tokens, as if it were the
    rollout engine."""
    chosen = force(model, choose, rounds_gates)
    rng = np.random.default_rng(11)
    groups = []
    for index in range(prompts):
        ids = tuple(rng.integers(2, VOCAB_SIZE, rng.integers(3, 9)).tolist())
        prompt = Prompt(f"prompt {index}", "", ids, "", "arithmetic")
        samples = []
        for number in range(group):
            response = [*rng.integers(2, VOCAB_SIZE, rng.integers(8, 24)).tolist(), EOS]
            with torch.no_grad():
                mu = response_distributions(model, np.array([*ids, *response]), len(ids)).clamp(max=0)
            logprobs = mu.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
            routes = torch.stack(chosen, dim=1).numpy()[:-1]
            trace = RoutingTrace.from_ids(
                routes,
                layers=moe_layers(model),
                num_experts=model.config.num_experts,
                source="rollout",
                versions=(VersionSpan(0, 0, len(routes)),),
            )
            correct = (index + number) % 2 == 0  # every group has both
            sample = Sample.start(prompt, number).extend(response, logprobs, 0).with_trace(trace)
            if top_k:
                likely = mu.topk(top_k)
                sample = sample.with_top_tokens(TopTokens(likely.indices.int().numpy(), likely.values.numpy()))
            samples.append(replace(sample, finish_reason="stop", verdict=Verdict(float(correct), correct)))
        groups.append(Group(index, prompt, tuple(samples)))
    write_groups(run_dir / "rollouts" / "step-000001-dp-0000.jsonl", groups, weight_version=0)


def perturb(source: Path, target: Path, seed: int, size: float) -> Path:
    """Writes the model with noise of `size` standard deviations added to every weight."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(target)
    from tiny_models import make_tokenizer

    make_tokenizer().save_pretrained(target)
    return target
