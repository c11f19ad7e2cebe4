"""Starts stock SGLang servers: the command for each kind of device, and a supervised server."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import httpx
import psutil

from megatron_rl.config.server_flags import SERVE_FLAGS, flag_value, flags_among
from megatron_rl.config.servers import cache_tokens, cpu_problem, is_loopback
from megatron_rl.cores import usable_cores
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import read_architecture, refuse_unserved
from megatron_rl.models.fields import ModelError
from megatron_rl.rollout.sglang_launch import KEY_VARIABLE
from megatron_rl.rollout.transport import KEEP_ALIVE_SECONDS
from megatron_rl.routing.wire import SERVER_FLAG

LOADER = "megatron_rl.weights.delta_loader.load_delta"
"""Writes changed elements of weights into a server (weights.route delta). Every server of ours has it."""
LOG_TAIL_LINES = 30
LOG_LINE_WIDTH = 300  # SGLang prints all its arguments in one line of 15,000 characters
PORTS = range(20000, 32000)  # below Linux's ephemeral ports, which any outgoing connection may take
STOP_SECONDS = 30.0

# With these variables of the trainer's ranks, the server would join the trainer's process group, or wait for it.
TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
)


class ServerError(UserError):
    """A server did not start, or has died. Shows the end of its log."""


@dataclass(frozen=True)
class ServerOptions:
    """Settings of a server; see ServersConfig."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 30000
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # auto, fp32, bf16
    tp: int = 1
    first_gpu: int = 0  # the server takes `tp` GPUs from this one on
    memory_saver: bool = False  # it can give a GPU's memory back for a time; a CPU's is not
    max_total_tokens: int | None = None  # None: SGLang's choice on a GPU, CPU_TOKENS on a CPU
    max_running_requests: int = 256
    threads: int | None = None  # cores of a server on a CPU, over all its ranks; None: all
    seed: int = 0
    return_routed_experts: bool = False  # return the experts that each token visited, if a request asks
    extra_flags: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)  # required of every client; None: no key is required


def sglang_command(options: ServerOptions, has_gpu: bool) -> tuple[list[str], dict[str, str]]:
    """Returns argv and additional environment variables.

    On a GPU the command is stock SGLang with stock flags, through rollout.sglang_launch. On a CPU it is SGLang's CPU
    engine in plain PyTorch, through rollout.sglang_cpu.
    """
    on_cpu = _on_cpu(options, has_gpu)
    flags = {
        "--model-path": str(options.model),
        "--host": options.host,
        "--port": str(options.port),
        "--dtype": {"fp32": "float32", "bf16": "bfloat16", "auto": "auto"}[options.dtype],
        "--tp": str(options.tp),
        "--max-running-requests": str(options.max_running_requests),
        "--random-seed": str(options.seed),
        "--grammar-backend": "none",
        "--custom-weight-loader": LOADER,
        "--log-level-http": "warning",  # otherwise every request is logged
    }
    if (tokens := cache_tokens(options.max_total_tokens, on_cpu=on_cpu)) is not None:
        flags["--max-total-tokens"] = str(tokens)
    environment = {
        "SGLANG_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_SECONDS),
        "HF_HUB_OFFLINE": "1",  # SGLang would ask the hub although the model is a directory
        # By default torch uses TMPDIR, which is removed with the server.
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        or f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",
    }
    if options.api_key is not None:
        environment[KEY_VARIABLE] = options.api_key
    if is_loopback(options.host) and sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if on_cpu:
        # If the CPU has AMX, SGLang would choose AMX kernels for attention, which are not installed.
        flags |= {"--device": "cpu", "--attention-backend": "torch_native"}
        environment |= _cpu_environment(options)
    else:
        if options.first_gpu:
            flags["--base-gpu-id"] = str(options.first_gpu)
        if options.return_routed_experts or SERVER_FLAG in options.extra_flags:
            # On sm100 SGLang 0.5.23 may take experts that choose by themselves, and records no route.
            flags["--moe-runner-backend"] = "triton"
    module = "megatron_rl.rollout.sglang_cpu" if on_cpu else "megatron_rl.rollout.sglang_launch"
    arguments = [part for pair in flags.items() for part in pair]
    # An idle scheduler polls; on a CPU it would take a core from the trainer.
    switches = ["--sleep-on-idle"] if on_cpu else []
    if options.memory_saver and not on_cpu:
        switches.append("--enable-memory-saver")
    if options.return_routed_experts:
        switches.append(SERVER_FLAG)
    # -P: never import modules from the directory in which the trainer was started.
    return [sys.executable, "-P", "-m", module, *arguments, *switches, *options.extra_flags], environment


def _check_model(model: Path, *, on_cpu: bool) -> None:
    """Raises a UserError for a model that this project trains and that SGLang would not serve, or not rightly."""
    try:
        arch = read_architecture(model)
    except ModelError:  # SGLang has more of them
        return
    refuse_unserved(model, arch)
    if on_cpu and (problem := cpu_problem(arch)):
        raise ServerError(f"serve: {problem}; start it on a GPU")


def _on_cpu(options: ServerOptions, has_gpu: bool) -> bool:
    return options.device == "cpu" or (options.device == "auto" and not has_gpu)


def _cpu_environment(options: ServerOptions) -> dict[str, str]:
    per_rank = max(1, (options.threads or usable_cores()) // options.tp)
    environment = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # SGLang asks torch for GPUs too, whatever --device says
        "TORCHDYNAMO_DISABLE": "1",  # its compiled helpers need a C++ compiler and gain nothing here
        "OMP_NUM_THREADS": str(per_rank),
    }
    if options.tp > 1:
        # SGLang refuses more ranks than NUMA nodes unless told each rank's cores; without AMX it does not bind them.
        cores = (f"{rank * per_rank}-{(rank + 1) * per_rank - 1}" for rank in range(options.tp))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    return environment


def serve(options: ServerOptions) -> int:
    """Runs a server in the foreground until it ends or is interrupted; returns its exit status.

    Raises ServerError for forbidden flags, and if other machines would reach the server without a key.
    """
    _check_serve(options)
    has_gpu = _gpus() > 0
    _check_model(options.model, on_cpu=_on_cpu(options, has_gpu))
    require_sglang(on_cpu=_on_cpu(options, has_gpu))
    command, environment = sglang_command(options, has_gpu)
    server = _start(command, environment, output=None)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        _kill(server)


def shown_command(options: ServerOptions) -> str:
    """Returns the command of `serve` as a shell reads it, without the key; nothing is started, SGLang is not needed.

    Raises as `serve` does, but not if SGLang is missing.
    """
    _check_serve(options)
    has_gpu = _gpus() > 0
    _check_model(options.model, on_cpu=_on_cpu(options, has_gpu))
    command, environment = sglang_command(options, has_gpu)
    environment.pop(KEY_VARIABLE, None)
    return shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command])


def _check_serve(options: ServerOptions) -> None:
    for flag in flags_among(options.extra_flags, tuple(SERVE_FLAGS)):
        raise ServerError(f"serve: {flag} cannot be given: {SERVE_FLAGS[flag]}")
    if options.api_key is None and not is_loopback(options.host):
        raise ServerError(
            f"serve: --host {options.host} lets other machines in, and whoever reaches an SGLang server without a key "
            "may change its weights and write files; name an environment variable that holds one: --api-key-env NAME"
        )


class Server:
    """A launched server. It ends with all its processes, even if the trainer is killed."""

    def __init__(self, options: ServerOptions, log: Path) -> None:
        """Starts the server and returns before it answers. Its output is appended to `log`."""
        gpus = 0 if options.device == "cpu" else _gpus()
        require_sglang(on_cpu=_on_cpu(options, gpus > 0))
        if options.memory_saver and not _on_cpu(options, gpus > 0):
            _require_memory_saver()
        _check_gpus(options, gpus)
        self.options = options
        self.url = f"http://{options.host}:{options.port}"
        self.log = log
        self.has_answered = False
        self._started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = _start(*sglang_command(options, gpus > 0), output)

    @property
    def pid(self) -> int:
        """Leader of the process group that holds all the server's processes."""
        return self._process.pid

    @property
    def age(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self._started

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_ready(self, timeout_seconds: float) -> None:
        """Waits until the server answers. Raises ServerError if it dies or does not answer in time."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                if httpx.get(self.url + "/health", timeout=5.0, trust_env=False).status_code == 200:
                    self.has_answered = True
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.3)
        raise ServerError(self._explain(f"did not answer within {timeout_seconds:g} s, rollout.servers.start_timeout"))

    def check_alive(self) -> None:
        """Raises ServerError if the server has died."""
        if not self.is_alive():
            raise ServerError(self._explain(f"ended with status {self._process.returncode}"))

    def stop(self) -> None:
        """Kills all processes of the server; it has nothing to save."""
        _kill(self._process)

    def _explain(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        tail = "\n".join("  " + line[:LOG_LINE_WIDTH] for line in lines)
        return f"the SGLang server at {self.url} {what}; the end of its log {self.log}:\n{tail}"


def free_ports(count: int) -> list[int]:
    """Different ports on which nothing listens.

    Another process may still take a port before the server does; then the server ends, and its log says so.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ServerError(f"fewer than {count} free ports in {PORTS.start}..{PORTS.stop - 1}")


def _start(command: list[str], environment: dict[str, str], output: BinaryIO | None) -> subprocess.Popen[bytes]:
    inherited = {name: value for name, value in os.environ.items() if name not in TORCHRUN_VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "megatron_rl.rollout.tether", *command],
        env={**inherited, **environment},
        stdin=subprocess.PIPE,  # never written to; see megatron_rl.rollout.tether
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def _kill(server: subprocess.Popen[bytes]) -> None:
    """Closes the tether, which kills the server's process group and cleans up; waits until no process runs."""
    deadline = time.monotonic() + STOP_SECONDS
    if server.stdin is not None:
        server.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_SECONDS / 2)
    # Kill the rest of the group too, because the tether itself may have been killed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    while _runs(server.pid) and time.monotonic() < deadline:
        time.sleep(0.05)


def _runs(group: int) -> bool:
    """Whether a process of the group runs. Zombies do not count: init should reap them, and may not."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_gpus(options: ServerOptions, gpus: int) -> None:
    """Raises ServerError if GPUs are missing. SGLang would log `invalid device ordinal` minutes later."""
    end = options.first_gpu + options.tp
    if 0 < gpus < end and flag_value(options.extra_flags, "--base-gpu-id") is None:
        raise ServerError(
            f"rollout.servers: a server needs GPUs {options.first_gpu} to {end - 1} (the first are the trainer's), but "
            f"this machine has {gpus}; lower launch or tp, give urls of servers elsewhere, or share GPUs: in turns by "
            "colocate: true, or at the same time with extra_flags: [--base-gpu-id=N, --mem-fraction-static=X] and "
            "weights.route: disk"
        )


def _require_memory_saver() -> None:
    if importlib.util.find_spec("torch_memory_saver") is None:
        raise ServerError(
            "rollout.servers.colocate: true needs SGLang's package torch_memory_saver, which is not installed; install "
            "it, or set it to false"
        )


def require_sglang(on_cpu: bool) -> None:
    if importlib.util.find_spec("sglang") is None:
        raise ServerError(
            "sglang is not installed here; install the extra [sglang], or give servers by rollout.servers.urls"
        )
    if not on_cpu and importlib.util.find_spec("sgl_kernel") is None:
        raise ServerError(
            "sglang is installed here without its GPU kernels (sgl_kernel), as `make install` does, but the server is "
            "to run on a GPU; set engine.device to cpu (serve: --device cpu), or install the extra [sglang]"
        )
