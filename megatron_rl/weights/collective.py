"""Sends weights to rollout servers by broadcast: gloo from a CPU, NCCL from a GPU.

Rank 0 of the trainer and all tensor-parallel ranks of all servers form one process group, in which the trainer is rank
0. A bucket is one flat byte tensor (SGLang's "flattened_bucket"). While it is broadcast and loaded, the ranks gather
the next one. Once all servers have received the first, they are told of the next. A server on a GPU receives it as soon
as it has loaded the first, since it receives and loads in one call of its only thread; a server on a CPU receives it
while it loads the first (rollout/sglang_cpu_weights.py). They are not told earlier: a server that has missed a call
would take that bucket for the next, and gloo ends a process over a wrong size.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world

from megatron_rl.errors import UserError
from megatron_rl.ranks.place import backend
from megatron_rl.weights.all_servers import AllServers, Bucket, Sent, WeightSyncError, wait_for

CLOSE_SECONDS = 30.0
T = TypeVar("T")


class CollectiveRoute:
    """Sends weights by broadcast. Only the trainer's rank 0 has this object."""

    def __init__(self, servers: AllServers, device: torch.device) -> None:
        self._servers = servers
        self._device = device
        # Of this join alone: a server remembers the group of a trainer that was killed, under its name.
        self._name = f"megatron_rl_weights_{secrets.token_hex(4)}"
        self._group: dist.ProcessGroup | None = None
        self._is_broken = False
        self._sockets: dict[str, str] = {}  # sockets of the group; see _open_sockets

    def push(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Sends the buckets as weight version `version`. Raises WeightSyncError.

        Asks for a bucket while the one before it is on its way, and holds no others.
        """
        self._is_broken = True  # until every step has succeeded
        if self._group is None:
            self._group = self._join()
        begun = self._servers.start("begin_weight_update")
        total, gather = 0, 0.0
        times: list[Times] = []
        sending: _Running[None] | None = None
        iterator = iter(buckets)
        while True:
            start = time.perf_counter()
            bucket = next(iterator, None)
            gather += time.perf_counter() - start
            self._servers.wait(begun)
            before, sending = sending, None
            if before is not None:
                before.received()
            if bucket:
                sending = self._send(self._group, bucket, times)
                total += sum(tensor.nbytes for _, tensor in bucket)
            if before is not None:
                before.finish()
            if bucket is None:
                break
            del bucket, before
        start = time.perf_counter()
        self._servers.ask("end_weight_update")
        ended = time.perf_counter() - start
        self._servers.ask("flush_cache")  # cached prefixes belong to the old weights
        self._servers.ask("update_weight_version", version=version)
        self._is_broken = False
        seconds = phases(times)
        seconds["load"] += ended  # a server on a CPU loads the last bucket then
        return Sent(total, {"gather": gather, **seconds})

    def close(self) -> None:
        """Leaves the group, and does not wait for servers that are gone, which may be why the run ends. Never raises.

        After a failed push a server, or a thread of this process, may still be in a broadcast. Then gloo's sockets are
        shut down, which wakes both. NCCL's sockets close when this process ends.
        """
        if self._group is None or self._is_broken:
            _cut(self._sockets)
            return
        with contextlib.suppress(UserError):
            there = self._servers.that_answer()
            wait_for(there.start("destroy_weights_update_group", group_name=self._name), CLOSE_SECONDS, there.urls)
        dist.destroy_process_group(self._group)
        self._group = None

    def _send(self, group: dist.ProcessGroup, bucket: Bucket, times: list[Times]) -> _Running[None]:
        mine = Times()
        times.append(mine)
        flat = as_bytes(bucket).to(self._device)
        answers = self._servers.start(
            "update_weights_from_distributed",
            names=[name for name, _ in bucket],
            dtypes=[str(t.dtype).removeprefix("torch.") for _, t in bucket],
            shapes=[list(t.shape) for _, t in bucket],
            group_name=self._name,
        )

        def broadcast() -> None:
            mine.begun = time.perf_counter()
            dist.broadcast(flat, src=0, group=group)
            mine.sent = time.perf_counter()

        for answer in answers:
            answer.add_done_callback(mine.note)
        return self._start(broadcast, answers)

    def _join(self) -> dist.ProcessGroup:
        """Joins a new group as rank 0; the servers' ranks follow in the order of the clients."""
        # A trainer that was killed during a sync has left its session open.
        self._servers.ask("abandon_weight_update")
        infos = self._servers.ask("server_info")
        tp_sizes = [info["tp_size"] for info in infos]
        world = 1 + sum(tp_sizes)
        timeout = datetime.timedelta(seconds=self._servers.timeout)
        addresses = [_address_towards(url) for url in self._servers.urls]
        store = _listen(addresses, world, timeout)
        offsets = [1 + sum(tp_sizes[:i]) for i in range(len(tp_sizes))]
        shared = {"master_port": store.port, "world_size": world, "group_name": self._name}
        places = [
            {**shared, "master_address": address, "rank_offset": offset, "backend": backend(self._device)}
            for address, offset in zip(addresses, offsets, strict=True)
        ]
        answers = self._servers.start_each("init_weights_update_group", places)

        def join() -> dist.ProcessGroup:
            before = _open_sockets()
            # torch has no public function for a group outside the default world; SGLang does the same on its side.
            group, _ = _new_process_group_helper(
                world,
                0,
                [],
                dist.Backend(backend(self._device)),
                PrefixStore(self._name, store),
                group_name=self._name,  # type: ignore[arg-type]
                timeout=timeout,
            )
            self._sockets = dict(_open_sockets().items() - before.items())
            return group

        group = self._start(join, answers).finish()
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        return group

    def _start(self, ours: Callable[[], T], answers: Sequence[Future[Any]]) -> _Running[T]:
        """Runs the trainer's side of a collective in a thread, while the servers run theirs."""

        def on_device() -> T:
            if self._device.type == "cuda":  # each thread has its own current device
                torch.cuda.set_device(self._device)
            return ours()

        return _Running(on_device, answers, self._servers)


@dataclass
class Times:
    """When a bucket's broadcast began and ended, and when the last server answered: a GPU's has loaded it by then."""

    begun: float = 0.0
    sent: float = 0.0
    answered: float = 0.0

    def note(self, answer: Future[Any]) -> None:
        self.answered = time.perf_counter()  # the last server's stands


def phases(buckets: Sequence[Times]) -> dict[str, float]:
    """Returns the seconds in which servers received, and in which they only loaded, as a GPU's do before the next."""
    free = [0.0, *(bucket.answered for bucket in buckets)]
    broadcast = sum(b.sent - max(b.begun, before) for b, before in zip(buckets, free, strict=False))
    return {"broadcast": broadcast, "load": sum(bucket.answered - bucket.sent for bucket in buckets)}


class _Running(Generic[T]):
    """A collective of the trainer's rank 0 and the servers."""

    def __init__(self, ours: Callable[[], T], answers: Sequence[Future[Any]], servers: AllServers) -> None:
        self._answers = answers
        self._servers = servers
        self._result: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(ours,), name="weight-sync", daemon=True)
        self._thread.start()

    def received(self) -> None:
        """Waits until the trainer's side has ended. Raises as `finish` does."""
        waiting = {*self._answers, self._result}
        while self._result in waiting:
            done, waiting = wait(waiting, self._servers.timeout, FIRST_COMPLETED)
            if not done or any(answer.exception() for answer in done):
                self.finish(0.0)

    def finish(self, timeout_seconds: float | None = None) -> T:
        """Waits for both sides, up to weights.timeout, and returns the trainer's result.

        Raises WeightSyncError as soon as a server refuses; the collective itself would only time out. The trainer's
        side then continues in its thread, which ends with the process.
        """
        try:
            who = [*self._servers.urls, "the trainer's own rank"]
            limit = self._servers.timeout if timeout_seconds is None else timeout_seconds
            wait_for([*self._answers, self._result], limit, who)
        except RuntimeError as error:  # the error of a collective in torch
            text = " ".join(str(error).split())
            raise WeightSyncError(
                f"weight sync: the process group with {', '.join(self._servers.urls)} failed: "
                f"{text:.300}; can the servers reach this machine, and no other trainer uses them?"
            ) from error
        self._thread.join()  # it holds what it has sent
        return self._result.result()

    def _run(self, ours: Callable[[], T]) -> None:
        try:
            self._result.set_result(ours())
        except BaseException as error:
            self._result.set_exception(error)


def _open_sockets() -> dict[str, str]:
    """This process's sockets: file descriptor -> name of the socket; empty if there is no /proc."""
    found = {}
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            found[entry.name] = os.readlink(entry)
    return {number: target for number, target in found.items() if target.startswith("socket:")}


def _cut(sockets: Mapping[str, str]) -> None:
    """Shuts down sockets that are unchanged and connected; gloo would end the process over a listening one."""
    for number, _ in sockets.items() & _open_sockets().items():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connected:
            connected.getpeername()
            connected.shutdown(socket.SHUT_RDWR)


def _listen(addresses: Sequence[str], world: int, timeout: datetime.timedelta) -> dist.TCPStore:
    """Address at which the group's ranks meet. It listens only on the address of this machine that the servers use."""
    where = addresses[0] if len(set(addresses)) == 1 else "0.0.0.0"
    family = socket.AF_INET6 if ":" in where else socket.AF_INET
    with socket.create_server((where, 0), family=family) as listening:
        port = listening.getsockname()[1]
        return dist.TCPStore(
            where,
            port,
            world,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listening.detach(),
        )


def as_bytes(bucket: Bucket) -> Tensor:
    """Returns the bucket as one tensor of bytes; a view, if its tensors follow each other in memory."""
    parts = [tensor.contiguous().flatten().view(torch.uint8) for _, tensor in bucket]
    first, ends = parts[0], itertools.accumulate(part.numel() for part in parts)
    storage = first.untyped_storage()
    starts = [0, *ends]
    if all(part.data_ptr() == first.data_ptr() + start for part, start in zip(parts, starts, strict=False)) and all(
        part.untyped_storage().data_ptr() == storage.data_ptr() for part in parts
    ):
        return first.as_strided((starts[-1],), (1,))
    return torch.cat(parts)


def _address_towards(url: str) -> str:
    """This machine's address as the server at `url` sees it."""
    host = url.split("//")[-1].split("/")[0].rsplit(":", 1)[0].strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # UDP: nothing is sent
        return str(probe.getsockname()[0])
