"""The command line as a user runs it: options, dry runs without torch, and one `error:` line for user mistakes."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import typer
import yaml
from config_files import RL, SFT, write, write_model
from forks import Forks, Run

from megatron_rl.cli import app
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.rollout.server import free_ports

Command = Callable[..., Run]
OPTIONS = {
    "demo": {"overrides", "--preset", "--cold-start"},
    "train": {"config", "overrides", "--dry-run", "--resume", "--fork", "--world-size"},
    "sft": {"config", "overrides", "--dry-run", "--resume", "--fork", "--world-size"},
    "study": {"file", "--task", "--dry-run"},
    "check": {"config", "overrides", "--sft", "--world-size"},
    "plan": {"config", "overrides", "--gpus", "--memory", "--gpu", "--sft"},
    "serve": {
        *("model", "--host", "--port", "--device", "--dtype", "--tp", "--max-total-tokens", "--threads"),
        *("--api-key-env", "--print"),
    },
    "launch": {
        *("config", "overrides", "--nodes", "--rollout-nodes", "--gpus-per-node", "--slurm", "--kubernetes"),
        *("--site", "--out"),
    },
    "doctor": {"--server", "--model", "--config", "--api-key-env"},
    "graft": {"donor", "base", "out", "--weights"},
    "dequantise": {"model", "out"},
    "export": {"checkpoint", "out", "--critic", "--model"},
    "report": {"paths", "--out"},
    "tokens": {"run", "--out", "--step", "--rollouts", "--model"},
    "inspect": {"run", "--step", "--responses", "--model", "--rollouts", "--out"},
    "attribute": {"config", "overrides", "--step"},
    "replay-study": {
        "config",
        "overrides",
        "--step",
        "--later",
        "--updates",
        "--older",
        "--graft",
        "--agree",
        "--routing",
        "--objective",
        "--gradients",
        "--no-gradients",
    },
    "certify": {"--model", "--layout", "--recompute", "--dtype", "--device", "--json"},
    "parity": {
        "--model",
        "--tokens",
        "--layout",
        "--dtype",
        "--recompute",
        "--device",
        "--url",
        "--api-key-env",
        "--json",
    },
}
GROUP_OPTIONS = {"--version"}
BLOCK_TORCH = "import sys; sys.modules['torch'] = None; from megatron_rl.cli import main; main()"


def environment(**more: str) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**ours, "OMP_NUM_THREADS": "1", **more}


def real(directory: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_rl", *arguments],
        cwd=directory,
        env=environment(**more),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def run(forks: Forks) -> Command:
    """Returns a function that runs a command in a directory; its keywords are environment variables."""

    def run(directory: Path, *arguments: str, **more: str) -> Run:
        return forks.run("-m", "megatron_rl", *arguments, directory=directory, environment=more)

    return run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a.yaml (RL), sft.yaml and the model that they name."""
    write(tmp_path / "a.yaml", RL)
    write(tmp_path / "sft.yaml", SFT)
    write_model(tmp_path / "model")
    return tmp_path


# ---- options ---------------------------------------------------------------------------------------------------


def test_the_command_line_options_are_frozen() -> None:
    """Users rely on every option, so adding one must change this list too."""
    group = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        found[name] = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
    assert found == OPTIONS
    assert {option for parameter in group.params for option in parameter.opts} == GROUP_OPTIONS


def test_the_version_option_works_without_torch(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH, "--version"],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(lines) == ["megatron_rl", "megatron-core", "torch", "transformers", "sglang"]
    for name in ("megatron_rl", "megatron-core", "torch", "transformers"):
        assert lines[name] == importlib.metadata.version(name)


def test_the_version_option_shows_a_missing_package_as_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        if name == "sglang":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit) as ended:
        app(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["transformers 1.2.3", "sglang not installed"]


# ---- dry runs --------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_torch(run: Command, directory: Path) -> None:
    command = ["train", "a.yaml", "optim.lr=1e-5", "parallel.ep=4", "--dry-run", "--world-size", "4"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_TORCH, *command],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    text, _, table = done.stdout.partition("4 ranks: ")
    shown = write(directory / "shown.yaml", text)
    assert load_config(Config, shown) == load_config(Config, directory / "a.yaml", ["optim.lr=1e-5", "parallel.ep=4"])
    assert table.startswith("tp=1, pp=1, vpp=1, cp=1, dp=4, ep=4, etp=1, edp=1")
    assert "12-15" in table
    assert "sizes that fit this model: tp 1, 2, 4, 8; ep 1, 2, 4, 8, 16; " in table
    assert "micro-batches on each of 4 data-parallel replicas" in table
    assert "memory of the largest rank (0): about " in table
    assert table.splitlines()[-1].startswith(
        "nothing was opened: `megatron-rl check a.yaml --world-size 4` opens weights, "
    )
    assert not (directory / "runs").exists()


def test_a_dropped_preset_key_is_noted_once(run: Command, directory: Path) -> None:
    write(directory / "base.yaml", "optim: {schedule: linear, decay_steps: 9}\n")
    done = run(directory, "train", "a.yaml", "presets=base.yaml", "optim.schedule=constant", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "note: optim.decay_steps: 9 does nothing under optim.schedule constant; dropped from preset base.yaml, "
        "because of override 'optim.schedule=constant'\n"
    )


@pytest.mark.parametrize("command", [("train", "a.yaml"), ("sft", "sft.yaml")])
def test_a_dry_run_uses_the_world_size_of_torchrun(directory: Path, command: tuple[str, str]) -> None:
    done = real(directory, *command, "--dry-run", "parallel.pp=2", WORLD_SIZE="4")
    assert done.returncode == 0, done.stderr
    assert "4 ranks: tp=1, pp=2, vpp=1, cp=1, dp=2" in done.stdout
    assert "4-7" in done.stdout
    assert yaml.safe_load(done.stdout.partition("4 ranks")[0].rstrip())["parallel"]["pp"] == 2


def test_a_dry_run_reports_empty_micro_batches(run: Command, directory: Path) -> None:
    sizes = ["batch_size=5", "data.max_tokens=60", "engine.max_tokens_per_micro_batch=100"]
    done = run(directory, "sft", "sft.yaml", *sizes, "--dry-run", "--world-size", "2")
    assert (
        "mini-batch: 5 samples of at most 60 tokens; at their longest 3 micro-batches on each of 2 data-parallel "
        "replicas, 1 of these 6 empty: the samples do not divide\n"
    ) in done.stdout


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train", "a.yaml", "optim.lrr=1"], "override 'optim.lrr=1': optim.lrr: no such key; did you mean optim.lr?"),
        (["train", "b.yaml"], "b.yaml: no such file; expected a YAML configuration"),
        (
            ["train", "a.yaml", "parallel.tp=2"],
            "parallel: tp * cp * pp = 2 does not divide the world of 1 ranks; start ",
        ),
        (["train", "a.yaml", "eval.every=1"], "eval.every: 1 does nothing without data.heldout"),
        (["train", "a.yaml", "model.path=x"], "model.path: x/config.json does not exist; "),
        (["train", "a.yaml", "model.path=broken"], "model.path: broken/config.json: model_type is 'gpt2'; expected "),
        (["train", "a.yaml", "--world-size", "2"], "--world-size: only --dry-run plans for a world; "),
        (
            ["train", "a.yaml", "presets=ppo", "critic.path=nowhere", "--dry-run"],
            "critic.path: nowhere/config.json does not exist",
        ),
        (["train", "a.yaml", "parallel.ep=3", "--dry-run"], "parallel: etp * ep * pp = 3 does not divide the world of"),
        (
            ["plan", "a.yaml", "parallel.ep=3", "--gpus", "3"],
            "parallel.ep: 3 does not divide the 16 experts of the model",
        ),
        (["plan", "a.yaml", "--gpu", "v100"], "--gpu: found v100, expected one of a100, h100, h200, b200"),
        (["sft", "a.yaml"], "a.yaml: steps: not set, and it has no default\na.yaml:4: train: no such key"),
        (
            ["parity", "--model", "model", "--tokens", "t.jsonl", "--layout", "tp=3"],
            "--layout tp=3: parallel.tp: 3 does",
        ),
        (["parity", "--model", "model", "--tokens", "t.jsonl", "--layout", "xp=3"], "layout 'xp=3': 'xp=3' is not a"),
        (["parity", "--model", "model", "--tokens", "a.yaml", "--layout", ""], "a.yaml:1: not JSON "),
    ],
)
def test_a_user_mistake_gives_one_clear_error(run: Command, directory: Path, arguments: list[str], error: str) -> None:
    write(directory / "broken" / "config.json", '{"model_type": "gpt2"}')
    write(directory / "t.jsonl", "[1, 2, 3]\n")
    done = run(directory, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(f"error: {error}")


@pytest.mark.distributed
def test_only_one_rank_prints_an_error_that_all_ranks_have(run: Command, directory: Path) -> None:
    (port,) = free_ports(1)
    # Uses torchrun's static rendezvous, which unpickles nothing, instead of --standalone.
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    launcher = ["-m", "torch.distributed.run", *address, "--nproc-per-node", "2", "-m", "megatron_rl"]
    done = subprocess.run(
        [sys.executable, *launcher, "train", "a.yaml", "optim.lr=fast"],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    error = "override 'optim.lr=fast': optim.lr: found \"fast\""
    assert done.stderr.count(f"error: {error}") == 1
    assert error in done.stderr.partition("Root Cause (first observed failure):")[2]


def test_a_rank_prints_an_error_that_only_it_may_have(run: Command, directory: Path) -> None:
    world = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run(directory, "parity", "--model", "model", "--tokens", "a.yaml", "--layout", "", **world)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: rank 3 on host {socket.gethostname()}: a.yaml:1: not JSON")


@pytest.mark.parametrize("command", ["parity", "certify", "serve", "train"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: (d / "config.json").write_text("[" * 100000), "config.json is not valid JSON: nested too deep"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 20), "model.safetensors is not a whole safetensors"),
    ],
)
def test_every_command_reports_a_damaged_model_in_the_same_words(
    run: Command, tiny_model_dir: Path, tmp_path: Path, command: str, damage: Callable[[Path], object], told: str
) -> None:
    model = shutil.copytree(tiny_model_dir, tmp_path / "model")
    damage(model)
    write(tmp_path / "t.jsonl", "[1, 2, 3]\n")
    write(tmp_path / "a.yaml", RL)
    arguments = {
        "parity": ["--model", "model", "--tokens", "t.jsonl", "--layout", "tp=1"],
        "certify": ["--model", "model", "--layout", "tp=1"],
        "serve": ["model"],
        "train": [
            "a.yaml",
            "data={train: 'arithmetic:terms=3', max_prompt_tokens: 64}",
            "rollout.max_response_tokens=64",
        ],
    }
    done = run(tmp_path, command, *arguments[command])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


# ---- real runs -------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_serve_passes_its_own_and_extra_flags_to_sglang(forks: Forks, tiny_model_dir: Path) -> None:
    (port,) = free_ports(1)
    options = ["--port", str(port), "--device", "cpu", "--dtype", "fp32", "--max-total-tokens", "2048"]
    server = forks.start("-m", "megatron_rl", "serve", tiny_model_dir, *options, "--", "--log-level", "error")
    try:
        info = ask(f"http://127.0.0.1:{port}/server_info", lambda: forks.poll(server))
        assert info["model_path"] == str(tiny_model_dir)
        assert (info["dtype"], info["device"]) == ("float32", "cpu")
        assert info["max_total_tokens"] == 2048
        assert info["log_level"] == "error"
    finally:
        os.kill(server.pids[0], signal.SIGINT)
        assert forks.wait(server, 60).status == [130]


def ask(url: str, is_alive: Callable[[], bool], seconds: float = 180.0) -> dict[str, object]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert is_alive()
        try:
            answer = httpx.get(url, timeout=5.0)
            if answer.status_code == 200:
                return dict(answer.json())
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"no answer from {url} in {seconds} s")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "serve: --host 0.0.0.0 lets other machines in, and whoever reaches an SGLang server"),
        (["--host", "10.0.0.5"], "serve: --host 10.0.0.5 lets other machines in"),
        (["--", "--host", "0.0.0.0"], "serve: --host cannot be given"),
        (["--", "--api-key=secret-7"], "serve: --api-key cannot be given"),
        (["--api-key-env", "UNSET"], "--api-key-env: the environment variable UNSET is not set"),
        (["--host", "::", "--api-key-env", "ODD"], "--api-key-env: character 9 of the key in the environment variable"),
    ],
)
def test_serve_refuses_unsafe_hosts_and_unusable_keys(
    run: Command, tiny_model_dir: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = run(tmp_path, "serve", str(tiny_model_dir), "--device", "cpu", *options, ODD="secret-7\nand")
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert "secret-7" not in done.stderr


def test_parity_reads_the_api_key_before_it_computes_anything(
    run: Command, tiny_model_dir: Path, tmp_path: Path
) -> None:
    write(tmp_path / "t.jsonl", "[1, 2]")
    files = ["--model", str(tiny_model_dir), "--tokens", "t.jsonl"]
    done = run(tmp_path, "parity", *files, "--layout", "tp=1", "--url", "http://127.0.0.1:1", "--api-key-env", "UNSET")
    assert done.returncode == 2
    assert "error: --api-key-env: the environment variable UNSET is not set" in done.stderr
