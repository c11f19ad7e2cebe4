"""Small RL runs on saved rollouts, without a server: what several test files start from."""

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
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.lab.run import read_metrics

STEPS, PROMPTS, GROUP, MINI_BATCHES = 2, 8, 4, 4


def save_rollouts(
    model: Path,
    run_dir: Path,
    *,
    steps: int = STEPS,
    prompts: int = PROMPTS,
    group: int = GROUP,
    shuffled: bool = False,
    traces: bool = False,
) -> None:
    """Random responses with the model's own log-probs, as a server at the initial weights would have given. `traces`:
    with the model's own routes too, a fifth of the rows drawn anew, as if from an engine that rounds otherwise."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rng = np.random.default_rng(1)
    for step in range(1, steps + 1):
        groups = [_group(reference, rng, index, group, traces) for index in range(prompts)]
        if shuffled:
            groups = groups[::-1]
        write_groups(run_dir / "rollouts" / f"step-{step:06d}-dp-0000.jsonl", groups, weight_version=step - 1)


def _group(reference: torch.nn.Module, rng: np.random.Generator, index: int, size: int, traces: bool) -> Group:
    ids = tuple(rng.integers(2, VOCAB_SIZE, rng.integers(3, 9)).tolist())
    prompt = Prompt(f"prompt {index}", "", ids, "", "arithmetic")
    samples = []
    for number in range(size):
        response = [*rng.integers(2, VOCAB_SIZE, rng.integers(4, 24)).tolist(), EOS]
        with torch.no_grad():
            logits = reference(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1).tolist()
        sample = Sample.start(prompt, number).extend(response, [min(p, 0.0) for p in logprobs], 0)
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


def write_config(path: Path, model: Path, rollouts: Path, preset: str = "gspo") -> Path:
    # A large eps: Adam divides by the gradient's own size, so with a small one the rounding of a gradient that is all
    # but zero decides the direction of a whole step, and layouts part after a few.
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
train: {{steps: {STEPS}, mini_batches: {MINI_BATCHES}}}
"""
    )
    return path


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """As torchrun does, but on the loopback interface alone."""
    return [sys.executable, "-m", "megatron_rl.ranks.launch", str(ranks), *arguments]


def environment() -> dict[str, str]:
    """For ranks that import these tests' modules, and the package of the tree that the tests are in."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"}


def run_all(forks: Forks, config: Path, ranks: int, runs: list[str]) -> None:
    """Does `runs`, each a list of overrides in one string, one after another in a world of `ranks`."""
    forks.world(ranks, "train_worker:main", config, runs)


def losses(run_dir: Path) -> np.ndarray:
    """[steps * mini-batches, metrics]."""
    names = ("loss", "grad_norm", "entropy/mean", "ratio/mean", "ratio/p99", "ratio/min", "clip/low/active/sequence")
    lines = read_metrics(run_dir / "metrics.jsonl")
    return np.array([[line[name] for name in names] for line in lines])


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")
