"""Where a leader's groups come from: live servers, or the saved rollouts of another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rl.data.sample import Group, Prompt
from megatron_rl.data.store import StoreError, read_groups
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.routes import RouteSpec
from megatron_rl.rollout.sampler import Sampling, rollout_groups
from megatron_rl.routing.trace import TraceError


def rollout_file(directory: Path, step: int, dp: int) -> Path:
    return directory / f"step-{step:06d}-dp-{dp:04d}.jsonl"


def saved_groups(
    run_dir: Path, step: int, share: int, of: int, *, needs_traces: RouteSpec | None = None
) -> list[Group]:
    """Every `of`-th group of a saved step, whatever layout wrote it.

    With `needs_traces` each sample must have a routing trace of this model. Raises FileNotFoundError for no file, and
    StoreError for a bad one or a sample without its trace.
    """
    files = sorted((run_dir / "rollouts").glob(f"step-{step:06d}-dp-*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"rollout.replay_from: {run_dir / 'rollouts'} has no rollouts of step {step}; train.steps asks for it"
        )
    groups = []
    for file in files:
        mine = [group for group in read_groups(file) if group.index % of == share]
        if needs_traces is not None:
            _check_traces(file, mine, needs_traces)
        groups += mine
    return sorted(groups, key=lambda group: group.index)


def _check_traces(file: Path, groups: Sequence[Group], routes: RouteSpec) -> None:
    for sample in (sample for group in groups for sample in group.samples):
        where = f"{file}: prompt {sample.prompt.id!r} sample {sample.index}: trace"
        if sample.trace is None:
            raise StoreError(
                f"{where}: none is there; routing.replay r3 and routing.observe_rollout need rollouts that were "
                "saved by a run with one of them"
            )
        try:
            routes.check(sample.trace)
        except TraceError as error:
            raise StoreError(f"{where}: {error}") from None


def first_server(dp: int, leaders: int, servers: int) -> int:
    """Where leader number `dp` of `leaders` begins to hand out its groups, so that all of them together reach all."""
    return dp * servers // leaders


class Leader:
    """A data-parallel leader's connections to all servers."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None,
        deadline: float,
        first: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Groups go to the servers in turn from number `first` on: leaders that all began with the same one would leave
        others idle. `check` raises when a server of ours has died: Pool.check_alive, on the rank that has the pool."""
        self.loop = BackgroundLoop()
        self.clients = [
            SGLangClient(url, api_key=api_key, deadline=deadline, check=check) for url in (*urls[first:], *urls[:first])
        ]

    def sample(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
        """Raises RolloutError, and what `check` raises."""
        return self.loop.run(rollout_groups(self.clients, prompts, sampling))

    def close(self) -> None:
        for client in self.clients:
            self.loop.run(client.close())
        self.loop.close()
