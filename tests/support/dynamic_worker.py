"""RL runs, one after another in one world of ranks, with made-up answers instead of answers from a server.

Each run is a list of overrides; if they contain --resume, it continues from its last checkpoint.

The text of a prompt ends with the number of its right responses. A run that finds too few mixed groups writes each
rank's error and the names of the checkpoints to run_dir/error-RANK. Everything else is the real trainer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tiny_models import CHARACTERS, EOS

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.dynamic import StepError
from megatron_rl.rollout.sampler import Sampling

WRONG = "x"


class MadeUp:
    """Makes up a leader's answers. They depend only on the prompt and the number of the sample."""

    def __init__(self) -> None:
        self.loop = BackgroundLoop()

        self.ejected: dict[str, str] = {}

    def pause(self, *, tell: bool) -> None:
        pass

    resume = pause

    def abandon_requests(self) -> None:
        pass

    async def group(self, number: int, prompt: Prompt, sampling: Sampling) -> Group:
        return Group(number, prompt, tuple(_answer(prompt, n, sampling) for n in range(sampling.samples)))

    def sample(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
        return [self.loop.run(self.group(number, prompt, sampling)) for number, prompt in prompts]


def _answer(prompt: Prompt, number: int, sampling: Sampling) -> Sample:
    """Returns one character, padded to a random length with EOS tokens, which the verifier does not see. A third of all
    responses are truncated."""
    right = number < int(prompt.text.split()[-1])
    rng = np.random.default_rng(zlib.crc32(f"{prompt.id} {number}".encode()))
    longest = sampling.max_response_tokens
    length = min(int(rng.integers(1, longest * 3 // 2)), longest)
    response = [2 + CHARACTERS.index(prompt.answer if right else WRONG), *[EOS] * (length - 1)]
    logprobs = (-rng.random(length)).tolist()
    sample = Sample.start(prompt, number).extend(response, logprobs, sampling.versions.newest)
    if sampling.routes is not None:
        spec, rows = sampling.routes, len(sample.token_ids) - 1
        ids = rng.permuted(np.tile(np.arange(spec.num_experts), (rows, len(spec.moe_layers), 1)), axis=-1)
        trace = RoutingTrace.from_ids(
            ids[..., : spec.top_k],
            layers=spec.moe_layers,
            num_experts=spec.num_experts,
            source="rollout",
            versions=(VersionSpan(sampling.versions.newest, 0, rows),),
        )
        sample = sample.with_trace(trace)
    return dataclasses.replace(sample, finish_reason="length" if length == longest else "stop")


class NoServers:
    """Replaces the weight sync, and the choice of servers."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    newcomers: frozenset[str] = frozenset()

    def leave_out(self, lost: dict[str, str]) -> None:
        pass

    def push(self, version: int) -> dict[str, float]:
        return {}

    def verify_if_due(self, version: int) -> dict[str, float]:
        return {}

    def choose(self, sync: object) -> None:
        pass

    def admit(self, sync: object, *, newcomers: bool) -> None:
        pass

    def close(self) -> None:
        pass


def replace_servers(leader: type[MadeUp] = MadeUp) -> None:
    """Makes runs of this process get answers from `leader`, and push no weights."""
    from megatron_rl.loop import connections, parts, publisher

    parts.connect = lambda _, trainer, __: contextlib.nullcontext(  # type: ignore
        connections.Servers(None, leader() if trainer.place.leads_replica else None)  # type: ignore[arg-type]
    )
    publisher.WeightSync = publisher.Members = NoServers  # type: ignore[assignment,misc]


def main(config_file: Path, runs: list[str]) -> None:
    import torch.distributed as dist

    from megatron_rl.engine.checkpoint import checkpoints
    from megatron_rl.train import train

    replace_servers()
    for overrides in runs:
        keys = [word for word in overrides.split() if word != "--resume"]
        config = load_config(Config, config_file, keys)
        try:
            train(config, resume=len(keys) < len(overrides.split()))
        except StepError as error:
            saved = [path.name for path in checkpoints(config.run_dir / "checkpoints")]
            (config.run_dir / f"error-{dist.get_rank()}").write_text(f"{error}\nsaved: {saved}")
