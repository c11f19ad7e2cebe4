"""What RL and supervised fine-tuning share on each rank: the policy, the run directory, metrics and checkpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.layout import Layout
from megatron_rl.config.load import ConfigError, check_companions, check_config, dump_config
from megatron_rl.config.schema import CheckpointConfig, Config, SftConfig
from megatron_rl.engine.checkpoint import checkpoints, load_checkpoint, prune, save_checkpoint
from megatron_rl.engine.critic import Critic
from megatron_rl.engine.device import use_device
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.exchange import broadcast_bytes
from megatron_rl.engine.heartbeat import Heartbeat
from megatron_rl.engine.losses import PolicyLoss, SftLoss, ValueLoss
from megatron_rl.engine.network import Network, UpdateResult
from megatron_rl.engine.parallel import Place, start_process_groups, stop_process_groups
from megatron_rl.engine.policy import Policy
from megatron_rl.engine.routes import reduce_stats
from megatron_rl.errors import UserError
from megatron_rl.lab.console import Console
from megatron_rl.lab.metrics import explained_variance
from megatron_rl.lab.run import RunDir
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.weights_io import save_weights
from megatron_rl.routing.modes import MiniBatchRouting

MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Networks:
    """What a run holds on this rank, all under one layout."""

    policy: Policy
    critic: Critic | None
    reference: Policy | None


class Trainer:
    """Built by `open_trainer`. Its methods are collective but where they say otherwise."""

    def __init__(
        self,
        config: Config | SftConfig,
        layout: Layout,
        place: Place,
        networks: Networks,
        run: RunDir,
        console: Console,
    ) -> None:
        self.config = config
        self.layout = layout
        self.place = place
        self.policy = networks.policy
        self.critic = networks.critic
        self.reference = networks.reference
        self.run = run
        self.console = console
        self._held: tuple[int, int, int, dict[str, float]] | None = None

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self.console.phase(name)

    def update(
        self, mini_batch: MiniBatch, loss: PolicyLoss | SftLoss, routing: MiniBatchRouting | None = None
    ) -> dict[str, float]:
        """One optimizer step; returns its metrics, over all ranks."""
        with self.phase("update"):
            routing_pass = routing.update_pass() if routing else None
            result = self.policy.update(mini_batch.micro_batches, loss, routing_pass)
        metrics = self.reduce(loss.metrics, holds_samples=self.policy.is_last_stage)
        if routing is not None:
            metrics |= reduce_stats(routing.stats, self.place).finalize()
        return metrics | _of_result(result)

    def update_critic(self, mini_batch: MiniBatch, loss: ValueLoss) -> dict[str, float]:
        """One optimizer step of the critic; its metrics, over all ranks, under critic/."""
        assert self.critic is not None
        result = self.step_critic(mini_batch, loss)
        metrics = self.reduce(loss.metrics, holds_samples=self.critic.is_last_stage)
        metrics |= explained_variance(metrics) | _of_result(result)
        return {f"critic/{name}": value for name, value in metrics.items()}

    def step_critic(self, mini_batch: MiniBatch, loss: ValueLoss) -> UpdateResult:
        """The same without the metrics of the loss."""
        assert self.critic is not None
        with self.phase("critic update"):
            return self.critic.update(mini_batch.micro_batches, loss)

    def check_skipped(self) -> None:
        """Raises NonFiniteGradientError when a network has skipped too many optimizer steps."""
        for network in self._trained().values():
            network.check_skipped()

    def _trained(self) -> dict[str, Network]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})

    def reduce(self, metrics: MetricAccumulator, holds_samples: bool) -> dict[str, float]:
        """The metrics of all ranks together. Tensor- and context-parallel ranks hold the same samples: one counts."""
        place = self.place
        sums, maxima = metrics.sums.cpu(), metrics.maxima.cpu()
        if not holds_samples or not place.speaks_for_stage:
            empty = MetricAccumulator(metrics.kinds)
            sums, maxima = empty.sums, empty.maxima
        dist.all_reduce(sums, group=place.control)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=place.control)
        total = MetricAccumulator(metrics.kinds)
        total.sums.copy_(sums)
        total.maxima.copy_(maxima)
        return total.finalize()

    def log_update(self, step: int, mini_batch: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Writes the line of the optimizer step before this one; this one's waits for what is known only later."""
        self.flush()
        self._held = (step, mini_batch, weight_version, dict(metrics))

    def add_to_line(self, more: Mapping[str, float]) -> None:
        """To that of the last optimizer step."""
        if self._held is not None:
            self._held[3].update(more)

    def finish_step(self, more: Mapping[str, float]) -> dict[str, float]:
        """Writes the last optimizer step's line, with `more` and the time per phase; returns the times."""
        times = self.console.timer.drain()
        self.add_to_line({**more, **times})
        self.flush()
        return times

    def flush(self) -> None:
        """Writes the line that waits, as when the run ends before its step does."""
        held, self._held = self._held, None  # first: the heartbeat's thread may flush while this one hangs
        if held is not None:
            self.run.log_metrics(*held)

    def save(self, step: int, state: dict[str, Any], config: CheckpointConfig) -> None:
        """A resumable checkpoint of `step`; older ones than `config.keep` go."""
        with self.phase("checkpoint"):
            root = self.run.checkpoints
            save_checkpoint(root / f"step-{step:06d}", self._trained(), {"step": step, **state})
            if self.place.rank == 0:
                prune(root, config.keep)
        # The step's own line is on disk already: it has to be there before its checkpoint is.
        self.run.log_checkpoint(step, self.console.timer.take("checkpoint"))

    def resume(self) -> dict[str, Any] | None:
        """Restores the newest complete checkpoint and returns its state; None when there is none yet."""
        found = checkpoints(self.run.checkpoints)
        step = torch.tensor(int(found[-1].name.removeprefix("step-")) if found else -1)
        # All ranks take rank 0's answer: a file system may show them different directories.
        dist.broadcast(step, 0, group=self.place.control)
        self.run.truncate_after(int(step))
        if step < 0:
            return None
        return load_checkpoint(self.run.checkpoints / f"step-{int(step):06d}", self._trained())

    def export(self, network: Network, directory: Path, bucket_mib: int = 256) -> None:
        """Its weights as a Hugging Face directory, in place of the one that an earlier start of the run left there."""
        if self.place.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
        buckets = network.export(bucket_mib << 20)
        if self.place.rank == 0:
            dtype = torch.bfloat16 if self.config.engine.dtype == "bf16" else torch.float32
            tensors = (pair for bucket in buckets for pair in bucket)
            save_weights(tensors, directory, network.model_dir, MAX_SHARD_BYTES, dtype, network.arch.value_head)
        else:
            for _ in buckets:
                pass
        dist.barrier(group=self.place.control)


@contextlib.contextmanager
def open_trainer(
    config: Config | SftConfig, *, steps: int, resume: bool, temperature: float = 1.0
) -> Iterator[Trainer]:
    """Raises ConfigError: for contradictions before any process group starts, and for a run directory in use."""
    arch = read_architecture(config.model.path)
    layout = check_config(config, arch, int(os.environ.get("WORLD_SIZE", "1")))
    if isinstance(config, Config):
        check_companions(config, arch, layout)
    device = use_device(config.engine.device)
    joins_world = not dist.is_initialized()
    place = start_process_groups(layout, device, config.seed)
    try:
        with Heartbeat(place.control, config.engine.heartbeat) as heartbeat:
            run = _run_dir(config, place, resume)
            networks = _networks(config, layout, place, device, temperature)
            with Console(steps, shows=place.rank == 0) as console:
                trainer = Trainer(config, layout, place, networks, run, console)
                heartbeat.before_end = trainer.flush
                try:
                    yield trainer
                finally:
                    trainer.flush()
            run.close()
    finally:
        stop_process_groups(leave_world=joins_world)


def _networks(
    config: Config | SftConfig, layout: Layout, place: Place, device: torch.device, temperature: float
) -> Networks:
    policy = Policy(config.model.path, layout, place, config.engine, device, config.optim, temperature)
    critic = reference = None
    if isinstance(config, Config) and config.critic is not None:
        path = config.critic.path or config.model.path
        critic = Critic(path, layout, place, config.engine, device, config.critic.optim)
    if isinstance(config, Config) and config.objective.kl.kind != "none":
        path = config.model.reference or config.model.path
        reference = Policy(path, layout, place, config.engine, device, None, temperature, frozen=True)
    return Networks(policy, critic, reference)


def _of_result(result: UpdateResult) -> dict[str, float]:
    norms = {f"grad_norm/{kind}": norm for kind, norm in result.grad_norms.items()}
    return {"lr": result.lr, "grad_norm": result.grad_norm, **norms, "skipped": float(result.skipped)}


def _run_dir(config: Config | SftConfig, place: Place, resume: bool) -> RunDir:
    """Made by rank 0, whose failure is every rank's."""
    failure = ""
    if place.rank == 0:
        try:
            run = RunDir.create(config.run_dir, dump_config(config), resume)
        except (OSError, UserError) as error:
            failure = str(error)
    failure = broadcast_bytes(failure.encode(), place.control).decode()
    if failure:
        raise ConfigError(failure)
    return run if place.rank == 0 else RunDir.attach(config.run_dir)
