"""Small RL runs on saved rollouts, without a server, for several test files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forks import Forks
from paths import ROOT, SUPPORT
from safetensors.torch import load_file
from tiny_models import EOS, VOCAB_SIZE
from transformers import AutoModelForCausalLM

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.store import write_groups
from megatron_rl.data.top_tokens import TopTokens
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.lab.run import read_metrics

STEPS, PROMPTS, GROUP, MINI_BATCHES = 2, 4, 4, 4


def save_rollouts(
    model: Path,
    run_dir: Path,
    *,
    steps: int = STEPS,
    prompts: int = PROMPTS,
    group: int = GROUP,
    shuffled: bool = False,
    traces: bool = False,
    top_k: int = 0,
) -> None:
    """Saves random responses with the model's log-probs, as if sampled by a server with the initial weights.

    `top_k` also saves the most likely tokens of a sampler that differs a little from the model.
    `traces` also saves the model's routes. A fifth of their rows are random, as if from an engine with other rounding.
    """
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rng = np.random.default_rng(1)
    for step in range(1, steps + 1):
        groups = [_group(reference, rng, index, group, traces, top_k) for index in range(prompts)]
        if shuffled:
            groups = groups[::-1]
        write_groups(run_dir / "rollouts" / f"step-{step:06d}-dp-0000.jsonl", groups, weight_version=step - 1)


def _group(
    reference: torch.nn.Module, rng: np.random.Generator, index: int, size: int, traces: bool, top_k: int
) -> Group:
    ids = tuple(rng.integers(2, VOCAB_SIZE, rng.integers(3, 9)).tolist())
    prompt = Prompt(f"prompt {index}", "", ids, "", "arithmetic")
    samples = []
    for number in range(size):
        response = [*rng.integers(2, VOCAB_SIZE, rng.integers(4, 24)).tolist(), EOS]
        with torch.no_grad():
            logits = reference(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1]
        if top_k:
            logits = logits + 0.5 * torch.tensor(rng.normal(size=logits.shape), dtype=logits.dtype)
        mu = logits.log_softmax(-1)
        logprobs = mu.gather(1, torch.tensor(response)[:, None]).squeeze(1).tolist()
        sample = Sample.start(prompt, number).extend(response, [min(p, 0.0) for p in logprobs], 0)
        if top_k:
            likely = mu.topk(top_k)
            top = TopTokens(likely.indices.numpy().astype(np.int32), likely.values.clamp(max=0).numpy())
            sample = sample.with_top_tokens(top)
        if traces:
            sample = sample.with_trace(_drifted_trace(reference, [*ids, *response], rng))
        correct = bool(rng.random() < 0.5)
        samples.append(_judged(sample, correct))
    return Group(index, prompt, tuple(samples))


def _drifted_trace(reference: Any, token_ids: list[int], rng: np.random.Generator) -> RoutingTrace:
    routers = {n: m for n, m in enumerate(layer.mlp for layer in reference.model.layers) if hasattr(m, "gate")}
    chosen: list[torch.Tensor] = []
    hooks = [m.gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for m in routers.values()]
    with torch.no_grad():
        reference(torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    ids = torch.stack(chosen, dim=1).numpy()[:-1].astype(np.int64)
    experts = reference.config.num_experts
    drawn = rng.permuted(np.tile(np.arange(experts), (*ids.shape[:2], 1)), axis=-1)[..., : ids.shape[2]]
    ids = np.where(rng.random(ids.shape[:2])[..., None] < 0.2, drawn, ids)
    rows = (VersionSpan(0, 0, len(ids)),)
    return RoutingTrace.from_ids(ids, layers=tuple(routers), num_experts=experts, source="rollout", versions=rows)


def _judged(sample: Sample, correct: bool) -> Sample:
    import dataclasses

    return dataclasses.replace(sample, finish_reason="stop", verdict=Verdict(float(correct), correct))


def write_config(path: Path, model: Path, rollouts: Path, preset: str = "gspo", steps: int = STEPS) -> Path:
    # A large eps: Adam divides by the size of the gradient. With a small eps, the rounding of a gradient near zero
    # would decide the direction of a step, and layouts would differ after a few steps.
    path.write_text(
        f"""
presets: [{preset}]
run_dir: {path.parent / "unset"}
model: {{path: {model}}}
engine: {{device: cpu, dtype: fp32, max_tokens_per_micro_batch: 96, logit_chunk_tokens: 20}}
optim: {{lr: 1.0e-3, eps: 1.0e-4, clip_grad: 0.5}}
data: {{train: unused, max_prompt_tokens: 16}}
rollout:
  prompts_per_step: {PROMPTS}
  group_size: {GROUP}
  max_response_tokens: 32
  replay_from: {rollouts}
objective: {{clip: {{low: 0.05, high: 0.05}}}}
train: {{steps: {steps}, mini_batches: {MINI_BATCHES}}}
"""
    )
    return path


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """Returns a torchrun command that listens only on the loopback interface."""
    return [sys.executable, "-m", "megatron_rl.ranks.launch", str(ranks), *arguments]


def environment() -> dict[str, str]:
    """Returns an environment in which ranks import tests/support and the package of this repository."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}


def run_all(forks: Forks, config: Path, ranks: int, runs: list[str]) -> None:
    """Does `runs` one after another in a world of `ranks`; each is a list of overrides in one string."""
    forks.world(ranks, "train_worker:main", config, runs)


def losses(run_dir: Path) -> np.ndarray:
    """Returns [steps * mini-batches, metrics]."""
    names = ("loss", "grad_norm", "entropy/mean", "ratio/mean", "ratio/p99", "ratio/min", "clip/low/active/sequence")
    lines = read_metrics(run_dir / "metrics.jsonl")
    return np.array([[line[name] for name in names] for line in lines])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def assert_same(run_dir: Path, reference: Path, steps: int = 1) -> None:
    """Checks that two runs have the same losses and end with the same weights."""
    found, expected = losses(run_dir), losses(reference)
    assert len(expected) == steps * MINI_BATCHES
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-5, err_msg=f"loss in {run_dir.name}")
    np.testing.assert_allclose(found[:, 1:], expected[:, 1:], rtol=2e-3, atol=1e-4, err_msg=run_dir.name)
    trained = weights(reference)
    for name, weight in weights(run_dir).items():
        scale = trained[name].abs().max()
        assert (weight - trained[name]).abs().max() <= 1e-4 * scale, f"{name} in {run_dir.name}"
