"""Real studies on saved rollouts: they go on after kill -9, refuse changed files, and survive failing runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest
import torch
from forks import Forks, Run
from rl_runs import environment, save_rollouts, write_config
from safetensors.torch import load_file
from study_files import write_study
from tiny_models import make_tiny_model

import megatron_rl
from megatron_rl.lab.run import read_metrics
from megatron_rl.study.conductor import run_study
from megatron_rl.study.study_dir import StudyError

STUDY = ("-m", "megatron_rl", "study")
FORKING = [("study_patches:fork_ranks",)]
METRICS = {
    "kl": {"name": "kl/old_policy/k3", "mini_batches": [1, 2, 3]},
    "norm": {"name": "grad_norm", "reduce": "last"},
}
FAST = {"checkpoint": {"every": 1}}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains a tiny model for two steps on saved rollouts."""
    root = tmp_path_factory.mktemp("study")
    model = make_tiny_model(root / "model", num_layers=1, hidden_size=32, num_experts=4, expert_hidden_size=16)
    save_rollouts(model, root / "saved")
    return write_config(root / "base.yaml", model, root / "saved")


def results(directory: Path) -> dict[str, dict[str, Any]]:
    return {each["run"]: each for each in map(orjson.loads, (directory / "results.jsonl").read_bytes().splitlines())}


def verdict(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads((directory / "verdict.json").read_bytes())
    return found


@pytest.fixture
def runs_of(monkeypatch: pytest.MonkeyPatch, forks: Forks) -> list[int]:
    """Makes studies fork their ranks; lists the ranks of each world."""
    worlds: list[int] = []

    def run_ranks(module: str, arguments: list[str], ranks: int) -> int:
        worlds.append(ranks)
        return forks.run_ranks(module, arguments, ranks)

    monkeypatch.setattr("megatron_rl.ranks.launch.run_ranks", run_ranks)
    return worlds


@pytest.mark.distributed
def test_runs_share_a_world_and_the_rule_reads_their_lines(base: Path, runs_of: list[int], tmp_path: Path) -> None:
    """A failing run ends the first world; a stop rule ends an arm; an arm of two ranks has a world of its own."""
    file = write_study(
        tmp_path / "s.yaml",
        base,
        {
            "low": {"at": {"lr": 1e-4}, "set": {"optim": {"lr": 1e-4}}},
            "bad": {"set": {"objective": {"custom": "faulty_objectives:nothing"}}},
            "high": {"at": {"lr": 1e-2}, "set": {"optim": {"lr": 1e-2}}},
            "again": {"set": {"optim": {"lr": 1e-4}}},
            "two": {"ranks": 2, "set": {"optim": {"lr": 1e-2}}},
        },
        metrics=METRICS,
        stops=[{"kind": "beyond", "name": "kl/old_policy/k3", "above": 0.004}],
        rule={
            "kind": "share",
            "metric": "kl",
            "of": "high",
            "without": "low",
            "confirms": {"min": 0.5},
            "min_seeds": 1,
        },
    )
    run_study(file)
    directory = tmp_path / "s"
    assert runs_of == [1, 1, 2]
    found = results(directory)
    assert {name: each["status"] for name, each in found.items()} == {
        "low-seed-0": "done",
        "bad-seed-0": "failed",
        "high-seed-0": "stopped",
        "again-seed-0": "done",
        "two-seed-0": "stopped",
    }
    assert found["bad-seed-0"]["reason"].startswith("error: objective.custom: 'faulty_objectives:nothing' cannot be")
    assert found["bad-seed-0"]["exit_status"] == 2
    stopped = found["high-seed-0"]
    assert stopped["reason"].startswith("beyond: kl/old_policy/k3 is ")
    assert [found[f"{arm}-seed-0"]["steps"] for arm in ("low", "high", "two")] == [2, 1, 1]
    lines = read_metrics(directory / "runs" / "low-seed-0" / "metrics.jsonl")
    kls = [line["kl/old_policy/k3"] for line in lines if line["mini_batch"] > 0]
    expected = {"kl": sum(kls) / len(kls), "norm": lines[-1]["grad_norm"]}
    assert found["low-seed-0"]["metrics"] == pytest.approx(expected, rel=1e-12)
    # The third run of a process, and two ranks, give what the first run gave.
    assert found["again-seed-0"]["metrics"] == found["low-seed-0"]["metrics"]
    assert found["two-seed-0"]["metrics"] == pytest.approx(stopped["metrics"], rel=1e-3)
    told = verdict(directory)
    assert (told["verdict"], told["done"], told["stopped"], told["failed"]) == ("confirmed", 2, 2, 1)
    share = 1 - found["low-seed-0"]["metrics"]["kl"] / stopped["metrics"]["kl"]
    assert told["numbers"]["by_seed"] == {"0": share}
    for name in found:
        assert not (directory / "runs" / name / "checkpoints").exists() or found[name]["status"] == "failed"
    assert (directory / "runs" / "low-seed-0" / "model").is_dir()
    before = (directory / "results.jsonl").read_bytes()
    run_study(file)  # nothing is left
    assert len(runs_of) == 3
    assert (directory / "results.jsonl").read_bytes() == before


@pytest.mark.distributed
def test_an_arm_starts_from_another_arms_model_with_its_first_routers(
    base: Path, runs_of: list[int], tmp_path: Path
) -> None:
    """Kinds of weights in `graft` are the first model's, all others the trained one's; what is missing is named."""
    still = {"optim": {"lr": 1e-12}, "train": {"steps": 1}}
    file = write_study(
        tmp_path / "s.yaml",
        base,
        {
            "graft": {"ranks": 2, "start": {"from": "train", "graft": ["router"]}, "set": still},
            "same": {"start": {"from": "train"}, "set": still},
            "train": {"set": {"optim": {"lr": 1e-2}}},
        },
        metrics=METRICS,
        keep=["model"],
    )
    run_study(file)
    directory = tmp_path / "s"
    assert {each["status"] for each in results(directory).values()} == {"done"}
    first = load_file(base.parent / "model" / "model.safetensors")
    trained, same, grafted = (
        load_file(directory / "runs" / f"{arm}-seed-0" / "model" / "model.safetensors")
        for arm in ("train", "same", "graft")
    )
    routers = [name for name in first if name.endswith("mlp.gate.weight")]
    assert routers
    for name in first:
        assert (first[name] - trained[name]).abs().max() > 1e-4
        torch.testing.assert_close(same[name], trained[name], rtol=0, atol=1e-9)
        torch.testing.assert_close(grafted[name], first[name] if name in routers else trained[name], rtol=0, atol=1e-9)
    assert not list((directory / "models").iterdir())  # made for a run, and removed with it
    shutil.rmtree(directory / "runs" / "same-seed-0" / "model")
    (directory / "results" / "graft-seed-0.json").unlink()
    shutil.rmtree(directory / "runs" / "graft-seed-0")
    shutil.rmtree(directory / "runs" / "train-seed-0" / "model")
    run_study(file)
    failed = results(directory)["graft-seed-0"]
    assert failed["status"] == "failed"
    assert "train-seed-0/model/config.json does not exist; expected a Hugging Face model" in failed["reason"]


def test_an_alarm_ends_a_run_and_what_needs_its_model_is_left_out(
    base: Path, runs_of: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarm = {"metric": "grad_norm", "above": 0.0, "action": "stop"}
    arms = {
        "alarmed": {"set": {"lab": {"alarms": [alarm]}, "optim": {"lr": 1e-3}}},
        "from-it": {"start": {"from": "alarmed"}},
        "from-that": {"start": {"from": "from-it"}},
        "other": {},
    }
    run_study(write_study(tmp_path / "s.yaml", base, arms, metrics=METRICS))
    found = results(tmp_path / "s")
    assert {name: each["status"] for name, each in found.items()} == {
        "alarmed-seed-0": "stopped",
        "other-seed-0": "done",
    }
    assert "grad_norm" in found["alarmed-seed-0"]["reason"]
    assert found["alarmed-seed-0"]["steps"] == 1
    told = verdict(tmp_path / "s")
    assert (told["left"], told["left_out"]) == (0, 2)
    assert "other processes" not in capsys.readouterr().out
    assert runs_of == [1]


def test_a_study_that_keeps_nothing_keeps_the_models_that_others_need(
    base: Path, runs_of: list[int], tmp_path: Path
) -> None:
    arms = {"train": {}, "again": {"start": {"from": "train"}}}
    run_study(write_study(tmp_path / "s.yaml", base, arms, set={"train": {"steps": 1}}, keep=[]))
    runs = tmp_path / "s" / "runs"
    assert {run: (runs / run / "model").is_dir() for run in results(tmp_path / "s")} == {
        "train-seed-0": True,
        "again-seed-0": False,
    }


def test_a_study_goes_on_after_kill_9(forks: Forks, base: Path, runs_of: list[int], tmp_path: Path) -> None:
    """It is killed in the middle of its second run: first before a checkpoint, then after one."""
    file = write_study(tmp_path / "s.yaml", base, {"a": {}, "b": {}, "c": {}}, set=FAST, metrics=METRICS)
    directory = tmp_path / "s"
    run_dir = directory / "runs" / "b-seed-0"
    kill_when(forks, file, lambda: (run_dir / "metrics.jsonl").exists())
    first = (directory / "results" / "a-seed-0.json").read_bytes()
    assert not (directory / "results" / "b-seed-0.json").exists()
    kill_when(forks, file, lambda: any(run_dir.glob("checkpoints/*[0-9]/manifest.json")))
    assert not (directory / "results" / "b-seed-0.json").exists()
    assert len(list((directory / "abandoned").iterdir())) == 1
    run_study(file)
    assert runs_of == [1]
    found = results(directory)
    assert list(found) == ["a-seed-0", "b-seed-0", "c-seed-0"]
    assert {each["status"] for each in found.values()} == {"done"}
    assert (directory / "results" / "a-seed-0.json").read_bytes() == first
    assert found["b-seed-0"]["metrics"] == found["a-seed-0"]["metrics"] == found["c-seed-0"]["metrics"]
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 8
    assert "engine: ready" in (directory / "logs" / "b-seed-0.log").read_text()
    assert len(list((directory / "abandoned").iterdir())) == 1  # the second time it was resumed


def kill_when(forks: Forks, file: Path, ready: Callable[[], bool]) -> None:
    """Starts the study, kills its conductor once it is `ready`, and waits for the end of its ranks."""
    run = start(forks, file, before=[*FORKING, ("patches:slow_steps", 0.15)])
    deadline = time.monotonic() + 60
    while not ready():
        assert forks.poll(run), run.stdout + run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ranks = psutil.Process(run.pids[0]).children(recursive=True)
    assert ranks
    os.kill(run.pids[0], signal.SIGKILL)
    forks.wait(run)
    gone, alive = psutil.wait_procs(ranks, timeout=10)
    assert gone
    assert not alive


def start(forks: Forks, file: Path, *options: str, before: Sequence[tuple[Any, ...]] = FORKING) -> Run:
    return forks.start(*STUDY, file, *options, before=before)


def test_tasks_of_an_array_run_side_by_side(forks: Forks, base: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s.yaml", base, {"a": {}, "b": {}}, metrics=METRICS, seeds=[3])
    tasks = [start(forks, file, "--task", str(number)) for number in range(2)]
    for number, task in enumerate(tasks):
        assert forks.wait(task).status == [0], task.stdout + task.stderr
        assert f"{'ab'[number]}-seed-3: done" in task.stdout
    assert list(results(tmp_path / "s")) == ["a-seed-3", "b-seed-3"]
    assert verdict(tmp_path / "s")["left"] == 0
    refused = forks.wait(start(forks, file, "--task", "2"))
    assert refused.status == [2]
    assert "--task: found 2, expected a number from 0 to 1" in refused.stderr


@pytest.mark.slow  # real ranks, which import for themselves
def test_a_signal_stops_a_study_after_the_step(base: Path, tmp_path: Path) -> None:
    file = write_study(tmp_path / "s.yaml", base, {"a": {}, "b": {}}, metrics=METRICS)
    run_dir = tmp_path / "s" / "runs" / "a-seed-0"
    command = [sys.executable, *STUDY, str(file)]
    study = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (run_dir / "metrics.jsonl").exists():
        assert study.poll() is None
        time.sleep(0.005)
    study.send_signal(signal.SIGTERM)
    told = study.communicate(timeout=60)[1]
    assert study.returncode == 75, told
    assert "the same command goes on with it" in told
    assert "Traceback" not in told
    assert not (tmp_path / "s" / "results" / "a-seed-0.json").exists()
    assert (run_dir / "checkpoints" / "step-000001").is_dir()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [each["status"] for each in results(tmp_path / "s").values()] == ["done", "done"]
    assert not (tmp_path / "s" / "abandoned").exists()


def test_a_study_refuses_what_has_changed_since_it_began(
    base: Path, runs_of: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "files"
    shutil.copytree(base.parent, root)
    own = root / "base.yaml"
    own.write_text(base.read_text().replace(str(base.parent), str(root)))
    file = write_study(tmp_path / "s.yaml", own, {"a": {"set": {"train": {"steps": 1}}}}, metrics=METRICS)
    run_study(file)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "s").rglob("*")) if path.is_file()}
    package = tmp_path / "package"
    shutil.copytree(Path(megatron_rl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = package / "engine" / "step.py"
    for changed, part in (
        (file, "study file: s.yaml has changed"),
        (own, f"base configuration: {own} has changed"),
        (root / "model" / "model.safetensors", f"model: {root / 'model'}/model.safetensors has changed"),
        (root / "saved/rollouts/step-000001-dp-0000.jsonl", "rollouts: "),
        (source, "megatron_rl: engine/step.py has changed"),
    ):
        content = changed.read_bytes()
        changed.write_bytes(
            content[:-1] + bytes([content[-1] ^ 1]) if changed.suffix != ".yaml" else content + b"# x\n"
        )
        with monkeypatch.context() as patch:
            if changed == source:
                patch.setattr(megatron_rl, "__file__", str(package / "__init__.py"))
            with pytest.raises(StudyError) as refused:
                run_study(file)
        assert part in str(refused.value)
        assert "To go on, restore what the study began with" in str(refused.value)
        assert str(refused.value).count("\n") == 2  # nothing else has changed
        changed.write_bytes(content)
    assert {path: path.read_bytes() for path in sorted((tmp_path / "s").rglob("*")) if path.is_file()} == before
    run_study(file)
    assert runs_of == [1]
