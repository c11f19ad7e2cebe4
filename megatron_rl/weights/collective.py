"""Weights to rollout servers by broadcast: gloo from a CPU, NCCL from a GPU.

Rank 0 of the trainer and all tensor-parallel ranks of all servers form one process group; rank 0 is its rank 0. A
bucket is one flat byte tensor (SGLang's "flattened_bucket").
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _new_process_group_helper, _world

from megatron_rl.engine.device import backend
from megatron_rl.errors import UserError
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient

GROUP = "megatron_rl_weights"
T = TypeVar("T")


class WeightSyncError(UserError):
    """A server that refused weights, or did not answer in time."""


class CollectiveRoute:
    """Lives on the trainer's rank 0 only."""

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        loop: BackgroundLoop,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self._clients = clients
        self._loop = loop
        self._device = device
        self._timeout = timeout_seconds
        self._group: dist.ProcessGroup | None = None

    def push(self, buckets: Iterable[list[tuple[str, Tensor]]], version: int) -> int:
        """Sends the buckets as weight version `version`; returns the bytes sent. Raises WeightSyncError."""
        if self._group is None:
            self._group = self._join()
        wait_for(self._ask("begin_weight_update"), self._timeout)
        sent = 0
        for bucket, is_last in _mark_last(buckets):
            sent += self._send(bucket, version if is_last else None)
        wait_for(self._ask("end_weight_update"), self._timeout)
        return sent

    def close(self) -> None:
        if self._group is not None:
            wait_for(self._ask("destroy_weights_update_group", group_name=GROUP), self._timeout)
            dist.destroy_process_group(self._group)
            self._group = None

    def _send(self, bucket: list[tuple[str, Tensor]], version: int | None) -> int:
        flat = torch.cat([t.contiguous().flatten().view(torch.uint8) for _, t in bucket])
        answers = self._ask(
            "update_weights_from_distributed",
            names=[name for name, _ in bucket],
            dtypes=[str(t.dtype).removeprefix("torch.") for _, t in bucket],
            shapes=[list(t.shape) for _, t in bucket],
            group_name=GROUP,
            load_format="flattened_bucket",
            # Cached prefixes belong to the old weights; the version holds once the last bucket is in.
            flush_cache=version is not None,
            weight_version=version,
        )
        dist.broadcast(flat.to(self._device), src=0, group=self._group)
        wait_for(answers, self._timeout)
        return flat.numel()

    def _join(self) -> dist.ProcessGroup:
        """Rank 0 of a new group; the servers' ranks follow in the order of the clients."""
        tp_sizes = [self._loop.run(client.server_info())["tp_size"] for client in self._clients]
        world = 1 + sum(tp_sizes)
        timeout = datetime.timedelta(seconds=self._timeout)
        store = dist.TCPStore("0.0.0.0", 0, world, is_master=True, wait_for_workers=False, timeout=timeout)
        offsets = [1 + sum(tp_sizes[:i]) for i in range(len(tp_sizes))]
        answers = [
            self._loop.start(
                client.init_weights_update_group(
                    master_address=_address_towards(client.url),
                    master_port=store.port,
                    rank_offset=offset,
                    world_size=world,
                    group_name=GROUP,
                    backend=backend(self._device),
                )
            )
            for client, offset in zip(self._clients, offsets, strict=True)
        ]
        # torch has no public way to make a group outside the default world; SGLang's side does the same.
        group, _ = _new_process_group_helper(
            world,
            0,
            [],
            dist.Backend(backend(self._device)),
            PrefixStore(GROUP, store),
            group_name=GROUP,  # type: ignore[arg-type]
            timeout=timeout,
        )
        _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        wait_for(answers, self._timeout)
        return group

    def _ask(self, call: str, **arguments: Any) -> list[Future[Any]]:
        return [self._loop.start(getattr(client, call)(**arguments)) for client in self._clients]


def wait_for(answers: Sequence[Future[T]], timeout_seconds: float) -> list[T]:
    """Raises WeightSyncError when a server does not answer in time."""
    try:
        return [answer.result(timeout=timeout_seconds) for answer in answers]
    except TimeoutError as error:
        raise WeightSyncError(f"a server did not answer within {timeout_seconds:.0f} s") from error


def _mark_last(
    buckets: Iterable[list[tuple[str, Tensor]]],
) -> Iterator[tuple[list[tuple[str, Tensor]], bool]]:
    """Each non-empty bucket, and whether it is the last."""
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
