"""Turns prompts into judged groups: servers sample responses, and verifiers judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.data.sample import Group, Prompt
from megatron_rl.loop.connections import Servers
from megatron_rl.loop.publisher import Publisher
from megatron_rl.loop.trainer import Trainer
from megatron_rl.rewards import Judges, grade
from megatron_rl.rollout.sampler import Sampling
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
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._servers = servers
        self._publisher = publisher
        self._tokenizer = tokenizer
        self._judges = judges

    def sample(
        self,
        prompts: Sequence[tuple[int, Prompt]],
        *,
        samples: int,
        temperature: float,
        routes: RouteSpec | None = None,
        top_k: int = 0,
    ) -> list[Group]:
        """A group of `samples` responses for each (index, prompt), with routing traces if `routes` says what they look
        like, and with mu's `top_k` most likely tokens. Raises RolloutError, and Interrupted at a signal."""
        assert self._servers.leader is not None
        sampling = Sampling(
            samples=samples,
            max_response_tokens=self._config.max_response_tokens,
            temperature=temperature,
            concurrency=self._config.concurrency,
            vocab_size=self._trainer.policy.arch.vocab_size,
            versions=self._publisher.versions,
            seed=self._trainer.config.seed,
            routes=routes,
            top_k=top_k,
        )
        with self._trainer.watch.wait():
            return self._servers.leader.sample(prompts, sampling)

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with verdicts and the text that was judged. Raises RewardError."""
        return grade(groups, self._decode, self._judges)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)
