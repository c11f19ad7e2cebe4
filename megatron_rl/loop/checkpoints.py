"""When a run's checkpoints are begun and completed, and the lines of checkpoints.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from megatron_rl.disk import writes
from megatron_rl.engine.checkpoint import describe, held_by_rank
from megatron_rl.engine.checkpoint_writer import CheckpointWriter
from megatron_rl.engine.manifest import Identity, State
from megatron_rl.engine.network import Network
from megatron_rl.lab.journal import Journal
from megatron_rl.lab.run import RunDir
from megatron_rl.ranks.collectives import together
from megatron_rl.ranks.place import Place


class Checkpoints:
    """Begins each checkpoint at the end of a step and lets it be written during the next one."""

    def __init__(self, run: RunDir, networks: Mapping[str, Network], place: Place, journal: Journal, keep: int) -> None:
        self._run = run
        self._networks = networks
        self._place = place
        self._journal = journal
        self._writer = CheckpointWriter(run.checkpoints, place.control, keep, journal.activity.move)
        self._identity: Identity | None = None
        self.when_whole: Callable[[State], None] = lambda state: None
        """Called on rank 0 with the state of each checkpoint that has become whole."""
        self._newest: State | None = None
        self._seconds = 0.0  # in which it kept the run waiting

    def begin(self, identity: Identity | None, state: State | None) -> None:
        """`identity`: rank 0's. `state`: of the checkpoint that the run goes on from, if there is one."""
        self._identity = identity
        self._newest = state

    @property
    def failure(self) -> str:
        """Why this rank could not write the newest checkpoint; empty if nothing has failed."""
        return self._writer.failure

    def save(self, state: State) -> bool:
        """Begins a resumable checkpoint, and completes the one before; older ones than `keep` go. Returns False if
        there is one of this step. Collective.

        Raises a UserError, on every rank, if one could not write.
        """
        if state.step <= (self._newest.step if self._newest else 0):
            return False
        self.complete()
        with self._timed():
            with together(self._place.control), writes("metrics.jsonl", self._run.path):
                self._journal.sync()  # the step's own line has to be on the disk before its checkpoint is
            manifest = describe(self._networks, self._identity, state) if self._identity is not None else None
            self._writer.start(state.step, *held_by_rank(self._networks), manifest)
        self._newest = state
        return True

    def complete(self) -> None:
        """Waits for the checkpoint that is being written. Collective. Raises a UserError as `save` does."""
        with self._timed():
            self._writer.wait()
        self.log_written()

    def wait_copied(self) -> None:
        """Returns once an optimizer may step."""
        with self._timed():
            self._writer.wait_copied()

    def log_written(self) -> None:
        """Writes the line of a checkpoint that has become whole."""
        if self._place.rank == 0 and (written := self._writer.take_written()):
            times = {"time/checkpoint": self._seconds, "time/checkpoint_write": written.seconds}
            self._journal.log_checkpoint(written.step, times)
            self._seconds = 0.0
            assert self._newest is not None
            self.when_whole(self._newest)

    def close(self, *, complete: bool) -> None:
        """Ends what is being written, completed if `complete`. Not collective."""
        self._writer.close(complete=complete)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        with self._journal.phase("checkpoint"):
            yield
        self._seconds += self._journal.timer.take("checkpoint")["time/checkpoint"]
