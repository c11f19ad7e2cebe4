"""The command that starts a server, and options that are refused before the start."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
from paths import ROOT
from server_options import options
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.schema import EngineConfig, RolloutConfig
from megatron_rl.rollout import server as server_module
from megatron_rl.rollout.pool import Pool, PoolOptions
from megatron_rl.rollout.server import PORTS, Server, ServerError, free_ports, sglang_command
from megatron_rl.rollout.transport import LAUNCHED_IDLE_SECONDS


def flags(command: list[str]) -> dict[str, str]:
    return {a: b for a, b in zip(command, [*command[1:], ""], strict=True) if a.startswith("--")}


def test_a_gpu_gets_the_stock_server_without_cpu_flags() -> None:
    command, environment = sglang_command(
        options(device="auto", dtype="bf16", tp=4, first_gpu=8, extra_flags=("--ep-size", "4")), has_gpu=True
    )
    assert command[1:4] == ["-P", "-m", "megatron_rl.rollout.sglang_launch"]
    assert command[-2:] == ["--ep-size", "4"]
    found = flags(command)
    assert (found["--dtype"], found["--tp"], found["--base-gpu-id"]) == ("bfloat16", "4", "8")
    assert not found.keys() & {"--device", "--attention-backend", "--sleep-on-idle", "--api-key"}
    always = {"HF_HUB_OFFLINE", "TORCHINDUCTOR_CACHE_DIR", "GLOO_SOCKET_IFNAME", "SGLANG_TIMEOUT_KEEP_ALIVE"}
    assert environment.keys() == always
    assert float(environment["SGLANG_TIMEOUT_KEEP_ALIVE"]) > LAUNCHED_IDLE_SECONDS


@pytest.mark.parametrize(("device", "has_gpu"), [("auto", False), ("cpu", True), ("cpu", False)])
def test_a_cpu_gets_the_cpu_layer(device: str, has_gpu: bool) -> None:
    command, environment = sglang_command(options(device=device, dtype="fp32", tp=2, threads=8), has_gpu)
    assert command[1:4] == ["-P", "-m", "megatron_rl.rollout.sglang_cpu"]
    found = flags(command)
    assert (found["--device"], found["--attention-backend"]) == ("cpu", "torch_native")
    assert found["--dtype"] == "float32"
    assert "--base-gpu-id" not in found
    assert environment["SGLANG_USE_CPU_ENGINE"] == environment["TORCHDYNAMO_DISABLE"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["SGLANG_CPU_OMP_THREADS_BIND"] == "0-3|4-7"


def test_each_rank_gets_one_thread_if_there_are_fewer_cores_than_ranks() -> None:
    _, environment = sglang_command(options(tp=4, threads=2), has_gpu=False)
    assert environment["OMP_NUM_THREADS"] == "1"


def test_the_command_contains_seed_and_sizes() -> None:
    command, _ = sglang_command(options(seed=7, max_total_tokens=99, max_running_requests=11), has_gpu=False)
    found = flags(command)
    names = ("--random-seed", "--max-total-tokens", "--max-running-requests", "--model-path")
    assert [found[name] for name in names] == ["7", "99", "11", "/models/tiny"]


@pytest.mark.parametrize(("has_gpu", "default"), [(False, "65536"), (True, None)])
def test_sglang_sizes_its_cache_itself_on_a_gpu_alone(has_gpu: bool, default: str | None) -> None:
    """On a CPU it would take most of the memory."""
    for asked, wanted in ((None, default), (99, "99")):
        command, _ = sglang_command(options(device="auto", max_total_tokens=asked), has_gpu)
        assert flags(command).get("--max-total-tokens") == wanted


@pytest.mark.parametrize("has_gpu", [False, True])
def test_routes_are_requested_from_sglang_only_if_wanted(has_gpu: bool) -> None:
    for wanted in (False, True):
        command, _ = sglang_command(options(device="auto", return_routed_experts=wanted), has_gpu)
        assert ("--enable-return-routed-experts" in command) is wanted


def test_a_pool_starts_servers_with_routes_only_if_wanted(tmp_path: Path) -> None:
    for wanted in (False, True):
        pool = Pool(PoolOptions(RolloutConfig(), EngineConfig(), tmp_path, tmp_path, 0, return_routed_experts=wanted))
        assert pool._options(0, 1).return_routed_experts is wanted


def test_a_server_has_the_threads_that_are_asked_for_or_its_part_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rl.cores.usable_cores", lambda: 12)
    for servers, threads in (({"launch": 3}, 4), ({"launch": 3, "threads": 2}, 2), ({}, 12)):
        rollout = RolloutConfig.model_validate({"servers": servers})
        pool = Pool(PoolOptions(rollout, EngineConfig(), tmp_path, tmp_path, 0))
        assert pool._options(0, 1).threads == threads


def test_each_run_makes_a_new_key_for_its_own_servers_only(tmp_path: Path) -> None:
    pools = [Pool(PoolOptions(RolloutConfig(), EngineConfig(), tmp_path, tmp_path, 0)) for _ in range(2)]
    keys = [pool._options(0, 1).api_key for pool in pools]
    assert keys == [pool.api_key for pool in pools]  # the leaders get this key
    assert all(key is not None and len(key) >= 40 for key in keys)
    assert keys[0] != keys[1]
    others = RolloutConfig.model_validate({"servers": {"urls": ["http://a:1"]}})
    assert Pool(PoolOptions(others, EngineConfig(), tmp_path, tmp_path, 0, api_key="theirs")).api_key == "theirs"


@pytest.mark.parametrize(("device", "gpus", "kernels"), [("auto", 1, False), ("cuda", 1, True), ("auto", 0, False)])
def test_sglang_without_kernels_is_refused_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, kernels: bool
) -> None:
    monkeypatch.setattr(server_module, "_gpus", lambda: gpus)
    found = {"sglang": True, "sgl_kernel": kernels}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[name] or None)
    started = []
    monkeypatch.setattr(server_module, "_start", lambda command, *_: started.append(command))
    if gpus and not kernels:
        with pytest.raises(ServerError, match=r"without its GPU kernels .* set engine.device to cpu"):
            Server(options(device=device), tmp_path / "log")
        return
    Server(options(device=device), tmp_path / "log")
    assert len(started) == 1


@pytest.mark.parametrize(("gpus", "extra", "fits"), [(4, (), False), (6, (), True), (1, ("--base-gpu-id=0",), True)])
def test_a_server_is_refused_if_too_few_gpus_are_left(gpus: int, extra: tuple[str, ...], fits: bool) -> None:
    wanted = options(device="cuda", first_gpu=4, tp=2, extra_flags=extra)
    if fits:
        server_module._check_gpus(wanted, gpus)
        return
    with pytest.raises(ServerError, match=r"needs GPUs 4 to 5 .* this machine has 4.* weights\.route: disk"):
        server_module._check_gpus(wanted, gpus)


def test_servers_on_the_trainers_gpus_begin_with_the_first_and_can_give_memory_back(tmp_path: Path) -> None:
    for colocated, gpus in ((True, [0, 2]), (False, [1, 3])):
        rollout = RolloutConfig.model_validate({"servers": {"launch": 2, "tp": 2, "colocate": colocated}})
        pool = Pool(PoolOptions(rollout, EngineConfig(), tmp_path, tmp_path, 0))
        servers = [pool._options(number, 1) for number in (0, 1)]
        assert [server.first_gpu for server in servers] == gpus
        for has_gpu in (True, False):
            command, _ = sglang_command(servers[0], has_gpu)
            assert ("--enable-memory-saver" in command) is (colocated and has_gpu)


def test_a_server_that_cannot_give_memory_back_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_gpus", lambda: 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch_memory_saver" else name)
    monkeypatch.setattr(server_module, "_start", lambda *_: pytest.fail("started"))
    with pytest.raises(
        ServerError, match=r"rollout\.servers\.colocate: true needs SGLang's package torch_memory_saver"
    ):
        Server(options(device="cuda", memory_saver=True), tmp_path / "log")


def test_free_ports_differ_and_are_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        assert port in PORTS
        with socket.socket() as s:
            s.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = sorted(free_ports(2))
    monkeypatch.setattr(server_module, "PORTS", range(first, second + 1, second - first))
    with socket.socket() as s:
        s.bind(("127.0.0.1", first))
        s.listen()
        assert free_ports(1) == [second]
        with pytest.raises(ServerError, match="fewer than 2 free ports"):
            free_ports(2)


KEY = "a-key-that-nothing-else-contains"
SGLANG = {
    "__init__.py": "",
    "srt/__init__.py": "",
    "srt/server_args.py": """
from types import SimpleNamespace

def prepare_server_args(argv):
    return SimpleNamespace(api_key=None, argv=argv)
""",
    "launch_server.py": """
import json, os, sys
from sglang.srt.server_args import prepare_server_args

settings = prepare_server_args(sys.argv[1:])
found = {"key": settings.api_key, "log": str(settings), "environment": dict(os.environ)}
print(json.dumps(found))
""",
}
"""A fake SGLang: the modules that read settings, and a server that prints its settings."""


def test_the_api_key_appears_only_in_sglangs_settings(tmp_path: Path) -> None:
    """The key is not in arguments, log or inherited environment. SGLang's ranks meet at a file, not at a port."""
    for name, text in SGLANG.items():
        file = tmp_path / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    command, environment = sglang_command(options(device="cuda", api_key=KEY), has_gpu=True)
    assert KEY not in " ".join(command)
    done = subprocess.run(
        command,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["key"] == KEY
    assert KEY not in found["log"]
    assert KEY not in found["environment"].values()
    assert found["environment"]["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"].startswith("file:///")
    assert found["environment"]["GLOO_SOCKET_IFNAME"] == os.environ.get("GLOO_SOCKET_IFNAME", "lo")


def test_print_shows_the_command_without_the_key_and_without_sglang(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "the-secret-itself")
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(server_module, "_start", None)
    words = ["serve", str(tiny_model_dir), "--device", "cpu", "--api-key-env", "A_KEY", "--threads", "3", "--print"]
    shown = CliRunner().invoke(app, [*words, "--", "--mem-fraction-static=0.5"])
    assert shown.exit_code == 0, shown.output
    assert "the-secret-itself" not in shown.output
    command = shlex.split(shown.output)
    assert command[0] == "env"
    assert "OMP_NUM_THREADS=3" in command
    assert command[command.index("--model-path") + 1] == str(tiny_model_dir)
    assert command[-1] == "--mem-fraction-static=0.5"
