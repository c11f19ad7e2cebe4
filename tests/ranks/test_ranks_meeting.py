"""Ranks on several nodes: a node with a problem reports it, and all ranks end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from config_files import write
from forks import Forks, Run
from paths import ROOT
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from megatron_rl.ranks.meeting import LostError, Meeting, Report, verdict
from megatron_rl.ranks.world import WorldError, read_world
from megatron_rl.rollout.server import free_ports

HOST = socket.gethostname()
SECONDS = 120.0
"""Time limit of a launch. A rank that waits for a missing rank would need 600 s."""
SFT = """\
run_dir: {run}
model: {{path: model}}
engine: {{device: cpu, dtype: fp32}}
data: {{train: examples.jsonl, max_tokens: 200}}
steps: 1
batch_size: 4
"""


def node(directory: Path, run_dir: str = "RUN") -> Path:
    """Writes the files of one node: configuration, model and data."""
    make_tiny_model(directory / "model", num_layers=1)
    write(directory / "sft.yaml", SFT.format(run=run_dir))
    write(directory / "examples.jsonl", '{"prompt": "1+1=", "response": "2"}\n' * 4)
    return directory


# ---- all differences between two nodes, launched at once ----------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    status: int
    stdout: str
    stderr: str


def _without(name: str):
    def change(directory: Path) -> None:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def _other_weights(directory: Path) -> None:
    shutil.rmtree(directory / "model")
    make_tiny_model(directory / "model", num_layers=1, num_experts=4)


def _truncated(directory: Path) -> None:
    """Truncates the weights on both nodes: they agree with each other, and then find that the file is damaged."""
    for each in (directory, directory.parent / "0"):
        weights = each / "model" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])


def _other_value(directory: Path) -> None:
    write(directory / "sft.yaml", (directory / "sft.yaml").read_text().replace("steps: 1", "steps: 2"))


def _local_run_dir(directory: Path) -> None:
    for each in (directory, directory.parent / "0"):
        write(each / "sft.yaml", (each / "sft.yaml").read_text().replace("run_dir: ", "run_dir: mine #"))


COMMAND = ["sft", "sft.yaml"]
# name: (change of rank 1's node, rank 0's arguments, rank 1's arguments, rank 1's extra environment, its message)
LAUNCHES = {
    "no model": (_without("model"), COMMAND, COMMAND, {}, "model.path: model/config.json does not exist"),
    "no weights": (
        _without("model/model.safetensors"),
        COMMAND,
        COMMAND,
        {},
        "model.path: not the files that rank 0 reads: model.safetensors (absent, but ",
    ),
    "no file": (_without("sft.yaml"), COMMAND, COMMAND, {}, "sft.yaml: no such file; expected a YAML configuration"),
    "no data": (_without("examples.jsonl"), COMMAND, COMMAND, {}, "data.train: examples.jsonl does not exist"),
    "other file": (
        _other_value,
        COMMAND,
        COMMAND,
        {},
        "another configuration than rank 0's: steps is 2, but 1 on rank 0; start",
    ),
    "other overrides": (
        None,
        COMMAND,
        [*COMMAND, "optim.lr=1e-5"],
        {},
        "another configuration than rank 0's: optim.lr is 1e-05, but 1e-06 on rank 0",
    ),
    "other model": (_other_weights, COMMAND, COMMAND, {}, "model.path: not the files that rank 0 reads: config.json ("),
    "run_dir not shared": (_local_run_dir, COMMAND, COMMAND, {}, "run_dir: "),
    "resume on one": (None, COMMAND, [*COMMAND, "--resume"], {}, "started with --resume, but rank 0 without it"),
    "other world": (None, COMMAND, COMMAND, {"WORLD_SIZE": "3"}, "started as `sft` of 3 ranks, but rank 0 as `sft` of"),
    "fault": (None, COMMAND, COMMAND, {}, None),
    "damaged everywhere": (_truncated, COMMAND, COMMAND, {}, None),
    "rank 0 lacks it": (None, ["sft", "zero.yaml"], COMMAND, {}, None),
    "same mistake": (None, [*COMMAND, "optim.lr=fast"], [*COMMAND, "optim.lr=fast"], {}, None),
}

# What rank 1 calls first.
BEFORE: dict[str, list[tuple[str, ...]]] = {
    "fault": [("patches:fault_deep_in_a_library", "TypeError")],
    "deep fault": [("patches:fault_deep_in_a_library", "FileNotFoundError")],
    "run_dir not shared": [("patches:wait_less",)],
    "alone": [("patches:wait_less",)],
}


@pytest.fixture(scope="module")
def launched(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rank]]:
    """Results of the two ranks of each launch, and of single ranks. All launches run at once."""
    root = tmp_path_factory.mktemp("launches")
    template = node(root / "template")
    ports = iter(free_ports(len(LAUNCHES) + 1))
    started: dict[str, list[Run]] = {}
    for name, (change, *arguments, more, _) in LAUNCHES.items():
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(ports))}
        directories = [root / name / str(rank) for rank in (0, 1)]
        for directory in directories:
            shutil.copytree(template, directory)
            write(directory / "sft.yaml", SFT.format(run=root / name / "run"))
        if change:
            change(directories[1])
        started[name] = [
            forks.start(
                *("-m", "megatron_rl", *arguments[rank]),
                before=BEFORE.get(name, []) if rank else [],
                environment={**world, "RANK": str(rank), **(more if rank else {})},
                directory=directories[rank],
            )
            for rank in (0, 1)
        ]
    alone = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(ports))}
    for name, environment, file in [
        ("alone", alone, "missing.yaml"),
        ("no address", {"WORLD_SIZE": "2", "RANK": "1"}, "sft.yaml"),
        ("malformed", {"WORLD_SIZE": "two", "RANK": "1"}, "sft.yaml"),
        ("deep fault", {}, "sft.yaml"),
    ]:
        command = ("-m", "megatron_rl", "sft", file)
        before = BEFORE.get(name, [])
        started[name] = [forks.start(*command, before=before, environment=environment, directory=template)]
    ended = {name: [forks.wait(run, SECONDS) for run in runs] for name, runs in started.items()}
    return {name: [Rank(run.returncode, run.stdout, run.stderr) for run in runs] for name, runs in ended.items()}


def errors(rank: Rank) -> list[str]:
    return [line for line in rank.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, (*_, told) in LAUNCHES.items() if told])
def test_a_node_reports_its_own_problem_and_all_ranks_end(launched: dict[str, list[Rank]], name: str) -> None:
    zero, one = launched[name]
    told = LAUNCHES[name][-1]
    assert (zero.status, one.status) == (2, 2)
    (line,) = errors(one)
    assert line.startswith(f"error: rank 1 on host {HOST}: {told}")
    assert errors(zero) == [f"error: nothing was started, because of {line.removeprefix('error: ')}"]
    assert "Traceback" not in zero.stderr + one.stderr


@pytest.mark.distributed
def test_the_error_for_an_unshared_run_dir_names_both_directories(launched: dict[str, list[Rank]]) -> None:
    (line,) = errors(launched["run_dir not shared"][1])
    assert "run_dir not shared/1/mine is not the directory that rank 0 writes, " in line
    assert f"run_dir not shared/0/mine on host {HOST}; all ranks write into it" in line


@pytest.mark.distributed
def test_rank_0_reports_its_own_missing_file(launched: dict[str, list[Rank]]) -> None:
    zero, one = launched["rank 0 lacks it"]
    (line,) = errors(zero)
    assert line == f"error: rank 0 on host {HOST}: zero.yaml: no such file; expected a YAML configuration"
    assert errors(one) == [f"error: nothing was started, because of {line.removeprefix('error: ')}"]


@pytest.mark.distributed
def test_an_error_that_all_ranks_find_names_no_rank(launched: dict[str, list[Rank]]) -> None:
    for rank in launched["same mistake"]:
        (line,) = errors(rank)
        assert line.startswith("error: override 'optim.lr=fast': optim.lr: found \"fast\", expected a valid number")
    for rank in launched["damaged everywhere"]:
        (line,) = errors(rank)
        assert line.startswith("error: model.path: model/model.safetensors is not a whole safetensors file: ")


@pytest.mark.distributed
def test_an_unexpected_error_on_one_rank_prints_its_traceback_and_ends_all(launched: dict[str, list[Rank]]) -> None:
    zero, one = launched["fault"]
    assert one.status == 1
    assert f"rank 1 on host {HOST}: a fault that the program did not expect:\nTraceback" in one.stderr
    assert one.stderr.rstrip().endswith("TypeError: libdeep.so")
    assert zero.status == 2
    assert f"because of rank 1 on host {HOST}: TypeError: libdeep.so; a fault of the program" in errors(zero)[0]


@pytest.mark.distributed
def test_a_rank_that_reaches_no_other_rank_prints_its_own_error(launched: dict[str, list[Rank]]) -> None:
    (rank,) = launched["alone"]
    assert rank.status == 2
    assert rank.stderr == f"error: rank 1 on host {HOST}: missing.yaml: no such file; expected a YAML configuration\n"


@pytest.mark.distributed
def test_a_file_not_found_error_in_a_library_keeps_its_traceback(launched: dict[str, list[Rank]]) -> None:
    (rank,) = launched["deep fault"]
    assert rank.status == 1
    assert "Traceback" in rank.stderr
    assert "in failing" in rank.stderr
    assert rank.stderr.rstrip().endswith("FileNotFoundError: libdeep.so")


@pytest.mark.distributed
def test_malformed_launcher_variables_give_one_error(launched: dict[str, list[Rank]]) -> None:
    for name, told in [
        ("malformed", "the environment variable WORLD_SIZE is 'two'; expected an integer from 1 to"),
        ("no address", "MASTER_PORT is not set, but WORLD_SIZE is above 1; start the ranks with torchrun"),
    ]:
        (rank,) = launched[name]
        assert rank.status == 2
        (line,) = errors(rank)
        assert line.startswith(f"error: {told}")


# ---- real launchers ----------------------------------------------------------------------------------------------


def agents(directories: list[Path], *arguments: str, ranks: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Runs torchrun with `ranks` ranks on each node."""
    (port,) = free_ports(1)
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launcher = ["-m", "torch.distributed.run", "--nnodes", str(len(directories)), "--nproc-per-node", str(ranks)]
    running = [
        subprocess.Popen(
            [
                *(sys.executable, *launcher, "--node-rank", str(rank)),
                *("--master-addr", "127.0.0.1", "--master-port", str(port), "-m", "megatron_rl", *arguments),
            ],
            cwd=directory,
            env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, directory in enumerate(directories)
    ]
    done = []
    for process in running:
        out, err = process.communicate()
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
@pytest.mark.distributed
def test_the_launcher_without_the_model_reports_it_once(tmp_path: Path) -> None:
    first = node(tmp_path / "0", str(tmp_path / "run"))
    second = shutil.copytree(first, tmp_path / "1")
    shutil.rmtree(second / "model")
    zero, one = agents([first, second], "sft", "sft.yaml", ranks=1)
    assert zero.returncode != 0
    assert one.returncode != 0
    told = f"rank 1 on host {HOST}: model.path: model/config.json does not exist"
    assert one.stderr.count(f"error: {told}") == 1  # torchrun's summary has it too, as the root cause
    assert zero.stderr.count("error: ") == 1
    assert f"error: nothing was started, because of {told}" in zero.stderr
    assert "megatron_rl/cli.py" not in zero.stderr + one.stderr  # torchrun's own traceback is there
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".megatron-rl-*"))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_launchers_with_the_same_files_train(tmp_path: Path) -> None:
    """Each node has its own directory and uses relative paths; only the run directory is shared."""
    first = node(tmp_path / "0", str(tmp_path / "run"))
    second = shutil.copytree(first, tmp_path / "1")
    zero, one = agents([first, second], "sft", "sft.yaml")
    assert (zero.returncode, one.returncode) == (0, 0), zero.stderr + one.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_end_if_one_rank_reads_a_damaged_weight(tmp_path: Path) -> None:
    """Under expert parallelism only one rank reads the damaged expert."""
    first = node(tmp_path / "0", str(tmp_path / "run"))
    file = first / "model" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.experts.7.up_proj.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    started = time.monotonic()
    (done,) = agents([first], "sft", "sft.yaml", "parallel.ep=2")
    assert done.returncode != 0
    assert time.monotonic() - started < 120
    assert done.stderr.count(f"error: rank 1 on host {HOST}: model/model.safetensors: {name} holds NaN") == 1
    assert "megatron_rl/cli.py" not in done.stderr


# ---- units -------------------------------------------------------------------------------------------------------


def reports(*problems: str, ranks_per_node: int = 2) -> dict[int, Report]:
    return {
        rank: Report(rank, f"node {rank // ranks_per_node}", f"h{rank // ranks_per_node}", problem)
        for rank, problem in enumerate(problems)
    }


def test_each_node_reports_each_problem_once() -> None:
    assert verdict(reports("", "", "", ""), 4) == {}
    assert verdict(reports("", "", "no model", "no model"), 4) == {
        0: "nothing was started, because of rank 2 on host h1: no model",
        2: "rank 2 on host h1: no model",
    }
    assert verdict(reports("", "a", "b", "a"), 4) == {
        1: "rank 1 on host h0: a",
        2: "rank 2 on host h1: b",
        3: "rank 3 on host h1: a",
    }
    assert verdict(reports("a", "a", "a", "a"), 4) == {0: "a", 2: "a"}


def test_the_error_names_ranks_that_never_arrive() -> None:
    (text,) = verdict(reports("", "", ranks_per_node=4), 4).values()
    assert text == "rank 0 on host h0: 2 of 4 ranks have not come within 600 s: 2, 3"
    assert verdict(reports("", "a", ranks_per_node=4), 4) == {1: "rank 1 on host h0: a"}
    assert verdict(reports("a", "a", ranks_per_node=4), 4) == {0: "rank 0 on host h0: a"}


def test_a_second_process_with_the_same_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    world = read_world({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    first = Meeting(world, 5.0)
    with pytest.raises(LostError, match="RANK is 0, but another process has it too"):
        Meeting(world, 5.0)
    assert first.world == world


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; expected an integer from 1 to"),
        ({"WORLD_SIZE": " 2"}, "WORLD_SIZE is ' 2'"),
        ({"WORLD_SIZE": "1_0"}, "WORLD_SIZE is '1_0'"),
        ({"WORLD_SIZE": "\u0662"}, "WORLD_SIZE is '\u0662'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '99999"),
        ({"RANK": "1"}, "RANK is '1'; expected an integer from 0 to 0, as WORLD_SIZE is 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is ''"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "2"}, "LOCAL_WORLD_SIZE is '4'; expected an integer from 1 to 2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999", "MASTER_ADDR": "h"}, "MASTER_PORT is '99999'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
    ],
)
def test_invalid_launcher_variables_are_errors(environment: dict[str, str], told: str) -> None:
    with pytest.raises(WorldError) as caught:
        read_world(environment)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 400


def test_without_a_launcher_the_world_has_one_rank() -> None:
    world = read_world({})
    assert (world.rank, world.size, world.local_rank, world.local_size, world.joined) == (0, 1, 0, 1, False)
