"""Plans of published models on a layout, for several test files. Without torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from config_files import write
from published_models import PUBLISHED

from megatron_rl.config.layout import parse_layout
from megatron_rl.config.schema import Config
from megatron_rl.planner.forecast import read_job
from megatron_rl.planner.memory import Job

RUN = """\
run_dir: runs/one
model: {path: model}
data: {train: prompts.jsonl}
rollout: {prompts_per_step: 128, group_size: 16, max_response_tokens: 7168}
engine: {device: cuda, layers: te, recompute: full}
objective: {kl: {kind: k3, beta: 0.001}}
train: {steps: 3}
"""


def job(tmp_path: Path, name: str, text: str, *overrides: str) -> Job:
    (tmp_path / "model").mkdir(exist_ok=True)
    shutil.copy(PUBLISHED / f"{name}.json", tmp_path / "model" / "config.json")
    degrees, world = parse_layout(text)
    given = [f"parallel.{key}={value}" for key, value in degrees.model_dump(exclude_none=True).items() if value != 1]
    path = write(tmp_path / "run.yaml", RUN)
    return read_job(Config, path, [f"model.path={tmp_path / 'model'}", *given, *overrides], world)
