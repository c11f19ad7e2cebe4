"""The rollout batch of each step, from live servers or from another run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import orjson

from megatron_rl.config.dynamic_sampling import DynamicSamplingConfig
from megatron_rl.config.schema import Config
from megatron_rl.data.prompts import PromptCursor, PromptDataset
from megatron_rl.data.sample import Group
from megatron_rl.data.step_files import rollout_file
from megatron_rl.data.store import write_groups
from megatron_rl.errors import UserError
from megatron_rl.lab.journal import reduce_metrics
from megatron_rl.lab.metrics import ROLLOUT, overlong_metrics, rollout_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.loop.environment import Environment
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.quota import Quota, prompts_ahead
from megatron_rl.loop.trainer import Trainer
from megatron_rl.ranks.collectives import all_gather_bytes, together
from megatron_rl.rewards.shaping import filter_overlong, shape_rewards, without_lost
from megatron_rl.rollout.background import finished
from megatron_rl.rollout.dynamic import Search, Tally, check_verdicts
from megatron_rl.rollout.flow import Flow
from megatron_rl.rollout.ledger import Ledger, is_of_age
from megatron_rl.rollout.selection import after_taking, untaken
from megatron_rl.rollout.source import Wanted, saved_groups
from megatron_rl.routing.wire import RouteSpec
from megatron_rl.stop import Interrupted


@dataclass(frozen=True)
class RolloutBatch:
    """What one step trains on."""

    groups: list[Group]
    """This leader's share, with shaped rewards; [] on ranks that lead no replica."""
    metrics: dict[str, float]
    """Metrics of all ranks' groups, under rollout/."""


@dataclass(frozen=True)
class Drawn:
    """This leader's groups of one step, with the verifiers' own verdicts."""

    sampled: list[Group]
    kept: list[Group]
    """Groups to train on."""
    figures: dict[str, float]
    """How they were chosen, the same on every rank."""


class GroupSource(Protocol):
    saves: bool
    """Whether this rank writes the groups to the run's own rollouts."""

    def draw(self, progress: Progress) -> Drawn:
        """Draws the next step's groups, and notes in the progress which prompts are taken. Raises UserError and
        Interrupted on all ranks."""


class Rollouts:
    def __init__(self, config: Config, trainer: Trainer, source: GroupSource) -> None:
        self._config = config
        self._trainer = trainer
        self._source = source

    def next(self, progress: Progress) -> RolloutBatch:
        """The rollout batch of the next step. Collective.

        Raises UserError, on every rank and with a checkpoint of the steps before, if there is none, and Stopped if the
        run is to stop: a resume then samples the groups of this step again.
        """
        drawn = self._draw(progress)
        self._save(drawn.kept, progress.step)
        config, trainer = self._config, self._trainer
        longest = config.rollout.max_response_tokens
        metrics = MetricAccumulator(ROLLOUT)
        rollout_metrics(metrics, shape_rewards(drawn.sampled, config.reward, longest), progress.step)
        overlong_metrics(metrics, drawn.sampled, drawn.kept, config.reward, longest)
        figures = dict(drawn.figures)
        figures |= reduce_metrics(metrics, trainer.place, holds_samples=trainer.place.leads_replica)
        shaped = shape_rewards(without_lost(drawn.kept), config.reward, longest)
        return RolloutBatch(
            filter_overlong(shaped, config.reward), {f"rollout/{name}": value for name, value in figures.items()}
        )

    def _draw(self, progress: Progress) -> Drawn:
        start = progress.cursor, progress.taken
        try:
            return self._source.draw(progress)
        except (UserError, Interrupted) as error:
            progress.cursor, progress.taken = start
            self._trainer.checkpoints.save(progress.state)
            self._trainer.checkpoints.complete()
            if isinstance(error, Interrupted):
                self._trainer.watch.stop_if_asked(progress.step, progress.steps)
            raise

    def _save(self, groups: Sequence[Group], step: int) -> None:
        """Writes the groups with the verifiers' own verdicts: a run that replays them shapes them by its own rules."""
        trainer = self._trainer
        file = rollout_file(trainer.run.rollouts, step + 1, trainer.place.dp)
        with trainer.writing(f"the rollout of step {step + 1}", file):
            if self._source.saves:
                write_groups(
                    file,
                    groups,
                    weight_version=step,
                    temperature=self._config.rollout.temperature,
                    vocab_size=trainer.policy.arch.vocab_size,
                    files=trainer.layout.dp,
                )


class SavedGroups:
    """The groups that another run saved."""

    saves = False

    def __init__(self, config: Config, trainer: Trainer, routes: RouteSpec | None) -> None:
        """`routes`: what each sample's routing trace must look like; None if traces are not needed."""
        assert config.rollout.replay_from is not None
        self._run_dir = config.rollout.replay_from
        self._wanted = Wanted.of(config, trainer.policy.arch.vocab_size)
        self._trainer = trainer
        self._routes = routes

    def draw(self, progress: Progress) -> Drawn:
        place, dp = self._trainer.place, self._trainer.layout.dp
        groups: list[Group] = []
        with together(place.control):
            if place.leads_replica:
                step = progress.step + 1
                groups = saved_groups(self._run_dir, step, place.dp, dp, wanted=self._wanted, needs_traces=self._routes)
        return Drawn(groups, groups, {})


class LiveGroups:
    """Groups that the servers sample, some rounds of them under dynamic sampling."""

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        environment: Environment,
        prompts: PromptDataset | None,
        ledger: Ledger,
    ) -> None:
        """`prompts`: None on ranks that lead no replica."""
        self.saves = prompts is not None
        self._config = config.rollout
        self._trainer = trainer
        self._environment = environment
        place, dp = trainer.place, trainer.layout.dp
        self._flow = None if prompts is None else Flow(prompts, environment.start, place.dp, dp)
        self._quota = None
        if config.rollout.over_sampling is not None:
            self._quota = Quota(config.rollout, trainer, environment, ledger, self._flow)
        if (flow := self._flow) is not None:
            trainer.checkpoints.when_whole = lambda state: ledger.forget(
                flow.number(PromptCursor(**state.cursor)), state.taken, step=state.step
            )

    def draw(self, progress: Progress) -> Drawn:
        if self._config.dynamic_sampling is None:
            groups = self._sample(progress, self._config.prompts_per_step)
            check_verdicts(self._all_tallies(groups))
            return Drawn(groups, groups, self._quota_figures(progress))
        sampled, search = self._search(progress, self._config.dynamic_sampling)
        figures = {f"dynamic_sampling/{name}": value for name, value in search.figures().items()}
        return Drawn(sampled, search.keep(sampled), figures | self._quota_figures(progress))

    def _search(self, progress: Progress, config: DynamicSamplingConfig) -> tuple[list[Group], Search]:
        """All groups that this leader sampled until all leaders together had enough mixed ones. Collective."""
        search = Search(config, self._config.prompts_per_step)
        groups: list[Group] = []
        while count := search.next_count():
            judged = self._sample(progress, count, first=len(search.tallies))
            groups += judged
            with self._trainer.journal.phase("rollout"):
                search = search.after(self._all_tallies(judged))
            check_verdicts(search.tallies)
        return groups, search

    def _all_tallies(self, groups: Sequence[Group]) -> list[Tally]:
        mine = orjson.dumps([dataclasses.astuple(Tally.of(group)) for group in groups])
        parts = all_gather_bytes(mine, self._trainer.place.control)
        return [Tally(*row) for part in parts for row in orjson.loads(part)]

    def _sample(self, progress: Progress, count: int, first: int = 0) -> list[Group]:
        """This leader's share of `count` prompts, sampled, judged and numbered from `first` on; [] on ranks that lead
        no replica. Raises Interrupted, on every rank, if a signal came meanwhile. Collective."""
        numbers = None
        if self._quota is not None:
            numbers = self._quota.choose(progress, count, first)
        groups: list[Group] = []
        with together(self._trainer.place.control), contextlib.suppress(Interrupted):
            if self._flow is not None:
                groups = self._take(self._flow, progress, numbers, count, first)
        self._trainer.check_interrupted()
        return groups

    def _next(self, flow: Flow, progress: Progress, count: int) -> list[int]:
        """Starts the next `count` prompts and those of the steps after this one that may begin now, and returns the
        numbers of the next ones."""
        in_flight = count + prompts_ahead(self._config, progress)
        flow.admit(progress.cursor, progress.taken, in_flight, progress.step)
        return untaken(flow.number(progress.cursor), progress.taken, count)

    def _take(
        self, flow: Flow, progress: Progress, numbers: Sequence[int] | None, count: int, first: int
    ) -> list[Group]:
        """Returns the groups of these numbers, or of the next `count` ones."""
        with self._trainer.journal.phase("rollout"):
            if numbers is None:
                numbers = self._next(flow, progress, count)
            groups = self._environment.wait(flow.take(numbers))
            groups = self._environment.wait([self._of_age(group, progress.step) for group in groups])
        number, progress.taken = after_taking(flow.number(progress.cursor), progress.taken, numbers)
        progress.cursor = flow.cursor(number, progress.cursor.seed)
        places = {number: place for place, number in enumerate(numbers, first)}
        return [dataclasses.replace(group, index=places[group.index]) for group in groups]

    def _of_age(self, group: Group, version: int) -> Future[Group]:
        """Returns the group, or samples it again if a start of the run before this one has left it too old or new."""
        if is_of_age(group, version, self._config.lag):
            return finished(group)
        return self._environment.restart(group.index, group.prompt)

    def _quota_figures(self, progress: Progress) -> dict[str, float]:
        return {} if self._quota is None else self._quota.figures(progress.step)
