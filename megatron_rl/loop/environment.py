"""Turns prompts into judged groups: servers sample responses, and verifiers judge them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.data.sample import Group, Prompt
from megatron_rl.data.versions import Versions
from megatron_rl.disk import writes
from megatron_rl.loop.connections import Servers
from megatron_rl.loop.publisher import Publisher
from megatron_rl.loop.trainer import Trainer
from megatron_rl.rewards import Judges, grade
from megatron_rl.rollout.background import finished, results
from megatron_rl.rollout.ledger import Ledger
from megatron_rl.rollout.sampler import Sampling
from megatron_rl.rollout.source import Leader
from megatron_rl.rollout.turns import MultiTurn
from megatron_rl.routing.wire import RouteSpec


class Environment:
    """Samples from the servers and has answers judged, on the data-parallel leaders."""

    def __init__(
        self,
        config: RolloutConfig,
        trainer: Trainer,
        servers: Servers,
        publisher: Publisher,
        tokenizer: Any,
        judges: Judges,
        *,
        ledger: Ledger,
        routes: RouteSpec | None = None,
        turns: MultiTurn | None = None,
        top_k: int = 0,
    ) -> None:
        """Rollouts, but not evaluations, are kept by `ledger`. They ask for routing traces if `routes` says what they
        look like, and for mu's `top_k` most likely tokens. `turns`: whom the policy talks to; None: it answers once."""
        self._config = config
        self._trainer = trainer
        self._servers = servers
        self._publisher = publisher
        self._tokenizer = tokenizer
        self._judges = judges
        self._ledger = ledger
        self._turns = turns
        self._judging = threading.Lock()  # an evaluation is judged while a rollout goes on
        self._rollout = self._sampling(config.group_size, config.temperature, publisher.versions, routes, top_k)
        self._sampled: list[tuple[Group, asyncio.Future[Group]]] = []
        self._judge_task: asyncio.Task[None] | None = None
        judges.answered = trainer.journal.activity.move

    def start(self, number: int, prompt: Prompt) -> Future[Group]:
        """Begins to sample a group of the run's rollouts, which is judged while others are sampled, unless an earlier
        start of the run has it."""
        if (kept := self._ledger.read(number, prompt)) is not None:
            return finished(kept)
        return self.restart(number, prompt)

    def restart(self, number: int, prompt: Prompt) -> Future[Group]:
        """Begins to sample a group, although the ledger may have it."""
        return self._leader.loop.start(self._group(number, prompt))

    def wait(self, groups: Sequence[Future[Group]]) -> list[Group]:
        """Returns what `start` began. Raises RolloutError, EnvError or RewardError as soon as one group fails, and
        Interrupted at a signal."""
        with self._trainer.watch.wait():
            return results(groups)

    def wait_for_one(self, groups: Sequence[Future[Group]], seconds: float) -> None:
        """Returns once one of the groups is done or has failed, or after so many seconds. Raises Interrupted at a
        signal."""
        with self._trainer.watch.wait():
            concurrent.futures.wait(groups, seconds, concurrent.futures.FIRST_COMPLETED)

    def evaluate(self, prompts: Sequence[tuple[int, Prompt]], *, samples: int, temperature: float) -> list[Group]:
        """Returns a judged group of `samples` responses of the newest weights for each (number, prompt). Raises as
        `wait` does."""
        newest = Versions(self._publisher.versions.newest)
        with self._trainer.watch.wait():
            sampling = dataclasses.replace(self._sampling(samples, temperature, newest), evaluates=True)
            groups = self._leader.sample(prompts, sampling)
        return self.judge(groups)

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with verdicts and the text that was judged. Raises RewardError."""
        with self._judging:
            return grade(groups, self._decode, self._judges)

    @property
    def _leader(self) -> Leader:
        assert self._servers.leader is not None
        return self._servers.leader

    def _sampling(
        self, samples: int, temperature: float, versions: Versions, routes: RouteSpec | None = None, top_k: int = 0
    ) -> Sampling:
        return Sampling(
            samples=samples,
            max_response_tokens=self._config.max_response_tokens,
            temperature=temperature,
            vocab_size=self._trainer.policy.arch.vocab_size,
            versions=versions,
            seed=self._trainer.config.seed,
            routes=routes,
            top_k=top_k,
            turns=self._turns,
        )

    async def _group(self, number: int, prompt: Prompt) -> Group:
        group = await self._leader.group(number, prompt, self._rollout)
        judged: asyncio.Future[Group] = asyncio.get_running_loop().create_future()
        self._sampled.append((group, judged))
        if self._judge_task is None:
            self._judge_task = asyncio.ensure_future(self._judge_sampled())
        return await judged

    async def _judge_sampled(self) -> None:
        """Judges all groups that wait, and then those that have come meanwhile: together they use all workers."""
        while self._sampled:
            waiting, self._sampled = self._sampled, []
            try:
                groups = await asyncio.to_thread(self._judge_and_keep, [group for group, _ in waiting])
            except Exception as error:
                for _, judged in waiting:
                    if not judged.done():
                        judged.set_exception(error)
            else:
                for (_, judged), group in zip(waiting, groups, strict=True):
                    if not judged.done():
                        judged.set_result(group)
        self._judge_task = None

    def _judge_and_keep(self, groups: Sequence[Group]) -> list[Group]:
        judged = self.judge(groups)
        for group in judged:
            with writes(f"the group of prompt {group.prompt.id!r}", self._trainer.run.pending):
                self._ledger.write(group)
        return judged

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
