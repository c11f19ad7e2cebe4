"""Two nodes on this machine: network namespaces with a cable between them, an address and a host name each."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

SECONDS = 240.0


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str:
    """Returns why this machine cannot make namespaces; empty if it can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "iproute2 or util-linux is not installed"
    try:
        with two_nodes():
            return ""
    except OSError as error:
        return f"namespaces cannot be made: {error}"


@dataclass
class Node:
    """One namespace."""

    name: str
    address: str
    cable: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, words: Sequence[str | Path], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Starts a process whose host is called like its address. Its output goes to `log`."""
        named = 'hostname "$0" && exec "$@"'
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", named, self.address]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*inside, *map(str, words)], env=dict(environment), stdout=output, stderr=subprocess.STDOUT
            )
        self.started.append(process)
        return process

    def cut(self) -> None:
        """Takes the cable out. Packets are lost; no connection is told."""
        _ip("-n", self.name, "link", "set", self.cable, "down")

    def kill(self) -> None:
        """Ends all processes of the node at once, and its network first, as when its power is cut."""
        self.cut()
        _kill_all(self)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Makes the namespaces, and ends what runs in them with the context. Raises OSError if it cannot."""
    tag = secrets.token_hex(3)
    net = int(tag[:2], 16)
    nodes = [Node(f"mrl-{tag}-{n}", f"10.213.{net}.{n}", f"mrl{tag}{n}") for n in (1, 2)]
    with ExitStack() as stack:
        for node in nodes:
            _ip("netns", "add", node.name)
            stack.callback(_remove, node)
        _ip("link", "add", nodes[0].cable, "netns", nodes[0].name, "type", "veth",
            "peer", "name", nodes[1].cable, "netns", nodes[1].name)  # fmt: skip
        for node in nodes:
            _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.cable)
            for device in ("lo", node.cable):
                _ip("-n", node.name, "link", "set", device, "up")
        yield nodes[0], nodes[1]


def _remove(node: Node) -> None:
    _kill_all(node)
    for process in node.started:
        process.wait()
    _ip("netns", "delete", node.name)


def _kill_all(node: Node) -> None:
    for pid in _ip("netns", "pids", node.name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def ended(process: subprocess.Popen[bytes], seconds: float, log: Path) -> int:
    """Waits for a process and returns its status."""
    deadline = time.monotonic() + seconds
    while (status := process.poll()) is None:
        assert time.monotonic() < deadline, f"still running after {seconds:g} s\n{log.read_text()[-6000:]}"
        time.sleep(0.05)
    return status
