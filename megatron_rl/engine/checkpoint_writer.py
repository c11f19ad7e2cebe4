"""Writes checkpoints while training goes on.

A thread of each rank copies what the rank's optimizers hold, writes the copy, and leaves a receipt beside it. Rank 0's
thread waits for all receipts, writes the manifest (engine/manifest.py) and renames the directory. So a checkpoint is
whole as soon as the slowest rank has written, whatever the ranks do in the meantime, and no thread calls a collective.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.disk import DiskError, explain, size, sync_directory, write_durably, write_whole
from megatron_rl.engine.manifest import (
    MANIFEST,
    PARTIAL,
    Manifest,
    ShardFile,
    checkpoint_name,
    checkpoints,
    prune,
    shard_name,
)
from megatron_rl.engine.shard_file import write_tensors
from megatron_rl.ranks.collectives import all_gather_bytes

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02
LAST_SECONDS = 30.0
"""How long rank 0 waits, at the end of a run, for the files of ranks that may have died."""


@dataclass(frozen=True)
class Written:
    """A checkpoint that is whole."""

    step: int
    seconds: float
    """From the start of the copy to the renamed directory."""


@dataclass(frozen=True)
class Shard:
    """What one rank writes: tensors that the optimizers still hold, and the rest."""

    directory: Path
    """The checkpoint's, under the name that it has until it is whole."""
    rank: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, object]
    moved: Callable[[], None]
    """Called after each tensor that is written."""

    def write(self, copied: threading.Event) -> None:
        """Writes the rank's file and then its receipt. `copied` is set once the tensors may change."""
        tensors = {name: _copy(tensor) for name, tensor in self.tensors.items()}
        copied.set()
        file = write_tensors(self.directory / shard_name(self.rank), tensors, self.state, self.moved)
        sync_directory(self.directory)
        write_whole(_receipt(self.directory, self.rank), orjson.dumps(file))  # now rank 0 may rename the directory


@dataclass(frozen=True)
class Commit:
    """How rank 0 completes a checkpoint: the manifest without the ranks' files, and how many these are."""

    manifest: Manifest
    ranks: int
    keep: int

    def complete(self, partial: Path, abandoned: threading.Event) -> None:
        """Waits for all receipts, and makes a checkpoint of the directory; older ones than `keep` go. Does nothing
        once `abandoned` is set."""
        receipts = [_receipt(partial, rank) for rank in range(self.ranks)]
        while not all(receipt.exists() for receipt in receipts):
            if abandoned.wait(POLL_SECONDS):
                return
        files = [ShardFile(**orjson.loads(receipt.read_bytes())) for receipt in receipts]
        write_durably(partial / MANIFEST, self.manifest.model_copy(update={"files": files}).to_bytes())
        for receipt in receipts:
            receipt.unlink()
        sync_directory(partial)
        directory = partial.with_name(checkpoint_name(self.manifest.state.step))
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(partial, directory)
        sync_directory(directory.parent)
        try:
            prune(directory.parent, self.keep)
        except OSError as error:  # nothing is lost
            logger.warning("an old checkpoint was not deleted: %s", explain(error, directory.parent))


class Save(threading.Thread):
    """This rank's part of one checkpoint. A daemon: a file system that hangs does not keep the process."""

    def __init__(self, shard: Shard, commit: Commit | None) -> None:
        """`commit`: rank 0's."""
        super().__init__(name="checkpoint", daemon=True)
        self.partial = shard.directory
        self.copied = threading.Event()
        self.filed = threading.Event()
        """The rank's file is there, or failed."""
        self.abandoned = threading.Event()
        self.failure = ""
        """Why this rank could not write, in words for the user."""
        self.seconds = 0.0
        self._shard = shard
        self._commit = commit

    def run(self) -> None:
        start = time.perf_counter()
        try:
            self._shard.write(self.copied)
            self.filed.set()
            if self._commit is not None:
                self._commit.complete(self.partial, self.abandoned)
        except OSError as error:
            self.failure = explain(error, self.partial)
        except Exception as error:
            logger.exception("the thread that writes %s has failed", self.partial)
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self.seconds = time.perf_counter() - start
            self.copied.set()
            self.filed.set()


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time."""

    def __init__(
        self, root: Path, control: dist.ProcessGroup, keep: int, moved: Callable[[], None] = lambda: None
    ) -> None:
        """`control`: gloo, all ranks. `keep`: complete checkpoints that stay under `root`. `moved` is called after each
        tensor that is written."""
        self._moved = moved
        self._root = root
        self._control = control
        self._keep = keep
        self._save: Save | None = None
        self._step = 0  # of `_save`
        self._taken = 0

    @property
    def failure(self) -> str:
        """Why this rank's part of the newest checkpoint was not written; empty if nothing has failed."""
        return self._told(self._save.failure) if self._save is not None and self._save.failure else ""

    def start(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object], manifest: Manifest | None
    ) -> None:
        """Begins the checkpoint of `step`: every rank's 1-D tensors, and a JSON object beside them. Rank 0 has the
        `manifest`, still without files. `wait` has to be called before. Collective.

        All files go into a directory of another name, and are on the disk before it is renamed; a crash leaves that one
        behind and nothing else. Raises DiskError, on every rank, if that directory could not be made.
        """
        self._step = step
        partial = self._root / (checkpoint_name(step) + PARTIAL)
        commit, failure = None, ""
        if manifest is not None:
            commit = Commit(manifest, self._control.size(), self._keep)
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                failure = self._told(explain(error, partial))
        self._raise_together(failure)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # what is queued may still change them
        self._save = Save(Shard(partial, self._control.rank(), tensors, state, self._moved), commit)
        self._save.start()

    def wait_copied(self) -> None:
        """Returns once weights and optimizers may change."""
        if self._save is not None:
            self._save.copied.wait()

    def wait(self) -> None:
        """Returns once no checkpoint is being written. Collective.

        Raises DiskError, on every rank, if any could not write; older checkpoints then stay.
        """
        if self._save is None:
            return
        self._save.filed.wait()
        self._raise_together(self.failure)  # else rank 0 would wait for a file that does not come
        self._save.join()
        self._raise_together(self.failure)

    def take_written(self) -> Written | None:
        """Returns the newest checkpoint, once, after it has become whole. On rank 0, which alone knows."""
        save = self._save
        if save is None or save.is_alive() or save.failure or self._taken == self._step:
            return None
        self._taken = self._step
        return Written(self._step, save.seconds)

    def close(self, *, complete: bool) -> None:
        """Ends the thread. If `complete`, what is being written is completed first. Not collective."""
        save, self._save = self._save, None
        if save is None:
            return
        save.filed.wait()
        save.join(LAST_SECONDS if complete else 0)
        save.abandoned.set()
        save.join()
        if self._control.rank() == 0:
            shutil.rmtree(save.partial, ignore_errors=True)  # useless, and it takes space

    def _raise_together(self, failure: str) -> None:
        """Raises DiskError on every rank if one of them has a failure. Collective."""
        failures = [part.decode() for part in all_gather_bytes(failure.encode(), self._control) if part]
        if failures:
            raise DiskError(failures[0])

    def _told(self, failure: str) -> str:
        text = f"the checkpoint of {checkpoint_name(self._step)} was not written: {failure}. "
        if not (whole := checkpoints(self._root)):
            return text + "There is no older one"
        needed = size(sum(file.stat().st_size for file in whole[-1].iterdir()))
        return text + f"{whole[-1].name} ({needed}) is complete: free that much, and --resume goes on from it"


def _copy(tensor: Tensor) -> Tensor:
    """Returns a copy in the host's memory, made beside what the device does."""
    if tensor.is_cuda:
        with torch.cuda.stream(torch.cuda.Stream(tensor.device)):
            return tensor.detach().cpu()
    return tensor.detach().clone()


def _receipt(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank:05d}.json"
