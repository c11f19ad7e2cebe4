"""Trains the demo's model by GRPO with TRL and with this project, in turn, in one run: steps a minute, and accuracy.

    PYTHONPATH=. python benchmarks/versus_trl.py [--steps 40] [--block 4] [--ours rollout.lag=1] [--ours ...]

Both start from the demo's cold start (`megatron-rl demo --cold-start`), and train on the same prompts in
the same order, with the same verifier, loss, sizes, learning rates and optimizer steps. Each makes `block` steps while
the other one's processes are stopped. The first step of each is not counted. Machines are noisy, so what counts is the
median of the ratios of neighbouring blocks. Accuracy is measured on both trained models by one function.

TRL runs in an environment of its own, .venv-trl, which the first run makes (benchmarks/versus/requirements.txt), and
samples by transformers' generate, its fastest way on a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar
from versus.side import Side

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.cores import threads_per_process, usable_cores
from megatron_rl.data.arithmetic_task import ArithmeticTask, prompt_text
from megatron_rl.data.prompts import PromptCursor, take_indexes
from megatron_rl.data.sample import Prompt
from megatron_rl.demo.first_run import CONFIGS
from megatron_rl.rewards.arithmetic import verify_arithmetic

ROOT = Path(__file__).parent.parent
HERE = ROOT / "benchmarks" / "versus"
RECIPE = CONFIGS / "grpo.yaml"
HELD_OUT_SAMPLES = 2


def main(
    steps: Annotated[int, typer.Option(min=3, help="steps of each, the first of which is not counted")] = 40,
    block: Annotated[int, typer.Option(help="steps in turn")] = 4,
    model: Annotated[Path, typer.Option(help="the demo's cold start")] = Path(".demo/cold-start"),
    work: Annotated[Path, typer.Option(help="directory for both runs, replaced")] = Path(".demo/versus-trl"),
    trl_python: Annotated[Path | None, typer.Option(help="Python of an environment with TRL; default: made")] = None,
    experts: Annotated[str, typer.Option(help="transformers' experts_implementation")] = "grouped_mm",
    threads: Annotated[int | None, typer.Option(help="TRL's threads; default: all cores")] = None,
    ranks: Annotated[int, typer.Option(help="our trainer's ranks")] = 2,
    our_threads: Annotated[int | None, typer.Option(help="a rank's threads; default: its share of the cores")] = None,
    ours: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for our configuration")] = None,
) -> None:
    if not (model / "config.json").is_file():
        raise typer.BadParameter(f"{model}: no model; make it by `megatron-rl demo --cold-start`")
    work = work.absolute()  # the trainers start in the repository's root
    shutil.rmtree(work, ignore_errors=True)
    directories = {name: work / name for name in ("trl", "ours")}
    own = [
        f"model.path={model.absolute()}",
        f"run_dir={directories['ours'] / 'run'}",
        f"train.steps={steps}",
        f"optim.decay_steps={4 * steps}",
        "data.heldout=null",
        *(ours or []),
    ]
    config = load_config(Config, RECIPE, own)
    job = work / "trl.json"
    work.mkdir(parents=True)
    job.write_text(
        json.dumps(
            {
                "model": str(model.absolute()),
                "directory": str(directories["trl"]),
                "trained": str(directories["trl"] / "model"),
                "prompts": training_prompts(config),
                "threads": threads or usable_cores(),
                "experts": experts,
                "settings": trl_settings(config),
            }
        )
    )
    trl_command = [str(trl_python or make_environment()), str(HERE / "trl_grpo.py"), str(job)]
    launcher = [sys.executable, "-m", "megatron_rl.ranks.launch", str(ranks)]
    our_command = [*launcher, str(HERE / "ours.py"), str(directories["ours"]), str(RECIPE), *own]
    sides = [
        Side("TRL", trl_command, directories["trl"], threads or usable_cores()),
        Side("ours", our_command, directories["ours"], our_threads or threads_per_process(ranks)),
    ]
    print(f"load average before: {os.getloadavg()[0]:.1f} on {usable_cores()} cores", flush=True)
    try:
        train_in_turn(sides, steps, block)
    finally:
        for side in sides:
            side.kill()
    show(sides)
    trained = {"before": model, "TRL": directories["trl"] / "model", "ours": directories["ours"] / "run" / "model"}
    for name, path in trained.items():
        print(f"held-out accuracy, {name}: {held_out_accuracy(path, config):.3f}", flush=True)


def train_in_turn(sides: Sequence[Side], steps: int, block: int) -> None:
    for side in sides:
        side.start()
        print(f"{side.name}: started, and its first step made, in {side.step_to(1):.0f} s", flush=True)
    while sides[0].steps < steps:
        to = min(steps, sides[0].steps + block)
        for side in sides:
            side.block(to)
        last = ", ".join(f"{side.name} {side.block_seconds[-1]:.2f}" for side in sides)
        print(f"step {to}: seconds a step: {last}; load average {os.getloadavg()[0]:.1f}", flush=True)
    for side in sides:
        side.finish()


def show(sides: Sequence[Side]) -> None:
    for side in sides:
        seconds, cores = statistics.median(side.block_seconds), statistics.median(side.block_core_seconds)
        phases = ", ".join(f"{name} {spent:.2f}" for name, spent in side.phases().items())
        print(f"{side.name}: {60 / seconds:.1f} steps a minute; {seconds:.2f} s a step: {phases}; {cores:.2f} core-s")
    trl, ours = sides
    print(f"ours / TRL in steps a minute: {ratios(trl.block_seconds, ours.block_seconds)}; goal 1.3")
    print(f"TRL / ours in core-seconds:   {ratios(trl.block_core_seconds, ours.block_core_seconds)}", flush=True)


def ratios(first: Sequence[float], second: Sequence[float]) -> str:
    found = sorted(one / other for one, other in zip(first, second, strict=True))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"


def training_prompts(config: Config) -> list[dict[str, str]]:
    """The prompts of a run's steps, in its order, with their answers."""
    problems = ArithmeticTask.parse(config.data.train).problems()
    count = config.train.steps * config.rollout.prompts_per_step
    indexes, _ = take_indexes(len(problems), PromptCursor(config.seed), count)
    return [{"prompt": prompt_text(problems[i]), "answer": str(sum(problems[i]))} for i in indexes]


def trl_settings(config: Config) -> dict[str, object]:
    """What GRPOConfig is to have, from our configuration."""
    mini_batches, optim, clip = config.train.mini_batches, config.optim, config.objective.clip
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    return {
        "per_device_train_batch_size": responses // mini_batches,
        "steps_per_generation": mini_batches,
        "gradient_accumulation_steps": 1,
        "num_generations": config.rollout.group_size,
        "max_completion_length": config.rollout.max_response_tokens,
        "max_steps": config.train.steps * mini_batches,
        "temperature": config.rollout.temperature,
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon": clip.low,  # type: ignore[union-attr]
        "epsilon_high": clip.high,  # type: ignore[union-attr]
        "scale_rewards": "group",
        "learning_rate": optim.lr,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": optim.min_lr},
        "warmup_steps": optim.warmup_steps,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.clip_grad,
        "seed": config.seed,
    }


def make_environment() -> Path:
    python = ROOT / ".venv-trl" / "bin" / "python"
    done = ROOT / ".venv-trl" / ".installed"
    if not done.exists():
        print("making .venv-trl: a few minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(python.parent.parent)], check=True)
        install = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([str(python), *install, "-r", str(HERE / "requirements.txt")], check=True)
        done.touch()
    return python


def held_out_accuracy(directory: Path, config: Config) -> float:
    """Accuracy of responses sampled by transformers at temperature 1, two for each held-out prompt of the demo."""
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    torch.manual_seed(0)
    disable_progress_bar()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    policy = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    problems = ArithmeticTask(terms=9, split="heldout", count=256).problems()
    texts = [prompt_text(terms) for terms in problems for _ in range(HELD_OUT_SAMPLES)]
    answers = [str(sum(terms)) for terms in problems for _ in range(HELD_OUT_SAMPLES)]
    inputs = tokenizer(texts, return_tensors="pt")  # all prompts have the same length
    outputs = policy.generate(
        **inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=config.rollout.max_response_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    responses = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    verdicts = [
        verify_arithmetic(Prompt("", "", (), answer, "arithmetic"), response)
        for answer, response in zip(answers, responses, strict=True)
    ]
    return sum(verdict.correct for verdict in verdicts) / len(verdicts)


if __name__ == "__main__":
    typer.run(main)
