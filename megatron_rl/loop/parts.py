"""The parts of an RL run on this rank, and how they are opened: files first, servers last."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from megatron_rl.config.schema import Config
from megatron_rl.engine.named_checkpoint import CheckpointName
from megatron_rl.engine.top_exchange import TopExchange
from megatron_rl.lab.run_records import Resume
from megatron_rl.loop.connections import connect
from megatron_rl.loop.environment import Environment
from megatron_rl.loop.evaluator import Evaluator
from megatron_rl.loop.gpu_turns import SAMPLING, GpuTurns
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.publisher import Publisher
from megatron_rl.loop.rollouts import GroupSource, LiveGroups, Rollouts, SavedGroups
from megatron_rl.loop.run_prompts import RunPrompts
from megatron_rl.loop.trainer import Trainer, open_trainer
from megatron_rl.ranks.collectives import together
from megatron_rl.rollout.ledger import Ledger
from megatron_rl.rollout.pool import Pool, PoolOpener
from megatron_rl.rollout.source import check_saved, top_k
from megatron_rl.routing.exchange import RouteExchange
from megatron_rl.routing.wire import RouteSpec


@dataclass(frozen=True)
class Parts:
    config: Config
    trainer: Trainer
    progress: Progress
    rollouts: Rollouts
    publisher: Publisher
    evaluator: Evaluator
    gpu_turns: GpuTurns
    routes: RouteExchange | None
    """Takes the rollout's routing traces to the ranks that replay them; None if they are not needed."""
    tops: TopExchange | None
    """Takes mu's most likely tokens to the ranks that compute the loss; None if they are not needed."""


@contextlib.contextmanager
def open_parts(
    config: Config, resume: Resume, open_pool: PoolOpener = Pool, fork: CheckpointName | None = None
) -> Iterator[Parts]:
    """The run on this rank, its servers opened if need be, resumed or forked from a checkpoint if asked."""
    temperature = config.rollout.temperature
    with (
        open_trainer(config, steps=config.train.steps, resume=resume, fork=fork, temperature=temperature) as trainer,
        ExitStack() as stack,
    ):
        # Before servers are started, and before the run's files are touched.
        with trainer.console.starting("data", _data(config)), together(trainer.place.control):
            prompts = RunPrompts.load(config, trainer.place, trainer.policy.arch.vocab_size)
            if trainer.place.rank == 0:
                check_saved(config, trainer.policy.arch, trainer.resumes_from.step + 1 if trainer.resumes_from else 1)
        stack.callback(prompts.close)
        yield _assemble(config, trainer, prompts, stack, open_pool)


def _data(config: Config) -> str:
    if config.rollout.replay_from is not None:
        return f"saved rollouts of {config.rollout.replay_from}"
    return " and ".join(filter(None, (config.data.train, config.data.heldout)))


def _server_names(config: Config, trainer: Trainer, *, kept: bool) -> str:
    servers = config.rollout.servers
    if servers.are_elsewhere:
        return ", ".join(servers.urls) or str(servers.urls_file)
    where = "kept from one run to the next" if kept else f"with logs in {trainer.run.logs}"
    return f"{servers.launch} of SGLang, {where}"


def _assemble(config: Config, trainer: Trainer, prompts: RunPrompts, stack: ExitStack, open_pool: PoolOpener) -> Parts:
    """Starts or finds the servers. `stack` closes what is opened; servers that run elsewhere are then of use to the
    next run, whatever ended this one. Collective."""
    policy = trainer.policy
    top = top_k(config, policy.arch.vocab_size)
    spec = RouteSpec.of(policy.arch) if config.routing.needs_rollout_routes else None
    routes = RouteExchange(policy.arch, policy.routers.layers, trainer.place, trainer.layout) if spec else None
    servers = environment = None
    gpu_turns = GpuTurns(trainer.networks, trainer.place, trainer.journal, shares=config.rollout.servers.colocate)
    if config.rollout.replay_from is None:
        gpu_turns.take(SAMPLING)  # servers measure what memory is free when they start
        with trainer.console.starting("servers", _server_names(config, trainer, kept=open_pool is not Pool)):
            servers = stack.enter_context(connect(config, trainer, open_pool))
        gpu_turns.servers = servers.leader
        trainer.console.leader = servers.leader if trainer.place.rank == 0 else None
    publisher = Publisher.of(config, trainer, servers, gpu_turns)
    stack.callback(publisher.close)
    source: GroupSource
    if servers is None:
        source = SavedGroups(config, trainer, spec)
    else:
        ledger = Ledger(
            trainer.run.pending,
            group_size=config.rollout.group_size,
            temperature=config.rollout.temperature,
            vocab_size=policy.arch.vocab_size,
        )
        environment = Environment(
            config.rollout,
            trainer,
            servers,
            publisher,
            prompts.tokenizer,
            prompts.judges,
            ledger=ledger,
            turns=prompts.turns,
            routes=spec,
            top_k=top,
        )
        source = LiveGroups(config, trainer, environment, prompts.train, ledger)
    return Parts(
        config=config,
        trainer=trainer,
        progress=Progress.of(trainer.resumes_from, config.train.steps, config.seed),
        rollouts=Rollouts(config, trainer, source),
        publisher=publisher,
        evaluator=Evaluator(config.eval, trainer, environment, prompts.heldout),
        gpu_turns=gpu_turns,
        routes=routes,
        tops=TopExchange(top, trainer.place, trainer.layout) if top else None,
    )
