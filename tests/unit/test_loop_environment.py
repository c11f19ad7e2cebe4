"""What the environment asks the servers for."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

from megatron_rl.config.schema import RolloutConfig
from megatron_rl.data.sample import Prompt
from megatron_rl.loop.environment import Environment
from megatron_rl.rollout.sampler import Sampling, request_seed


def asked(seed: int) -> Sampling:
    """Returns what is sampled with the configuration's seed; servers and trainer are stand-ins."""
    found: list[Sampling] = []
    trainer: Any = SimpleNamespace(
        config=SimpleNamespace(seed=seed),
        policy=SimpleNamespace(arch=SimpleNamespace(vocab_size=20)),
        watch=SimpleNamespace(wait=contextlib.nullcontext),
    )
    leader = SimpleNamespace(sample=lambda prompts, sampling: found.append(sampling))
    servers: Any = SimpleNamespace(leader=leader, check=lambda: None)
    publisher: Any = SimpleNamespace(versions=frozenset({3}))
    judges: Any = None
    config = RolloutConfig(prompts_per_step=1, max_response_tokens=7)
    environment = Environment(config, trainer, servers, publisher, None, judges)
    environment.sample([(0, Prompt("", "", (1,), "", ""))], samples=4, temperature=0.5, top_k=2)
    return found[0]


def test_the_environment_samples_as_the_configuration_says() -> None:
    sampling = asked(5)
    assert (sampling.samples, sampling.temperature, sampling.top_k) == (4, 0.5, 2)
    assert (sampling.max_response_tokens, sampling.vocab_size, sampling.versions) == (7, 20, {3})


def test_runs_with_different_seeds_send_different_request_seeds() -> None:
    """They count on servers with deterministic inference."""
    assert request_seed(asked(5), 0, 0) == request_seed(asked(5), 0, 0) != request_seed(asked(6), 0, 0)
