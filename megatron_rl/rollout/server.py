"""Stock SGLang servers: the command that starts one on each kind of device, and a server that the trainer supervises."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from megatron_rl.errors import UserError

LOG_TAIL_LINES = 30
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ServerError(UserError):
    """A server that did not start, or died; carries the end of its log."""


@dataclass(frozen=True)
class ServerOptions:
    """What a launched server is started with; see ServersConfig."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 30000
    device: str = "auto"
    dtype: str = "auto"  # auto, fp32, bf16
    tp: int = 1
    max_total_tokens: int = 65536
    max_running_requests: int = 256
    threads: int | None = None  # cores for a server on a CPU; None: all
    seed: int = 0
    extra_flags: tuple[str, ...] = ()


def sglang_command(options: ServerOptions, has_gpu: bool) -> tuple[list[str], dict[str, str]]:
    """(argv, additional environment). On a GPU it is stock SGLang with stock flags; on a CPU its CPU engine in plain
    PyTorch, through megatron_rl.rollout.sglang_cpu."""
    on_cpu = options.device == "cpu" or (options.device == "auto" and not has_gpu)
    dtype = {"fp32": "float32", "bf16": "bfloat16", "auto": "auto"}[options.dtype]
    flags = {
        "--model-path": str(options.model),
        "--host": options.host,
        "--port": str(options.port),
        "--dtype": dtype,
        "--tp": str(options.tp),
        "--max-total-tokens": str(options.max_total_tokens),
        "--max-running-requests": str(options.max_running_requests),
        "--random-seed": str(options.seed),
    }
    environment = {"HF_HUB_OFFLINE": "1"}
    module = "sglang.launch_server"
    switches = ["--skip-server-warmup"]
    if on_cpu:
        module = "megatron_rl.rollout.sglang_cpu"
        flags |= {
            "--device": "cpu",
            "--attention-backend": "torch_native",
            "--sampling-backend": "pytorch",
            "--grammar-backend": "none",
            "--mem-fraction-static": "0.3",
        }
        switches.append("--disable-cuda-graph")
        threads = options.threads or os.cpu_count() or 1
        per_rank = max(1, threads // options.tp)
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": str(per_rank),
        }
        if options.tp > 1:
            bound = (f"{rank * per_rank}-{(rank + 1) * per_rank - 1}" for rank in range(options.tp))
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(bound)
    arguments = [part for pair in flags.items() for part in pair]
    return [sys.executable, "-m", module, *arguments, *switches, *options.extra_flags], environment


def serve(options: ServerOptions) -> int:
    """Runs a server in the foreground until it is interrupted; returns its exit status."""
    _require_sglang()
    command, environment = sglang_command(options, _has_gpu())
    process = subprocess.Popen(command, env={**os.environ, **environment}, preexec_fn=_die_with_parent)
    try:
        return process.wait()
    except KeyboardInterrupt:
        _end(process.pid)
        return 130


class Server:
    """A server of our own: started, watched, and ended with all its processes, also when the trainer is killed."""

    def __init__(self, options: ServerOptions, log: Path) -> None:
        _require_sglang()
        if not (options.model / "config.json").is_file():
            raise ServerError(f"{options.model}: no config.json; expected a Hugging Face model directory")
        self.options = options
        self.url = f"http://{options.host}:{options.port}"
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        command, environment = sglang_command(options, _has_gpu())
        # Ranks' own variables would make the server join the trainer's world.
        inherited = {k: v for k, v in os.environ.items() if k not in _TORCHRUN_VARIABLES}
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**inherited, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, timeout_seconds: float) -> None:
        """Raises ServerError when the server dies, or does not answer in time."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                if httpx.get(self.url + "/health", timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.3)
        raise ServerError(self._explain(f"did not answer within {timeout_seconds:.0f} s"))

    def check_alive(self) -> None:
        """Raises ServerError when the server has died."""
        if not self.is_alive():
            raise ServerError(self._explain(f"ended with status {self._process.returncode}"))

    def stop(self) -> None:
        _end(self._process.pid)
        self._process.wait()

    def _explain(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"the SGLang server at {self.url} {what}; the end of its log {self.log}:\n" + "\n".join(lines)


def free_ports(count: int) -> list[int]:
    """Ports that are free now. SGLang takes a second one, HTTP port + 1000 or so, by itself."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


_TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _require_sglang() -> None:
    import importlib.util

    if importlib.util.find_spec("sglang") is None:
        raise ServerError(
            "sglang is not installed here; install the extra [sglang], or give servers by rollout.servers.urls"
        )


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent dies, however it dies; SGLang then ends its own children."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(pid: int, patience_seconds: float = 10.0) -> None:
    """Ends a process and all its descendants: politely, then not."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=patience_seconds)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=patience_seconds)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
