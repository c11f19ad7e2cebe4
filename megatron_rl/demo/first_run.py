"""The demo: makes a small Qwen3-MoE, fine-tunes its cold start, trains it by RL, and prints the held-out accuracy.

Everything is kept under .demo in the current directory; the cold start is made once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.cores import threads_per_process
from megatron_rl.errors import UserError

CONFIGS = Path(__file__).parent
"""Directory of the demo's configurations: a file for each preset, what they share, and the cold start."""
WORK = Path(".demo")
RANKS = 2


def preset_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in ("base", "sft"))


def _check_preset(name: str) -> str:
    if name not in preset_names():
        raise typer.BadParameter(f"found {name!r}, expected one of {', '.join(preset_names())}")
    return name


def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as train.steps=5")
    ] = None,
    preset: Annotated[str, typer.Option(callback=_check_preset, help="A built-in preset.")] = "gspo",
    cold_start: Annotated[bool, typer.Option("--cold-start", help="Make the cold start, and stop.")] = False,
) -> None:
    """Trains a small mixture of experts to do arithmetic, on two CPU ranks: 8 to 22 minutes. Writes into .demo."""
    if taken := [text for text in overrides or [] if text.partition("=")[0] in ("run_dir", "model.path")]:
        raise UserError(f"override {taken[0]!r}: the demo chooses its own; start `megatron-rl train` for another")
    if not cold_start:
        check(preset, overrides or [])
    make_cold_start()
    if not cold_start:
        train(preset, overrides or [])


def check(preset: str, overrides: list[str]) -> None:
    """Raises UserError for what training would refuse only after the minutes of the cold start."""
    from megatron_rl.ranks.own_device import resolve_device
    from megatron_rl.rollout.server import require_sglang

    config = load_config(Config, CONFIGS / f"{preset}.yaml", overrides)
    if config.rollout.replay_from is None and not config.rollout.servers.are_elsewhere:
        require_sglang(on_cpu=resolve_device(config.engine.device).type == "cpu")


def make_cold_start() -> None:
    """Makes .demo/cold-start unless it is there."""
    model = WORK / "cold-start"
    if model.is_dir():
        print(f"cold start: {model} is there already")
        return
    if not (WORK / "random").is_dir():
        run("-m", "megatron_rl.demo.demo_model", str(WORK / "random"))
    shutil.rmtree(WORK / "runs" / "cold-start", ignore_errors=True)
    on_ranks("sft", str(CONFIGS / "sft.yaml"))
    (WORK / "runs" / "cold-start" / "model").rename(model)


def train(preset: str, overrides: list[str]) -> None:
    """Replaces the run of this preset, and prints its first and its last accuracy."""
    run_dir = WORK / "runs" / preset
    shutil.rmtree(run_dir, ignore_errors=True)
    on_ranks("train", str(CONFIGS / f"{preset}.yaml"), *overrides)

    from megatron_rl.lab.run import read_metrics

    evaluations = read_metrics(run_dir / "eval.jsonl")
    before, after = (e["avg_at_k"] for e in (evaluations[0], evaluations[-1]))
    print(f"held-out accuracy: {before:.2f} -> {after:.2f}")
    print(f"next: megatron-rl report {run_dir}")


def on_ranks(*arguments: str) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads_per_process(RANKS))
    run("-m", "megatron_rl.ranks.launch", str(RANKS), "-m", "megatron_rl", *arguments)


def run(*command: str) -> None:
    """Runs `python COMMAND`. Raises SystemExit with its status if it fails, as it has printed its error."""
    print("+ python", *command, flush=True)
    if status := subprocess.run([sys.executable, *command], check=False).returncode:
        raise SystemExit(status)
