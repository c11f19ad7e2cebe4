"""The part of a run that RL and supervised fine-tuning share: networks, run directory, metrics and checkpoints."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.config.layout import Layout
from megatron_rl.config.load import check_companions, check_config, dump_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.disk import DiskError, writes
from megatron_rl.engine.checkpoint import Found, find_checkpoint, load_checkpoint
from megatron_rl.engine.device import use_device
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.grad_norms import total_norm
from megatron_rl.engine.manifest import CheckpointError, Identity, State, remove_partial
from megatron_rl.engine.named_checkpoint import CheckpointName
from megatron_rl.engine.network import Network, UpdateResult
from megatron_rl.engine.packed_losses import PolicyLoss, SftLoss, ValueLoss
from megatron_rl.lab.alarms import Alarms, Firing, check_alarms
from megatron_rl.lab.closing import Closing
from megatron_rl.lab.console import Console
from megatron_rl.lab.journal import Journal, reduce_metrics
from megatron_rl.lab.metrics import explained_variance
from megatron_rl.lab.prometheus_sink import PrometheusSink
from megatron_rl.lab.rank_log import RankLog
from megatron_rl.lab.run import RunDir
from megatron_rl.lab.run_records import Resume
from megatron_rl.lab.sinks import Sink
from megatron_rl.lab.wandb_sink import WandbSink
from megatron_rl.loop.checkpoints import Checkpoints
from megatron_rl.loop.forking import Fork, restore_fork
from megatron_rl.loop.networks import Networks, build_networks, identify
from megatron_rl.loop.opened_run import open_run
from megatron_rl.loop.progress import check_steps, is_due
from megatron_rl.loop.usage import Usage
from megatron_rl.loop.watch import Watch
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.weights_io import MAX_SHARD_BYTES, save_weights, torch_dtype
from megatron_rl.ranks.activity import Activity
from megatron_rl.ranks.agreement import tell
from megatron_rl.ranks.collectives import together
from megatron_rl.ranks.heartbeat import Heartbeat
from megatron_rl.ranks.place import Place, start_process_groups, stop_process_groups
from megatron_rl.ranks.world import read_world
from megatron_rl.routing.exchange import reduce_stats
from megatron_rl.routing.modes import MiniBatchRouting
from megatron_rl.stop import Clock, Stopped

logger = logging.getLogger(__name__)


class Trainer:
    """Made by `open_trainer`. Its methods are collective unless they say otherwise."""

    def __init__(
        self,
        config: Config | SftConfig,
        layout: Layout,
        place: Place,
        networks: Networks,
        run: RunDir,
        journal: Journal,
        console: Console,
        watch: Watch,
        *,
        closing: Closing,
        log: RankLog,
        steps: int,
        fork: CheckpointName | None,
    ) -> None:
        """`steps`: of the whole run. `fork`: the checkpoint of another run that this one begins from."""
        self.config = config
        self.layout = layout
        self.place = place
        self.networks = networks
        self.policy = networks.policy
        self.critic = networks.critic
        self.reference = networks.reference
        self.run = run
        self.journal = journal
        self.console = console
        self.watch = watch
        self.alarms = Alarms(config.lab.alarms)
        self.usage = Usage(self.policy.arch, layout, self.policy.device, config.engine.dtype)
        self._closing = closing
        self._log = log
        self._steps = steps
        self._fork = fork
        self._identity: Identity | None = None  # rank 0's
        self._found: Found | None = None
        self._forked: Fork | None = None
        self.checkpoints = Checkpoints(run, networks.trained, place, journal, config.checkpoint.keep)

    def update(
        self, mini_batch: MiniBatch, loss: PolicyLoss | SftLoss, routing: MiniBatchRouting | None = None
    ) -> dict[str, float]:
        """One optimizer step, unless an alarm skips it; returns its metrics, over all ranks."""
        metrics: dict[str, float] = {}

        def approve(norms: dict[str, float]) -> bool:
            metrics.update(reduce_metrics(loss.metrics, self.place, holds_samples=self.policy.is_last_stage))
            if routing is not None:
                metrics.update(reduce_stats(routing.stats, self.place).finalize())
            fired, figures = self.alarms.check({**metrics, **_of_norms(norms)}, skips=True)
            metrics.update(figures)
            self._tell(fired, "this optimizer step is skipped")
            self.checkpoints.wait_copied()
            return not fired

        self.usage.count(mini_batch)

        with self.journal.phase("update"):
            routing_pass = routing.update_pass() if routing else None
            result = self.policy.update(mini_batch.micro_batches, loss, routing_pass, approve)
        return metrics | _of_result(result)

    def update_critic(self, mini_batch: MiniBatch, loss: ValueLoss) -> dict[str, float]:
        """One optimizer step of the critic; its metrics, over all ranks, under critic/."""
        assert self.critic is not None
        result = self.step_critic(mini_batch, loss)
        metrics = reduce_metrics(loss.metrics, self.place, holds_samples=self.critic.is_last_stage)
        metrics |= explained_variance(metrics) | _of_result(result)
        return {f"critic/{name}": value for name, value in metrics.items()}

    def step_critic(self, mini_batch: MiniBatch, loss: ValueLoss) -> UpdateResult:
        """One optimizer step of the critic, without the loss's metrics."""
        assert self.critic is not None
        with self.journal.phase("critic update"):
            self.checkpoints.wait_copied()
            return self.critic.update(mini_batch.micro_batches, loss)

    def close(self) -> None:
        """Completes the checkpoint that is being written, ends the journal, and gives signals back. Not collective."""
        self.checkpoints.close(complete=True)
        self.journal.close()
        self.watch.close()

    def log_update(self, step: int, mini_batch: int, weight_version: int, metrics: Mapping[str, float]) -> None:
        """Begins the journal's line of an optimizer step, once the alarms have seen its metrics.

        Raises NonFiniteGradientError as `check_skipped` does.
        """
        fired, figures = self.alarms.check(metrics, skips=False)
        self._tell(fired, f"step {step}, mini-batch {mini_batch}")
        for firing in fired:
            if firing.alarm.action == "stop":
                self.watch.stop(f"alarm: {firing}")
        self.journal.log_update(step, mini_batch, weight_version, {**metrics, **figures})
        self.check_skipped()

    def _tell(self, fired: Sequence[Firing], where: str) -> None:
        for firing in fired:
            if firing.is_first and self.place.rank == 0:
                logger.warning("alarm: %s (%s)", firing, where)

    def check_skipped(self) -> None:
        """Raises NonFiniteGradientError when a network has skipped too many optimizer steps."""
        for network in self.networks.trained.values():
            network.check_skipped()

    def end_step(self, more: Mapping[str, float], *, tokens: float, last: bool = False) -> None:
        """Writes the last optimizer step's line, with `more`, the seconds per phase and what the step used, and shows
        the step. `tokens`: that it generated or, without rollouts, trained on.

        Then the ranks agree on how the run goes on; after the `last` step there is nothing to stop. Collective.
        """
        times = self.journal.timer.drain()
        self.journal.end_step({**more, **times, **self.usage.drain(tokens, times)})
        self.checkpoints.log_written()
        self.watch.step_done(self._failure, last=last)

    @property
    def _failure(self) -> str:
        return self.journal.failure or self.checkpoints.failure

    # ---- beginning, going on, ending ---------------------------------------------------------------------------

    def restore(self) -> None:
        """Restores what a resume or a fork goes on from, and changes no file; open_trainer does it, before servers are
        started.

        Raises CheckpointError, on every rank, for a checkpoint of another run, model, data or dtype, and if no
        checkpoint is whole but there is something to lose. Raises ConfigError if the checkpoint has made more steps
        than the run is asked for. Raises as `restore_fork`. Collective.
        """
        with together(self.place.control):
            if self.place.rank == 0:
                self._identity = identify(self.config, self.networks, self.run.id)
        fork, trained = self._fork, self.networks.trained
        if self.run.resumes:
            self._found = find_checkpoint(self.run.checkpoints, trained, self._identity)
            if self._found.directory is not None:
                assert self._found.manifest is not None
                check_steps(self.config, self._found.manifest.state.step, f"the checkpoint {self._found.directory}")
                load_checkpoint(self._found.directory, self._found.manifest, trained)
                return
            with together(self.place.control):
                if self.place.rank == 0 and (refusal := self.run.refuses_step_0(bool(self._found.damaged))):
                    raise CheckpointError("\n".join([refusal, *self._found.warnings]))
            if self.run.origin is not None:  # it has no checkpoint of its own yet
                fork = CheckpointName(Path(self.run.origin["run"]), self.run.origin["step"])
        if fork is not None:
            self._forked = restore_fork(fork, self.config, trained, self._identity)
            self.run.origin = self.run.origin or self._forked.record

    @property
    def resumes_from(self) -> State | None:
        """State of the checkpoint that was restored; None at step 0."""
        if self._forked is not None:
            return self._forked.state
        return self._found.manifest.state if self._found and self._found.manifest else None

    def begin(self) -> State | None:
        """Begins or resumes the run, and returns `resumes_from`. The first call that writes into the run's files.
        Collective."""
        state = self.resumes_from
        with together(self.place.control):
            if self.place.rank == 0:
                self._begin_run(state)
        with self.writing("the log of a rank", self.run.logs):
            self._log.open(self.run.logs)
        self.checkpoints.begin(self._identity, None if self._forked else state)
        self.watch.begin()
        self.journal.activity.has_begun = True
        return state

    def _begin_run(self, state: State | None) -> None:
        wandb, prometheus = self.config.lab.wandb, self.config.lab.prometheus
        others: list[Sink] = []  # before the run begins, as they may be refused
        if wandb is not None:
            others.append(WandbSink(wandb, self.run.path, self.run.id, dump_config(self.config)))
        if prometheus is not None:
            others.append(PrometheusSink(prometheus, self.run.path, self.run.id, self._steps, self.console))
        goes_on = self._found is not None and self._found.manifest is not None
        last_step = state.step if goes_on and state else self.run.first_step - 1
        sinks = self.run.begin(last_step, self._found.damaged if self._found else ())
        tell([*map(str, self.run.changes), *([str(self._forked)] if self._forked else [])])
        sinks += [*others, self.console, self._closing]  # these two last: they show what the files have
        self._closing.has_begun = True
        self.journal.open(sinks, self.run.optimizer_steps)
        remove_partial(self.run.checkpoints)
        for warning in self._found.warnings if self._found else ():
            logger.warning("%s", warning)
        for directory in self._found.damaged if self._found else ():
            logger.warning("%s: damaged, and moved to history/", directory)

    @contextlib.contextmanager
    def writing(self, what: str, path: Path) -> Iterator[None]:
        """A write below `path` by some of the ranks, which all of them enter: if one fails, all raise a UserError that
        says that `what` was not written. Collective."""
        with together(self.place.control), writes(what, path):
            yield

    def check_interrupted(self) -> None:
        """Raises Interrupted, on every rank, if the run is to stop. Collective."""
        self.watch.check_interrupted(self._failure)

    def checkpoint(self, state: State) -> None:
        """Saves if that is due: every so many steps or minutes, after the last step, and before the run stops. Raises
        Stopped, on every rank, if it does. Collective."""
        by_count = is_due(state.step, self._steps, self.config.checkpoint.every)
        due = by_count or self.watch.checkpoint_due or self.watch.stopping
        if due and self.checkpoints.save(state):
            self.watch.saved()
        if self.watch.stopping or state.step == self._steps:
            self.checkpoints.complete()
        self.watch.stop_if_asked(state.step, self._steps)

    def end(self) -> None:
        """Records that the run has made all its steps and written its models: a resume has nothing left to do.
        Collective."""
        with self.writing("the end of the run", self.run.path):
            if self.place.rank == 0:
                self.run.end(self._steps, ["model", "critic"] if self.critic else ["model"])

    def export_all(self) -> None:
        """Writes run_dir/model, and run_dir/critic if there is one. Collective."""
        self.export(self.policy, self.run.path / "model")
        if self.critic is not None:
            self.export(self.critic, self.run.path / "critic")

    def export(self, network: Network, directory: Path, bucket_mib: int = 256) -> None:
        """Writes the network as a Hugging Face directory. One that an earlier end of the run left is replaced."""
        buckets = network.export(bucket_mib << 20)
        with self.writing(f"the model in {directory}", directory):
            try:
                if self.place.rank == 0:
                    self._write_model(network, directory, (pair for bucket in buckets for pair in bucket))
            finally:
                for _ in buckets:  # the ranks send until all is received
                    pass

    def _write_model(self, network: Network, directory: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        dtype = torch_dtype(self.config.engine.dtype)
        new = directory.with_name(directory.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        save_weights(tensors, new, network.model_dir, MAX_SHARD_BYTES, dtype, network.arch.value_head)
        shutil.rmtree(directory, ignore_errors=True)
        new.rename(directory)


@contextlib.contextmanager
def open_trainer(
    config: Config | SftConfig,
    *,
    steps: int,
    resume: Resume,
    fork: CheckpointName | None = None,
    temperature: float = 1.0,
) -> Iterator[Trainer]:
    """This rank's trainer, its networks restored if the run is resumed or forked. Collective.

    Raises ConfigError: for contradictions before any process group starts, and for a run directory in use. Raises
    NothingLeft if the run to resume has made its steps.
    """
    arch = read_architecture(config.model.path)
    layout = check_config(config, arch, read_world().size)
    check_alarms(config.lab.alarms)
    if isinstance(config, Config):
        check_companions(config, arch, layout)
    minutes = config.train.max_minutes if isinstance(config, Config) else config.max_minutes
    clock = Clock(config.checkpoint.minutes, minutes)
    device = use_device(config.engine.device)
    joins_world = not dist.is_initialized()
    place = start_process_groups(layout, device, config.seed)
    activity = Activity(config.engine.stall)
    console = Console(steps, run_dir=config.run_dir, shows=place.rank == 0)
    try:
        with (
            Closing(config.run_dir, steps, console.say, can_go_on=not _replays(config)) as closing,
            console,
            RankLog(place.rank, console.warn) as log,
            Heartbeat(place.control, config.engine.heartbeat, activity) as heartbeat,
            open_run(config, place, resume, steps) as run,
        ):
            with console.starting("engine", _describe(config, layout, device)):
                networks = build_networks(config, layout, place, device, temperature)
            watch = Watch(place.control, clock)
            journal = Journal(console, activity=activity)
            networks.count_moves(activity.move)
            trainer = Trainer(
                config,
                layout,
                place,
                networks,
                run,
                journal,
                console,
                watch,
                closing=closing,
                log=log,
                steps=steps,
                fork=fork,
            )
            heartbeat.before_end = journal.flush
            trainer.restore()
            try:
                yield trainer
            except DiskError:
                trainer.checkpoints.close(complete=False)  # a rank could not write: its file may never come
                raise
            finally:
                trainer.close()
    except Stopped as stopped:
        if place.rank == 0:
            print(stopped, file=sys.stderr, flush=True)
        dist.barrier(group=place.control)  # torchrun ends all ranks as soon as one leaves
        raise
    finally:
        stop_process_groups(leave_world=joins_world)


def _replays(config: Config | SftConfig) -> bool:
    return isinstance(config, Config) and config.rollout.replay_from is not None


def _describe(config: Config | SftConfig, layout: Layout, device: torch.device) -> str:
    degrees = ", ".join(f"{key}={getattr(layout, key)}" for key in ("tp", "pp", "cp", "ep", "dp"))
    return f"{config.model.path} in {config.engine.dtype}, {layout.world_size} ranks on {device.type} ({degrees})"


def _of_result(result: UpdateResult) -> dict[str, float]:
    return {"lr": result.lr, **_of_norms(result.grad_norms), "skipped": float(result.skipped)}


def _of_norms(norms: Mapping[str, float]) -> dict[str, float]:
    return {"grad_norm": total_norm(norms), **{f"grad_norm/{name}": norm for name, norm in norms.items()}}
