"""Writes the table of large models in docs/scale.md from their plans.

python tools/write_plans.py
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.config.schema import Config
from megatron_rl.gpus import GPUS
from megatron_rl.planner.candidates import DEGREES, Proposal, proposals
from megatron_rl.planner.forecast import read_job
from megatron_rl.planner.memory import GIB, Job, largest_rank
from megatron_rl.planner.roofline import step_time

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
PUBLISHED = ROOT / "tests" / "families" / "published"
GPU, MEMORY = "h100", 80
RUN = """\
presets: [grpo]
run_dir: runs/plan
model: {path: MODEL}
data: {train: prompts.jsonl, max_prompt_tokens: 1024}
rollout: {prompts_per_step: 128, group_size: 16, max_response_tokens: 7168}
engine: {device: cuda, layers: te, recompute: full, max_tokens_per_micro_batch: 8192}
train: {steps: 100}
"""
LAYOUTS = {
    ("Qwen--Qwen3-30B-A3B", 8): "tp=2, ep=8",
    ("Qwen--Qwen3-30B-A3B", 16): "tp=2, ep=8",
    ("Qwen--Qwen3-235B-A22B", 64): "tp=4, pp=2, ep=32",
    ("Qwen--Qwen3-235B-A22B", 128): "tp=4, pp=2, ep=32",
    ("deepseek-ai--DeepSeek-V3", 256): "tp=8, pp=8, ep=32",
    ("deepseek-ai--DeepSeek-V3", 512): "tp=8, pp=8, ep=32",
}
"""The layout of each published model on a number of GPUs."""
HEAD = (
    "| model | GPUs | layout | GiB | s a step | fastest that fits | GiB | s a step |",
    "|---|---|---|---|---|---|---|---|",
)


def write_table() -> str:
    return "\n".join((*HEAD, *_rows())) + "\n"


def _rows() -> Iterator[str]:
    for (name, gpus), layout in LAYOUTS.items():
        job = plan_job(name, gpus, layout)
        fastest = proposals(job, GPUS[GPU], MEMORY * GIB)[0]
        cells = (
            name.split("--")[1],
            gpus,
            layout,
            f"{largest_rank(job).total / GIB:.1f}",
            f"{step_time(job, GPUS[GPU]).total:.0f}",
            _describe(fastest),
            f"{fastest.memory.total / GIB:.1f}",
            f"{fastest.time.total:.0f}",
        )
        yield f"| {' | '.join(map(str, cells))} |"


def plan_job(name: str, gpus: int, layout: str) -> Job:
    with tempfile.TemporaryDirectory() as scratch:
        model, path = Path(scratch) / "model", Path(scratch) / "run.yaml"
        model.mkdir()
        shutil.copy(PUBLISHED / f"{name}.json", model / "config.json")
        path.write_text(RUN)
        degrees = [f"parallel.{degree}" for degree in layout.split(", ")]
        return read_job(Config, path, [f"model.path={model}", *degrees], gpus)


def _describe(proposal: Proposal) -> str:
    degrees = [f"{key}={getattr(proposal.job.layout, key)}" for key in DEGREES]
    return ", ".join([*degrees, f"recompute={proposal.job.config.engine.recompute}"])


def write_page(page: str) -> str:
    """Returns the page with its table written anew."""
    before, table = page.split(HEAD[0], 1)
    after = table.split("\n\n", 1)[1]
    return f"{before}{write_table()}\n{after}"


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text()))
