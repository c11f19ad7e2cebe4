"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with files and ports of their own."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_rl.rollout.server import free_ports

NODES = ("127.0.0.2", "127.0.0.3")
"""Names of the nodes, which are their addresses too: a node's name must be one that the others can reach."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SECONDS = 30.0

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SelectType=select/cons_tres
JobRequeue=1
KillWait=5
MinJobAge=300
ReturnToService=2
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if _find(name) is None]


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class SlurmCluster:
    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        """`root` is an empty directory; jobs have `environment`."""
        self.root = root
        self.environment = {**environment, "SLURM_CONF": str(root / "slurm.conf")}

    def tell(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Runs a command of Slurm and returns what it prints."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """Returns the fields of `scontrol show job`."""
        pairs = (word.partition("=") for word in self.tell("scontrol", "show", "job", job).split())
        return {name: value for name, _, value in pairs}

    @contextmanager
    def running(self) -> Iterator[SlurmCluster]:
        """Starts the daemons, and ends them with the context."""
        controller, *ports = free_ports(1 + len(NODES))
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(mode=0o755)
        lines = (
            f"NodeName={node} NodeAddr={node} Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        (self.root / "slurm.conf").write_text(
            CONF.format(
                controller=controller,
                user=getpass.getuser(),
                root=self.root,
                nodes="\n".join(lines),
                names=",".join(NODES),
            )
        )
        with ExitStack() as stack:
            munge = self.root / "munge"
            (munge / "key").write_bytes(secrets.token_bytes(128))
            (munge / "key").chmod(0o600)
            files = ("--key-file=key", "--socket=socket", "--log-file=log", "--pid-file=pid", "--seed-file=seed")
            own = [f"{option}={munge / name}" for option, _, name in (file.partition("=") for file in files)]
            self._start(stack, ["munged", "--foreground", "--force", *own])
            _wait(lambda: (munge / "socket").exists())
            self._start(stack, ["slurmctld", "-D"])
            for node in NODES:
                self._start(stack, ["slurmd", "-D", "-N", node])
            _wait(lambda: self.tell("sinfo", "--noheader", "--Node", "--format=%t").split() == ["idle"] * len(NODES))
            stack.callback(self._cancel_all)
            yield self

    def _cancel_all(self) -> None:
        """Ends all jobs with their processes, which would outlive the daemons."""
        self.tell("scancel", "--user", getpass.getuser())
        _wait(lambda: not self.tell("squeue", "--noheader").strip())

    def _start(self, stack: ExitStack, words: Sequence[str]) -> None:
        program = _find(words[0])
        assert program is not None
        with (self.root / f"{words[0]}-{words[-1]}.out".replace("/", "_")).open("wb") as output:
            process = subprocess.Popen(
                [program, *words[1:]], env=self.environment, stdout=output, stderr=subprocess.STDOUT
            )

        def end() -> None:
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        stack.callback(end)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            if condition():
                return
        except AssertionError:  # the controller does not listen yet
            pass
        assert time.monotonic() < deadline, "Slurm does not do what it should"
        time.sleep(0.1)
