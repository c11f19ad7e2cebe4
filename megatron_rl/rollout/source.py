"""Where a leader's groups come from: live servers, or the saved rollouts of another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rl.data.sample import Group, Prompt
from megatron_rl.data.store import read_groups
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.sampler import Sampling, rollout_groups


def rollout_file(directory: Path, step: int, dp: int) -> Path:
    return directory / f"step-{step:06d}-dp-{dp:04d}.jsonl"


def saved_groups(run_dir: Path, step: int, share: int, of: int) -> list[Group]:
    """Every `of`-th group of a saved step, whatever layout wrote it. Raises FileNotFoundError for none."""
    files = sorted((run_dir / "rollouts").glob(f"step-{step:06d}-dp-*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"rollout.replay_from: {run_dir / 'rollouts'} has no rollouts of step {step}; train.steps asks for it"
        )
    groups = sorted((g for file in files for g in read_groups(file)), key=lambda g: g.index)
    return [group for group in groups if group.index % of == share]


class Leader:
    """A data-parallel leader's connections to all servers."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None,
        deadline: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`check` raises when a server of ours has died: Pool.check_alive, on the rank that has the pool."""
        self.loop = BackgroundLoop()
        self.clients = [SGLangClient(url, api_key=api_key, deadline=deadline, check=check) for url in urls]

    def sample(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
        """Raises RolloutError, and what `check` raises."""
        return self.loop.run(rollout_groups(self.clients, prompts, sampling))

    def close(self) -> None:
        for client in self.clients:
            self.loop.run(client.close())
        self.loop.close()
