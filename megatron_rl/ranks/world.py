"""Reads the world of ranks from the launcher's environment variables. Imports no torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.errors import UserError

MAX_RANKS = 1_000_000


class WorldError(UserError):
    """The launcher's environment variables are malformed or contradict one another."""


@dataclass(frozen=True)
class World:
    """This rank's number and host among the processes that were started together."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Ranks on this machine."""
    joined: bool
    """Whether a launcher gave this process a rank. Without a launcher the world has one rank."""
    node: str
    """Name of the node. Its ranks see the same files and are ended together."""
    host: str

    @property
    def me(self) -> str:
        """The rank and its host, for error messages."""
        return f"rank {self.rank} on host {self.host}"


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, and for several ranks MASTER_ADDR and MASTER_PORT.

    Raises WorldError, which names the variable, its value and what was expected.
    """
    joined = "RANK" in environment
    size = _number(environment, "WORLD_SIZE", 1, 1, MAX_RANKS)
    rank = _number(environment, "RANK", 0, 0, size - 1, f", as WORLD_SIZE is {size}")
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1, 1, size, f", as WORLD_SIZE is {size}")
    local_rank = _number(environment, "LOCAL_RANK", 0, 0, MAX_RANKS)
    if joined and size > 1:
        _number(environment, "MASTER_PORT", None, 1, 65535)
        if not environment.get("MASTER_ADDR", "").strip():
            raise WorldError(f"MASTER_ADDR is not set, but WORLD_SIZE is {size}; {_ADVICE}")
    host = socket.gethostname()
    # torchrun numbers its agents. Without it, ranks that know their place on the machine share it.
    node = environment.get("GROUP_RANK") or (host if "LOCAL_RANK" in environment else f"rank {rank}")
    return World(rank, size, local_rank, local_size, joined, node, host)


_ADVICE = "start the ranks with torchrun, which sets it, or unset the launcher's variables to run one rank alone"


def _number(environment: Mapping[str, str], name: str, default: int | None, low: int, high: int, why: str = "") -> int:
    text = environment.get(name)
    if text is None:
        if default is None:
            raise WorldError(f"{name} is not set, but WORLD_SIZE is above 1; {_ADVICE}")
        return default
    # isdecimal accepts digits of other scripts, and int() accepts spaces, signs and underscores.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and low <= int(text) <= high):
        raise WorldError(
            f"the environment variable {name} is {text[:40]!r}; expected an integer from {low} to {high}{why}; "
            f"{_ADVICE}"
        )
    return int(text)
