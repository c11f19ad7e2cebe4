"""A stranger's path: docs/your-own.md from top to bottom, in an empty directory, with no line that the page lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import yaml
from doc_blocks import Block, read_blocks
from paths import ROOT

from megatron_rl.lab.run import read_metrics
from megatron_rl.rollout.server import free_ports

PAGE = ROOT / "docs" / "your-own.md"
LIMIT = 400
"""Seconds for one block."""

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.distributed, pytest.mark.timeout(1500)]


def environment(directory: Path) -> dict[str, str]:
    """What an activated environment has: commands on PATH. torchrun's port is its own, for tests run side by side."""
    (directory / "bin").mkdir()
    command = directory / "bin" / "megatron-rl"
    command.write_text(f"#!{sys.executable}\nfrom megatron_rl.cli import main\nmain()\n")
    command.chmod(0o755)
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    path = f"{directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    port = str(free_ports(1)[0])
    return {**ours, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": port}


def follow(block: Block, directory: Path, variables: dict[str, str]) -> str:
    """Saves a file, or runs the commands as a shell does; returns what they print."""
    if block.title:
        (directory / block.title).write_text(block.text)
    if block.language != "bash":
        return ""
    script = f"set -o pipefail\n{block.text}"
    done = subprocess.run(
        ["bash", "-e", "-c", script] if "wait $!" not in script else ["bash", "-c", script],
        cwd=directory,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    stops = "wait $!" in script  # the run's own status: torchrun has 1 if its ranks have 75
    assert done.returncode == (1 if stops else 0), f"{block.place}: status {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The directory after the whole page, and what each block of commands printed, by its first line."""
    directory = tmp_path_factory.mktemp("stranger")
    variables = environment(directory)
    return directory, {
        block.text.partition("\n")[0]: follow(block, directory, variables)
        for block in read_blocks(PAGE)
        if block.title or block.language == "bash"
    }


def test_the_run_trains_on_own_model_data_reward_and_loss(printed: tuple[Path, dict[str, str]]) -> None:
    directory, _ = printed
    run = directory / "runs" / "mine"
    lines = read_metrics(run / "metrics.jsonl")
    assert [(line["step"], line["mini_batch"]) for line in lines] == [(s, m) for s in (1, 2, 3) for m in (0, 1)]
    assert any(line["grad_norm"] > 0 for line in lines)  # not where all rewards of a group are equal
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["verifier"] == "my_rewards:judge"
    assert config["objective"]["custom"] == "my_losses:with_praise"
    rewards = {
        sample["verdict"][0]
        for file in (run / "rollouts").rglob("*.jsonl")
        for line in file.read_bytes().splitlines()[1:]
        for sample in json.loads(line[: line.rindex(b"}") + 1])["samples"]
    }
    assert rewards <= {0.0, 0.1, 1.0}
    assert len(rewards) > 1
    assert (run / "model" / "config.json").is_file()


def test_the_run_and_its_tokens_can_be_looked_at(printed: tuple[Path, dict[str, str]]) -> None:
    directory, output = printed
    assert (directory / "runs" / "mine" / "report" / "report.html").is_file()
    assert (directory / "runs" / "mine" / "report" / "step-000003.html").is_file()
    table = output["python one_response.py"]
    assert "rollout_logprob" in table
    assert len(table.splitlines()) > 3


def test_the_stopped_run_goes_on(printed: tuple[Path, dict[str, str]]) -> None:
    """It goes on with half its learning rate."""
    directory, output = printed
    run = directory / "runs" / "stopped"
    assert "the run stops at the end of this step" in "".join(output.values())
    lines = read_metrics(run / "metrics.jsonl")
    assert (lines[0]["lr"], lines[-1]["lr"]) == (1e-3, 5e-4)
    steps = [line["step"] for line in lines]
    assert steps == [step for step in range(1, steps[-1] + 1) for _ in (0, 1)]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == steps[-1]


def test_the_study_compares_two_arms_with_two_seeds(printed: tuple[Path, dict[str, str]]) -> None:
    directory, _ = printed
    study = directory / "runs" / "study"
    results = [orjson.loads(line) for line in (study / "results.jsonl").read_bytes().splitlines()]
    assert sorted((each["arm"], each["seed"], each["status"]) for each in results) == [
        (arm, seed, "done") for arm in ("mine", "preset") for seed in (0, 1)
    ]
    assert orjson.loads((study / "verdict.json").read_bytes())["verdict"] in (
        "undecided",
        "underpowered",
        "refuted",
        "confirmed",
    )
    assert (study / "report" / "report.html").is_file()
