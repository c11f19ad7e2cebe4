"""The script of `launch --slurm` under a real Slurm of two nodes, which are two daemons on this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from forks import Forks
from resume_runs import TRAIN, read_steps
from rl_runs import environment, save_rollouts, weights, write_config
from slurm_cluster import SlurmCluster, missing_programs

from megatron_rl.lab.run import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(missing_programs()), reason=f"Slurm is not installed: no {', '.join(missing_programs())}"),
]
SECONDS = 240.0
ENDS = ("FAILED", "CANCELLED", "COMPLETED", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), environment()).running() as cluster:
        yield cluster


def submit(slurm: SlurmCluster, config: Path, *words: str) -> str:
    """Writes the script beside the configuration and submits it; returns the job's number."""
    launch = [sys.executable, "-m", "megatron_rl", "launch", config.name, *words, "--slurm", "--out", "."]
    told = subprocess.run(launch, cwd=config.parent, env=environment(), capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == ["sbatch", "megatron-rl.sbatch"]
    return slurm.tell("sbatch", "--parsable", "megatron-rl.sbatch", cwd=config.parent).strip()


def wait(slurm: SlurmCluster, job: str, folder: Path, condition: Callable[[dict[str, str]], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition(state := slurm.state(job)):
        log = folder / f"megatron-rl-{job}.log"
        told = log.read_text()[-6000:] if log.exists() else ""
        if state["JobState"] in ENDS:
            time.sleep(3.0)  # a job that is being queued again shows its last end for a moment
            assert slurm.state(job)["JobState"] not in ENDS, f"{state}\n{told}"
        assert time.monotonic() < deadline, f"{state}\n{told}"
        time.sleep(0.05)


def lines(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(read_metrics(file)) if file.exists() else 0


def preempt(slurm: SlurmCluster, job: str, folder: Path, after: int) -> None:
    """Sends USR1 to all steps of the job once `after` lines are written, and waits until it is queued and starts."""
    wait(slurm, job, folder, lambda state: lines(folder / "run") >= after)
    slurm.tell("scancel", "--signal=USR1", job)
    wait(slurm, job, folder, lambda state: state["Restarts"] == "1" and state["JobState"] == "PENDING")
    # Slurm would wait two minutes. In the second of the requeue, in which its credential is revoked, nodes refuse it.
    slurm.tell("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


def test_a_preempted_job_ends_with_the_weights_of_an_uninterrupted_run(
    forks: Forks, slurm: SlurmCluster, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Two nodes of the trainer, on saved rollouts."""
    steps = 24
    save_rollouts(tiny_model_dir, tmp_path / "saved", steps=steps)
    config = write_config(tmp_path / "c.yaml", tiny_model_dir, tmp_path / "saved", steps=steps)
    job = submit(slurm, config, f"run_dir={tmp_path / 'run'}", "--nodes", "2", "--gpus-per-node", "1")
    preempt(slurm, job, tmp_path, after=4)
    stopped = read_steps(tmp_path / "run")
    assert len(stopped) == 1
    assert 1 <= stopped[0] < steps
    wait(slurm, job, tmp_path, lambda state: state["JobState"] == "COMPLETED")

    log = (tmp_path / f"megatron-rl-{job}.log").read_text()
    assert "The run was stopped and saved; the job is queued again." in log
    assert "Traceback" not in log
    outputs = [str(file.relative_to(tmp_path / "run" / "logs")) for file in (tmp_path / "run").rglob("stderr.log")]
    assert sorted({name.partition("/")[0] for name in outputs}) == ["node-0", "node-1"]
    whole = forks.run(*TRAIN, config, f"run_dir={tmp_path / 'whole'}", ranks=2)
    assert whole.status == [0, 0], whole.stderr
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.server
def test_a_preempted_job_with_a_node_of_servers_ends_with_the_weights_of_its_rollouts(
    forks: Forks, slurm: SlurmCluster, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_model_dir, tmp_path / "unused", preset="grpo", steps=8)
    prompts = "".join(f'{{"prompt": "{n}+1=", "answer": "0"}}\n' for n in range(40))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    sizes = ("rollout.servers.threads=1", "rollout.servers.max_total_tokens=8192")
    data = (f"data.train={tmp_path / 'prompts.jsonl'}", "data.verifier=verifier_examples:longer")
    words = (f"run_dir={tmp_path / 'run'}", *data, *sizes, "rollout.replay_from=null")
    job = submit(slurm, config, *words, "--rollout-nodes", "1", "--gpus-per-node", "1")
    wait(slurm, job, tmp_path, lambda state: lines(tmp_path / "run") > 0)
    assert_key_in_no_command_line(slurm, tmp_path)
    preempt(slurm, job, tmp_path, after=2)
    wait(slurm, job, tmp_path, lambda state: state["JobState"] == "COMPLETED")
    assert (tmp_path / "run" / "logs" / "servers.txt").read_text() == "http://127.0.0.3:30000\n"

    again = forks.run(*TRAIN, config, *data, f"run_dir={tmp_path / 'again'}", f"rollout.replay_from={tmp_path / 'run'}")
    assert again.status == [0], again.stderr
    assert_same_weights(tmp_path / "again", tmp_path / "run")


def assert_key_in_no_command_line(slurm: SlurmCluster, folder: Path) -> None:
    """The job's environment has the key; no command line, and no file of the run, has it."""
    keys, commands = set(), b""
    for process in Path("/proc").iterdir():
        try:
            commands += (process / "cmdline").read_bytes()
            environ = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_CONF={slurm.environment['SLURM_CONF']}".encode() in environ:
            entries = (entry.partition(b"=") for entry in environ)
            keys |= {value for name, _, value in entries if name == b"MEGATRON_RL_SERVER_KEY"}
    (key,) = keys
    assert len(key) == 64
    assert key not in commands
    assert not any(key in file.read_bytes() for file in folder.rglob("*") if file.is_file())
