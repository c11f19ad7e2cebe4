"""Changes of the package in a forked run: `before` of Forks.start calls them."""

from __future__ import annotations

import asyncio
import time
from typing import Any


def slow_steps(seconds: float) -> None:
    """All optimizer steps after the first take so long, and say so."""
    from megatron_rl.loop.trainer import Trainer

    update = Trainer.update
    steps: list[int] = []

    def slow(*arguments: Any, **options: Any) -> Any:
        if steps:
            print("slow step", flush=True)
            time.sleep(seconds)
        steps.append(1)
        return update(*arguments, **options)

    Trainer.update = slow  # type: ignore[method-assign]


def made_up_rollouts(seconds: float = 0.0) -> None:
    """Answers are made up, without servers. With `seconds`, the second rollout takes so long, and says so."""
    from dynamic_worker import MadeUp, replace_servers

    from megatron_rl.rollout.background import BackgroundLoop

    class Leader(MadeUp):
        def __init__(self) -> None:
            self._loop = BackgroundLoop()

        def sample(self, prompts: Any, sampling: Any) -> Any:
            if seconds and max(sampling.versions) == 1:
                print("slow rollout", flush=True)
                self._loop.run(asyncio.sleep(seconds))
            return super().sample(prompts, sampling)

    replace_servers(Leader)


def fault_deep_in_a_library(kind: str) -> None:
    """A fault that the program does not expect."""
    from megatron_rl.ranks import agreement

    def failing(*_: object) -> None:
        raise {"FileNotFoundError": FileNotFoundError, "TypeError": TypeError}[kind]("libdeep.so")

    agreement.local_files = failing  # type: ignore[assignment]
