"""Starting, watching and ending servers. Most tests end a server during its start, when most can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from paths import ROOT
from server_options import options

from megatron_rl.engine.device import NCCL_OF_SERVERS
from megatron_rl.errors import UserError
from megatron_rl.rollout import server as server_module
from megatron_rl.rollout.server import Server, ServerError, free_ports, sglang_command


def processes_of(group: int) -> list[psutil.Process]:
    """Returns the processes of the process group that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


# ---- the command


_EXPERTS_ON = """
import argparse, json, sys
from types import SimpleNamespace
from megatron_rl.rollout.sglang_cpu import install_stand_ins
install_stand_ins()
from sglang.srt.arg_groups.overrides import collect_model_override_declarations
from sglang.srt.runtime_context import override_platform
from sglang.srt.server_args import ServerArgs
for command in json.loads(sys.argv[1]):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = ServerArgs.from_cli_args(parser.parse_args(command[command.index("-m") + 2 :]))
    arguments._quantization_explicitly_unset = False
    for sm100 in (False, True):
        for name in ("Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"):
            found = {"moe_runner_backend": arguments.moe_runner_backend}
            with override_platform(is_sm90=not sm100, is_sm100=sm100):
                model = SimpleNamespace(architectures=[name])
                for _, chosen in collect_model_override_declarations(name, arguments, model):
                    found |= chosen
            print("experts", found["moe_runner_backend"])
"""


@pytest.mark.slow
def test_sglang_uses_expert_kernels_that_report_routes_if_routes_are_requested() -> None:
    """From our flags SGLang chooses kernels for the experts of two families on sm90 and sm100; some do not report
    routes."""
    wanted: list[dict[str, Any]] = [
        {},
        {"return_routed_experts": True},
        {"extra_flags": ("--enable-return-routed-experts",)},
    ]
    commands = [sglang_command(options(device="cuda", **given), has_gpu=True)[0] for given in wanted]
    done = subprocess.run(
        [sys.executable, "-c", _EXPERTS_ON, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("experts ")]
    assert found == ["auto", "auto", "flashinfer_trtllm", "flashinfer_trtllm", *["triton"] * 8]


_NCCL_OF = """
import argparse, json, os, sys
from megatron_rl.rollout.sglang_cpu import install_stand_ins
install_stand_ins()
from sglang.srt.entrypoints.engine import _set_envs_and_config
from sglang.srt.server_args import ServerArgs
command = json.loads(sys.argv[1])
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
_set_envs_and_config(ServerArgs.from_cli_args(parser.parse_args(command[command.index("-m") + 2 :])))
print("nccl", json.dumps({name: value for name, value in os.environ.items() if name.startswith("NCCL_")}))
"""


@pytest.mark.slow
def test_sglang_gives_nccl_the_settings_that_the_trainers_ranks_have() -> None:
    command, _ = sglang_command(options(device="cuda"), has_gpu=True)
    without = {name: value for name, value in os.environ.items() if not name.startswith("NCCL_")}
    environment = {**without, "SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _NCCL_OF, json.dumps(command)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (line for line in done.stdout.splitlines() if line.startswith("nccl "))
    assert json.loads(found.removeprefix("nccl ")) == NCCL_OF_SERVERS


# ---- the tether

FAMILY = """
import subprocess, sys, time, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("started", flush=True)
time.sleep(600)
"""


def start_parent() -> tuple[subprocess.Popen[str], int]:
    """Starts a process that starts FAMILY in place of a server, as Server does. Returns it and the process group."""
    code = f"""
import subprocess, sys, time
from megatron_rl.rollout.server import _start
child = _start([sys.executable, "-c", {FAMILY!r}], {{}}, output=None)
print(child.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    )
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (group,) = (int(line) for line in lines - {"started"})
    return parent, group


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_all_server_processes_end_with_the_parent(number: signal.Signals) -> None:
    parent, group = start_parent()
    try:
        wait_until(lambda: len(processes_of(group)) == 3, 10)
        assert not any({"RANK", "TORCHELASTIC_USE_AGENT_STORE"} & p.environ().keys() for p in processes_of(group))
        parent.send_signal(number)
        wait_until(lambda: not processes_of(group), 5)
    finally:
        parent.kill()
        parent.communicate()
        for process in processes_of(group):
            process.kill()


def test_the_tether_exits_with_the_status_of_its_command() -> None:
    child = server_module._start([sys.executable, "-c", "raise SystemExit(7)"], {}, output=None)
    assert child.wait(20) == 7


def test_the_tether_does_not_import_modules_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "threading.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    child = server_module._start([sys.executable, "-c", "raise SystemExit(7)"], {"PYTHONPATH": str(ROOT)}, output=None)
    assert child.wait(20) == 7


def test_the_tether_refuses_to_share_its_callers_process_group() -> None:
    command = [sys.executable, "-m", "megatron_rl.rollout.tether", "true"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert ended.returncode == 1
    assert b"not the leader of a process group" in ended.stderr


# ---- real servers


@pytest.mark.server
def test_a_missing_model_gives_one_error_with_the_end_of_the_log(forked_servers: None, tmp_path: Path) -> None:
    server = Server(options(tmp_path / "missing"), tmp_path / "logs" / "server.log")
    try:
        with pytest.raises(ServerError, match="ended with status 1; the end of its log") as caught:
            server.wait_ready(120.0)
    finally:
        server.stop()
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert str(tmp_path / "logs" / "server.log") in message
    assert str(tmp_path / "missing") in message.splitlines()[-1]
    assert len(message.splitlines()) <= server_module.LOG_TAIL_LINES + 1
    assert not server.is_alive()


@pytest.mark.server
def test_stop_leaves_no_process_and_may_be_called_twice(
    forked_servers: None, tiny_model_dir: Path, tmp_path: Path
) -> None:
    server = Server(options(tiny_model_dir), tmp_path / "server.log")
    try:
        with pytest.raises(ServerError, match=r"did not answer within 0\.5 s"):
            server.wait_ready(0.5)
        server.check_alive()
        # tether, server, scheduler, detokenizer; a fifth, multiprocessing's tracker, is there if they are spawned
        wait_until(lambda: len(processes_of(server.pid)) == 4, 60)
    finally:
        server.stop()
    assert not processes_of(server.pid)
    assert not server.is_alive()
    server.stop()


KEY = "a-key-that-nothing-else-contains"
ADMINISTRATION = {
    "configure_logging": {"log_requests": True},
    "start_profile": {},
    "update_weight_version": {"new_version": "3"},
    "pause_generation": {"mode": "abort"},
    "update_weights_from_disk": {"model_path": "/nowhere"},
    "generate": {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}},
}


def left_by(group: int) -> set[str]:
    """Returns the temporary and shared-memory files of the process group's processes."""
    files = set()
    for process in processes_of(group):
        files |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
        files.add(process.environ().get("TMPDIR", ""))
    return files - {""}


@pytest.mark.server
def test_a_server_requires_its_key_and_ends_when_its_trainer_is_killed(tiny_model_dir: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    code = f"""
import os, time
from pathlib import Path
from megatron_rl.rollout.server import *
options = ServerOptions(Path({str(tiny_model_dir)!r}), port={port}, device="cpu", threads=1, max_total_tokens=2048,
                        api_key=os.environ.pop("KEY"))
server = Server(options, Path({str(tmp_path / "run" / "server.log")!r}))
print(server.pid, flush=True)
server.wait_ready(300)
print("ready", flush=True)
time.sleep(600)
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "KEY": KEY},
    )
    assert trainer.stdout is not None
    group = int(trainer.stdout.readline())
    try:
        assert trainer.stdout.readline() == "ready\n"
        # tether, server, scheduler, detokenizer; a fifth, multiprocessing's tracker, is there if they are spawned
        assert len(processes_of(group)) == 4
        url = f"http://127.0.0.1:{port}"
        for path, body in ADMINISTRATION.items():
            assert httpx.post(f"{url}/{path}", json=body).status_code == 401, path
            wrong = httpx.post(f"{url}/{path}", json=body, headers={"Authorization": f"Bearer {KEY}x"})
            assert wrong.status_code == 401, path
        assert httpx.get(f"{url}/server_info", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        log = (tmp_path / "run" / "server.log").read_text()
        assert "'api_key': '***'" in log
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
        assert not [p for p in psutil.process_iter(["cmdline"]) if KEY in " ".join(p.info["cmdline"] or [])]
        listening = [c.laddr.ip for p in processes_of(group) for c in p.net_connections("inet") if c.status == "LISTEN"]
        assert len(listening) > 1
        assert set(listening) == {"127.0.0.1"}

        files = left_by(group)
        assert len([file for file in files if "sglang_loads" in file]) == 1
        (directory,) = (Path(file) for file in files if "/sglang-" in file)
        assert len(list(directory.iterdir())) >= 5
        trainer.send_signal(signal.SIGKILL)
        wait_until(lambda: not processes_of(group), 10)
        assert not [file for file in files if os.path.exists(file) and file != os.environ.get("TMPDIR")]
    finally:
        trainer.kill()
        trainer.communicate()
        for process in processes_of(group):
            process.kill()


def test_a_command_ends_if_its_tether_is_killed(tmp_path: Path) -> None:
    code = "import os, time; print('in', os.environ['TMPDIR'], flush=True); time.sleep(600)"
    with (tmp_path / "log").open("wb") as log:
        tether = server_module._start([sys.executable, "-c", code], {}, log)
    wait_until(lambda: (tmp_path / "log").read_text().count(" "), 30)
    _, directory = (tmp_path / "log").read_text().split()
    tether.kill()
    wait_until(lambda: not processes_of(tether.pid), 10)
    tether.wait()
    Path(directory).rmdir()


def test_the_tether_removes_the_temporary_files_of_its_command(tmp_path: Path) -> None:
    code = """
import mmap, os, tempfile, time
path = f"/dev/shm/sglang_loads_{os.getpid()}"
with open(path, "wb+") as file:
    file.write(b"x" * 4096)
    file.flush()
    kept = mmap.mmap(file.fileno(), 4096)
name = tempfile.NamedTemporaryFile(delete=False).name
print(path, name, flush=True)
time.sleep(600)
"""
    with (tmp_path / "log").open("wb") as log:
        tether = server_module._start([sys.executable, "-c", code], {}, log)
    wait_until(lambda: (tmp_path / "log").read_text().count(" "), 30)
    shared, temporary = (tmp_path / "log").read_text().split()
    assert os.path.exists(shared)
    assert os.path.exists(temporary)
    server_module._kill(tether)
    assert not os.path.exists(shared)
    assert not Path(temporary).parent.exists()


@pytest.mark.server
def test_serve_ends_its_server_when_interrupted(tiny_model_dir: Path) -> None:
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "megatron_rl",
        "serve",
        str(tiny_model_dir),
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    serving = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: len(psutil.Process(serving.pid).children(recursive=True)) >= 2, 30)
        group = psutil.Process(serving.pid).children()[0].pid
        serving.send_signal(signal.SIGINT)
        assert serving.wait(10) == 130
        assert not processes_of(group)
    finally:
        serving.kill()
        serving.wait()
