"""Patches of runs that share their GPUs in turns; they are passed as `before` to Forks.start."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretended_gpu import pretended_gpu


def record_turns(folder: str, slow: float = 0.0) -> None:
    """Moves memory as on a GPU in a run, and writes what servers and trainer do into a file for each rank. Ranks after
    the first take `slow` seconds to free anything."""
    from megatron_rl.loop import gpu_turns as turns
    from megatron_rl.rollout.client import SGLangClient

    rank = int(os.environ.get("RANK", 0))
    file = Path(folder) / f"rank-{rank}"

    def note(what: str, begun: float) -> None:
        with file.open("a") as opened:
            opened.write(json.dumps([what, begun, time.monotonic()]) + "\n")

    def on_gpu(call: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def run(network: Any, kind: Any) -> None:
            begun = time.monotonic()
            if rank and call.__name__ == "offload":
                time.sleep(slow)
            with pretended_gpu(network):
                call(network, kind)
            note(f"{call.__name__} {kind}", begun)

        return run

    for call in (turns.offload, turns.restore):
        setattr(turns, call.__name__, on_gpu(call))
    calls = ("pause_generation", "continue_generation", "release_memory", "resume_memory")
    for name in (*calls, "abandon_weight_update", "end_weight_update"):
        _record(SGLangClient, name, note)


def resume_twice() -> None:
    """Has servers take the memory of their caches although they hold it."""
    from megatron_rl.rollout.client import SGLangClient

    resume = SGLangClient.resume_memory

    async def twice(self: Any, tags: Any) -> None:
        await resume(self, tags)
        await resume(self, tags)

    SGLangClient.resume_memory = twice  # type: ignore[method-assign]


def _record(client: Any, name: str, note: Callable[[str, float], None]) -> None:
    method = getattr(client, name)

    async def recorded(self: Any, *arguments: Any) -> Any:
        begun = time.monotonic()
        try:
            return await method(self, *arguments)
        finally:
            note(" ".join([name, *(",".join(a) if isinstance(a, list) else a for a in arguments)]), begun)

    setattr(client, name, recorded)
