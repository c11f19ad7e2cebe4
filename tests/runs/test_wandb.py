"""A run that is logged to Weights & Biases too: the real package, offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_files import write
from forks import Forks, Run
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics

pytest.importorskip("wandb")
SFT = """\
run_dir: run
model: {path: model}
engine: {device: cpu, dtype: fp32}
optim: {lr: 1.0e-3}
data: {train: examples.jsonl, max_tokens: 200}
steps: 2
batch_size: 4
checkpoint: {every: 1}
lab: {wandb: {project: tests, group: offline}}
"""


def sft(forks: Forks, directory: Path, *options: str, mode: str = "offline") -> Run:
    environment = {"WANDB_MODE": mode, "HOME": str(directory), "WANDB_API_KEY": ""}
    return forks.run("-m", "megatron_rl", "sft", "sft.yaml", *options, directory=directory, environment=environment)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "model", num_layers=1)
    write(tmp_path / "sft.yaml", SFT)
    write(tmp_path / "examples.jsonl", '{"prompt": "1+1=", "response": "2"}\n' * 4)
    return tmp_path


def records(file: Path) -> Iterator[Any]:
    """Yields the records of a W&B run file, which is a log of LevelDB with protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message, block = file.read_bytes(), 7, b"", 1 << 15
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole message, or its last part
            yield Record.FromString(message)
            message = b""


def axes(directory: Path) -> dict[str, str]:
    """Returns the metric that each pattern of names is plotted over."""
    files = sorted((directory / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    metrics = [record.metric for file in files for record in records(file) if record.HasField("metric")]
    return {metric.glob_name or metric.name: metric.step_metric for metric in metrics if metric.step_metric}


def plotted(directory: Path) -> list[dict[str, Any]]:
    """Returns the plotted lines of all starts of the run, in order."""
    files = sorted((directory / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    found = [record for file in files for record in records(file)]
    ids = {record.run.run_id for record in found if record.HasField("run")}
    assert ids == {json.loads((directory / "run" / "run.json").read_text())["id"]}
    rows = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item} for r in found]
    return [{key: value for key, value in row.items() if key[0] != "_"} for row in rows if row]


def test_a_run_and_its_resume_have_the_same_lines_in_their_files_and_at_wandb(forks: Forks, directory: Path) -> None:
    for options in ((), ("--resume", "steps=3")):
        done = sft(forks, directory, *options)
        assert done.returncode == 0, done.stderr
    lines = read_metrics(directory / "run" / "metrics.jsonl")
    assert len(lines) == 3
    rows = plotted(directory)
    by_optimizer_step, by_rollout_step = (
        [row for row in rows if any(key.startswith("step/") for key in row) is by_step] for by_step in (False, True)
    )
    for number, (line, *both) in enumerate(zip(lines, by_optimizer_step, by_rollout_step, strict=True), start=1):
        assert [(row.pop("optimizer_step"), row.pop("rollout_step")) for row in both] == [(number, line["step"])] * 2
        metrics = {
            key: value for key, value in line.items() if key not in ("step", "mini_batch", "weight_version", "time")
        }
        assert both == [metrics, {f"step/{name}": value for name, value in metrics.items()}]  # one mini-batch a step
    assert axes(directory) == {"*": "optimizer_step", "step/*": "rollout_step", "eval/*": "rollout_step"}
    assert all(metric in lines[0] for metric in ("loss", "grad_norm", "time/update"))


def test_a_missing_key_of_wandb_is_an_error_before_the_run_begins(forks: Forks, directory: Path) -> None:
    done = sft(forks, directory, mode="online")
    assert done.returncode == 2
    assert "error: lab.wandb: No API key configured." in done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert not (directory / "run" / "config.yaml").exists()
