"""Options of a server in tests."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.rollout.server import ServerOptions, free_ports


def options(model: Path = Path("/models/tiny"), **changes: object) -> ServerOptions:
    """Returns options of a server with one thread on a CPU, at a free port."""
    (port,) = free_ports(1)
    return ServerOptions(**{"model": model, "port": port, "device": "cpu", "threads": 1, **changes})  # type: ignore[arg-type]
