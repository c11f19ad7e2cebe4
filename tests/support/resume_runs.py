"""Stopped and resumed runs of `sft`, and their comparison with an uninterrupted run."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import orjson
import torch
from forks import Forks, Run
from rl_runs import weights

from megatron_rl.data.sample import Group
from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics

STEPS = 5
SFT = ("-m", "megatron_rl", "sft")
TRAIN = ("-m", "megatron_rl", "train")
MADE_UP = [("patches:made_up_rollouts",)]


def copy(setting: Path, run_dir: Path, *, until: int = STEPS) -> Path:
    """Copies the whole run, without checkpoints after step `until`: as if it had been killed after a later step."""
    shutil.copytree(setting / "whole", run_dir)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > until:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run_dir / "model")
    return run_dir


def resume(forks: Forks, setting: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> Run:
    return sft(forks, setting, run_dir, *overrides, "--resume", ranks=ranks)


def sft(forks: Forks, setting: Path, run_dir: Path, *words: str, ranks: int = 1) -> Run:
    return forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", *words, ranks=ranks)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
    }


def assert_refused(run: Run, *texts: str) -> None:
    assert run.status == [2], run.stderr
    assert "Traceback" not in run.stderr
    error = run.stderr[run.stderr.index("error: ") :]
    for text in texts:
        assert text in error


def figures(run_dir: Path) -> list[dict[str, float]]:
    """Returns all logged metrics without times."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("time", "memory", "throughput"))} for line in lines]


def assert_like_whole(setting: Path, run_dir: Path) -> None:
    expected = weights(setting / "whole")
    found = weights(run_dir)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    assert figures(run_dir) == figures(setting / "whole")


def assert_exported(forks: Forks, run_dir: Path, out: Path, *options: str, model: str = "model") -> None:
    """Checks that an export of the newest checkpoint equals the model that the run wrote at its end, file by file."""
    done = forks.run("-m", "megatron_rl", "export", run_dir, out, *options)
    assert done.status == [0], done.stderr
    assert contents(out) == contents(run_dir / model)


def wait_for_line(forks: Forks, run: Run, run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists():
        assert forks.poll(run), run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(forks: Forks, run: Run, said: str) -> None:
    deadline = time.monotonic() + 60
    while said not in run.stdout:
        assert forks.poll(run), run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_steps(run_dir: Path) -> list[int]:
    return [
        orjson.loads(file.read_bytes())["state"]["step"]
        for file in sorted((run_dir / "checkpoints").glob("*/manifest.json"))
    ]


def read_rollouts(run_dir: Path, step: int) -> list[Group]:
    """Returns the groups of a step, of all leaders, in the order of their numbers."""
    files = (run_dir / "rollouts").glob(f"step-{step:06d}-dp-*.jsonl")
    return sorted((group for file in files for group in read_groups(file)), key=lambda group: group.index)
