"""Sends weights to rollout servers by broadcast: gloo from a CPU, NCCL from a GPU.

Rank 0 of the trainer and all tensor-parallel ranks of all servers form one process group, in which the trainer is rank
0. A bucket is one flat byte tensor (SGLang's "flattened_bucket").
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world

from megatron_rl.errors import UserError
from megatron_rl.ranks.place import backend
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient

CLOSE_SECONDS = 30.0
T = TypeVar("T")


class WeightSyncError(UserError):
    """A server refused weights, or did not answer in time."""


class CollectiveRoute:
    """Sends weights by broadcast. Only the trainer's rank 0 has this object."""

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        loop: BackgroundLoop,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self._clients = clients
        self._urls = [client.url for client in clients]
        self._loop = loop
        self._device = device
        self._timeout = timeout_seconds
        # Of this join alone: a server remembers the group of a trainer that was killed, under its name.
        self._name = f"megatron_rl_weights_{secrets.token_hex(4)}"
        self._group: dist.ProcessGroup | None = None
        self._is_broken = False
        self._sockets: dict[str, str] = {}  # sockets of the group; see _open_sockets

    def push(self, buckets: Iterable[list[tuple[str, Tensor]]], version: int) -> int:
        """Sends the buckets as weight version `version`; returns the bytes sent. Raises WeightSyncError."""
        self._is_broken = True  # until every step has succeeded
        if self._group is None:
            self._group = self._join()
        wait_for(self._ask("begin_weight_update"), self._timeout, self._urls)
        sent = 0
        for bucket, is_last in _mark_last(buckets):
            sent += self._send(self._group, bucket, version if is_last else None)
        wait_for(self._ask("end_weight_update"), self._timeout, self._urls)
        self._is_broken = False
        return sent

    def close(self) -> None:
        """Leaves the group. Never raises.

        After a failed push a server, or a thread of this process, may still be in a broadcast. Then gloo's sockets are
        shut down, which wakes both. NCCL's sockets close when this process ends.
        """
        if self._group is None or self._is_broken:
            _cut(self._sockets)
            return
        with contextlib.suppress(UserError):
            wait_for(self._ask("destroy_weights_update_group", group_name=self._name), CLOSE_SECONDS, self._urls)
        dist.destroy_process_group(self._group)
        self._group = None

    def _send(self, group: dist.ProcessGroup, bucket: list[tuple[str, Tensor]], version: int | None) -> int:
        flat = torch.cat([t.contiguous().flatten().view(torch.uint8) for _, t in bucket]).to(self._device)
        answers = self._ask(
            "update_weights_from_distributed",
            names=[name for name, _ in bucket],
            dtypes=[str(t.dtype).removeprefix("torch.") for _, t in bucket],
            shapes=[list(t.shape) for _, t in bucket],
            group_name=self._name,
            load_format="flattened_bucket",
            # Cached prefixes belong to the old weights. The new version holds once the last bucket is loaded.
            flush_cache=version is not None,
            weight_version=version,
        )
        self._together(lambda: dist.broadcast(flat, src=0, group=group), answers)
        return flat.numel()

    def _join(self) -> dist.ProcessGroup:
        """Joins a new group as rank 0; the servers' ranks follow in the order of the clients."""
        # A trainer that was killed during a sync has left its session open.
        wait_for(self._ask("abandon_weight_update"), self._timeout, self._urls)
        infos = wait_for(self._ask("server_info"), self._timeout, self._urls)
        tp_sizes = [info["tp_size"] for info in infos]
        world = 1 + sum(tp_sizes)
        timeout = datetime.timedelta(seconds=self._timeout)
        addresses = [_address_towards(client.url) for client in self._clients]
        store = _listen(addresses, world, timeout)
        offsets = [1 + sum(tp_sizes[:i]) for i in range(len(tp_sizes))]
        answers = [
            self._loop.start(
                client.init_weights_update_group(
                    master_address=address,
                    master_port=store.port,
                    rank_offset=offset,
                    world_size=world,
                    group_name=self._name,
                    backend=backend(self._device),
                )
            )
            for client, address, offset in zip(self._clients, addresses, offsets, strict=True)
        ]

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

        group = self._together(join, answers)
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        return group

    def _together(self, ours: Callable[[], T], answers: Sequence[Future[Any]]) -> T:
        """Runs the trainer's side of a collective while the servers run theirs.

        Raises WeightSyncError as soon as a server refuses; the collective itself would only time out. The trainer's
        side then continues in its thread, which ends with the process.
        """
        result: Future[T] = Future()

        def run() -> None:
            try:
                if self._device.type == "cuda":  # each thread has its own current device
                    torch.cuda.set_device(self._device)
                result.set_result(ours())
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name="weight-sync", daemon=True).start()
        try:
            wait_for([*answers, result], self._timeout, [*self._urls, "the trainer's own rank"])
        except RuntimeError as error:  # the error of a collective in torch
            text = " ".join(str(error).split())
            raise WeightSyncError(
                f"weight sync: the process group with {', '.join(self._urls)} failed: "
                f"{text:.300}; can the servers reach this machine, and no other trainer uses them?"
            ) from error
        return result.result()

    def _ask(self, call: str, **arguments: Any) -> list[Future[Any]]:
        return [self._loop.start(getattr(client, call)(**arguments)) for client in self._clients]


def wait_for(answers: Sequence[Future[T]], timeout_seconds: float, who: Sequence[str]) -> list[T]:
    """Waits for all answers; `who` names the servers in the same order.

    Raises WeightSyncError as soon as a server refuses, and if a server does not answer in time.
    """
    done, waiting = concurrent.futures.wait(answers, timeout_seconds, concurrent.futures.FIRST_EXCEPTION)
    for answer in done:
        if isinstance(error := answer.exception(), UserError):
            raise WeightSyncError(f"weight sync: {error}") from error
        if error is not None:
            raise error
    if waiting:
        names = ", ".join(name for name, answer in zip(who, answers, strict=False) if answer in waiting)
        raise WeightSyncError(f"weight sync: no answer within weights.timeout, {timeout_seconds:g} s, from {names}")
    return [answer.result() for answer in answers]


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


def _mark_last(
    buckets: Iterable[list[tuple[str, Tensor]]],
) -> Iterator[tuple[list[tuple[str, Tensor]], bool]]:
    """Yields each non-empty bucket, and whether it is the last."""
    iterator = (bucket for bucket in buckets if bucket)
    current = next(iterator, None)
    while current is not None:
        following = next(iterator, None)
        yield current, following is None
        current = following


def _address_towards(url: str) -> str:
    """This machine's address as the server at `url` sees it."""
    host = url.split("//")[-1].split("/")[0].rsplit(":", 1)[0].strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # UDP: nothing is sent
        return str(probe.getsockname()[0])
