"""Brings the policy's weights to all rollout servers. The first sync is verified, and the first of a server that comes
later. After the first sync, a server that fails is left out, and the others get the weights again."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.errors import UserError
from megatron_rl.models.weights_io import torch_dtype
from megatron_rl.ranks.collectives import broadcast_bytes, together
from megatron_rl.rollout.answers import RolloutError
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.fleet import silent_servers
from megatron_rl.rollout.source import Leader
from megatron_rl.weights.all_servers import AllServers, Sent, WeightSyncError
from megatron_rl.weights.collective import CollectiveRoute
from megatron_rl.weights.delta import DeltaRoute, Published, gather_changes
from megatron_rl.weights.directory import DiskRoute
from megatron_rl.weights.shared import SharedRoute
from megatron_rl.weights.stressed import StressedBuckets, read_stress
from megatron_rl.weights.substitute import substituted
from megatron_rl.weights.verify import (
    Asked,
    ask_servers,
    check_checksums,
    form_of,
    probe,
    sampled_sequences,
    trainer_logprobs,
    verify,
)

logger = logging.getLogger(__name__)


class WeightSync:
    """Every rank has one. `leader` holds rank 0's connections, and is None on other ranks."""

    def __init__(
        self,
        config: WeightsConfig,
        policy: Policy,
        leader: Leader | None,
        directory: Path,
        *,
        temperature: float,
        seed: int,
        sampling: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """`temperature` is the sampling temperature of the run's responses, `seed` the run's. In the context that
        `sampling` gives, the servers answer requests."""
        self._config = config
        self._stress = read_stress(config.stress, policy.arch, seed)
        self._temperature = temperature
        self._policy = policy
        self._leader = leader
        self._sampling = sampling
        self._published = Published(policy) if config.route == "delta" else None
        self._directory = directory
        self._servers: AllServers | None = None
        self._route: CollectiveRoute | DiskRoute | DeltaRoute | SharedRoute | None = None
        self._clients: Sequence[SGLangClient] = [] if leader is None else leader.clients
        self._places = self.urls
        self.newcomers: set[str] = set()
        """Servers, by URL, that have come to the others and were not verified yet. On rank 0."""
        self.lost: dict[str, str] = {}
        """Says by URL why servers were left out since `use` was called. On rank 0."""
        self._syncs = 0
        self._kind = "whole"  # of the last sync
        self._was_verified = {"whole": False, "changes": False}

    @property
    def urls(self) -> list[str]:
        """The servers that get the weights. On rank 0."""
        return [client.url for client in self._clients]

    def use(self, clients: Sequence[SGLangClient], newcomers: Sequence[str]) -> None:
        """Gives the next weight version to these servers. Newcomers, by URL, are verified. Rank 0 alone says which."""
        self._clients, self.newcomers, self.lost = clients, set(newcomers), {}

    def leave_out(self, lost: Mapping[str, str]) -> None:
        """Gives these servers no weights; says by URL why. On rank 0."""
        self._clients = [client for client in self._clients if client.url not in lost]
        self.newcomers -= lost.keys()
        self.lost |= lost

    def push(self, version: int) -> dict[str, float]:
        """Brings all servers to weight version `version`; returns metrics to log. Collective.

        After the first sync it leaves out servers that fail, and begins again with the others. Raises WeightSyncError
        if there are none, or if it is not known which server is at fault; and DiskError.
        """
        report, error = self._try_to_push(version)
        while self._leaves_out(error, self.urls):
            report, error = self._try_to_push(version)
        if self._published is not None:
            self._published.remember(version)
        return report

    def verify_if_due(self, version: int) -> dict[str, float]:
        """Verifies the first sync, and those that weights.verify says, and returns metrics to log. Collective.

        Raises WeightSyncError. The first is always verified, because SGLang accepts weights of a model with other
        shapes without an error; with weights.route delta also the first of changed elements.
        """
        kind, syncs, every = self._kind, self._syncs, self._config.verify
        due = self._have_newcomers() or not self._was_verified[kind] or (every > 0 and syncs % every == 0)
        report = self._verify(version) if due else {}
        self._was_verified[kind] = True
        self._syncs += 1
        return report

    def close(self) -> None:
        if self._route is not None:
            self._route.close()

    def _try_to_push(self, version: int) -> tuple[dict[str, float], UserError | None]:
        """Returns the metrics, or on rank 0 why it has failed."""
        try:
            self._open_route()
            is_change = self._published is not None and self._all_hold(self._published.version)
            self._kind = "changes" if is_change else "whole"
            return (self._push_changes(version) if is_change else self._push_whole(version)), None
        except UserError as error:
            return {}, error

    def _open_route(self) -> None:
        """Has a route to the servers of now."""
        policy = self._policy
        if self._config.route == "ipc" and self._leader is None:
            self._route = SharedRoute(None, [], policy.place, policy.device)
        if self._leader is None or (self._servers is not None and self._servers.urls == self.urls):
            return
        self.close()
        servers = self._servers = AllServers(self._clients, self._leader.loop, self._config.timeout)
        if self._config.route == "collective":
            self._route = CollectiveRoute(servers, policy.device)
            return
        if self._config.route == "ipc":
            self._route = SharedRoute(servers, self._places, policy.place, policy.device)
            return
        disk = DiskRoute(servers, self._directory, policy.model_dir, torch_dtype(policy.engine.dtype))
        self._route = disk if self._config.route == "disk" else DeltaRoute(disk)

    def _leaves_out(self, error: UserError | None, suspects: Sequence[str]) -> bool:
        """Tells whether to begin again, without servers at fault, of which the suspects are those that a refusal may
        be held against. Raises rank 0's `error` on all ranks if there is nobody to leave out. Collective."""
        control = self._policy.place.control
        # All ranks leave together, or other leaders would send requests while rank 0 still sends weights.
        again = error is not None and self._finds_fault(error, suspects)
        if broadcast_bytes(b"again" if again else None, control):
            return True
        with together(control):
            if error is not None:
                raise error
        return False

    def _finds_fault(self, error: UserError, suspects: Sequence[str]) -> bool:
        """Leaves out the servers at fault. The error of one may be due to another, which has died in a collective."""
        if self._syncs == 0 or self._leader is None or not isinstance(error, WeightSyncError | RolloutError):
            return False
        self.close()  # or living servers would wait for dead ones
        silent = self._leader.loop.run(silent_servers(self._clients))
        refusing = [url for url in getattr(error, "urls", ()) if url in suspects]
        faulty = silent or refusing
        if not faulty or len(faulty) == len(self._clients):
            return False
        logger.warning("%s: left out of a weight sync: %s", ", ".join(faulty), error)
        self.leave_out(dict.fromkeys(faulty, str(error)))
        return True

    def _have_newcomers(self) -> bool:
        told = broadcast_bytes(b"new" if self.newcomers else None, self._policy.place.control)
        return bool(told)

    def _push_whole(self, version: int) -> dict[str, float]:
        exported = self._policy.export(self._config.bucket_mib << 20, reuse=True)
        stressed = None if self._stress is None else StressedBuckets(exported, self._stress, version)
        report: dict[str, float] = {}
        start = time.perf_counter()
        try:
            if self._route is not None:
                sent = self._route.push(exported if stressed is None else stressed, version)
                report = self._measured(sent, start) if self._servers is not None else {}
                if report and stressed is not None:
                    report["weights/stress/relative_error"] = stressed.relative_error
        finally:
            for _ in exported:  # the other ranks gather until every bucket is sent
                pass
        return report

    def _push_changes(self, version: int) -> dict[str, float]:
        assert self._published is not None
        start = time.perf_counter()
        self._policy.gather_weights()
        changes = gather_changes(self._published.changes(), self._policy)
        report: dict[str, float] = {}
        if changes is not None:
            assert isinstance(self._route, DeltaRoute)
            report = self._measured(self._route.push_changes(changes, version), start)
            report["weights/changed"] = changes.changed / changes.elements
        return report

    def _all_hold(self, version: int | None) -> bool:
        """Tells whether all servers hold the version. Collective."""
        hold = False
        with contextlib.suppress(UserError):  # whoever does not answer now fails again
            hold = isinstance(self._route, DeltaRoute) and self._route.holds(version)
        return bool(broadcast_bytes(b"hold" if hold else None, self._policy.place.control))

    def _measured(self, sent: Sent, start: float) -> dict[str, float]:
        """Returns what a sync moved and took since `start`. Raises WeightSyncError if servers differ after it."""
        assert self._servers is not None
        seconds = time.perf_counter() - start
        return {
            "weights/servers": float(len(self._clients)),
            "weights/bytes": float(sent.bytes),
            "weights/seconds": seconds,
            **{f"weights/seconds/{phase}": spent for phase, spent in sent.seconds.items()},
            "weights/bytes_per_second": sent.bytes / seconds,
            "weights/checksum": checksum(self._servers),
        }

    def _verify(self, version: int) -> dict[str, float]:
        """Compares servers and trainer. Leaves out newcomers that differ, if there are others."""
        with self._sampling():
            asked, error = self._ask(version)
            while self._leaves_out(error, []):
                asked, error = self._ask(version)
        report, error = self._compare(asked, version)
        return self._verify(version) if self._leaves_out(error, list(self.newcomers)) else report

    def _ask(self, version: int) -> tuple[Asked | None, UserError | None]:
        if self._leader is None:
            return None, None
        try:
            asking = ask_servers(self._clients, self._policy.arch, self._temperature, version)
            return self._leader.loop.run(asking), None
        except UserError as error:
            return None, error

    def _compare(self, asked: Asked | None, version: int) -> tuple[dict[str, float], UserError | None]:
        policy, temperature = self._policy, self._temperature
        with self._with_servers_weights(version):
            expected = trainer_logprobs(policy, probe(policy.arch), 1.0)
            sampled = trainer_logprobs(policy, sampled_sequences(asked, policy), temperature)
        if asked is None or expected is None or sampled is None:
            return {}, None
        exact = policy.engine.dtype == "fp32" and policy.device.type == "cpu" and asked.are_exact
        try:
            result = verify(asked, expected, sampled, bound_of(self._config, exact), temperature)
        except WeightSyncError as error:
            return {}, error
        return {
            "weights/probe_max_abs_diff": result.max_abs_diff,
            "weights/probe_mean_abs_diff": result.mean_abs_diff,
            "weights/sampled_mean_abs_diff": result.sampled_mean_abs_diff,
        }, None

    def _with_servers_weights(self, version: int) -> contextlib.AbstractContextManager[None]:
        """Gives the policy the weights that the servers got as `version`, until the end of the block. Collective."""
        stress = self._stress
        if stress is None:
            return contextlib.nullcontext()
        return substituted(
            self._policy, self._config.bucket_mib << 20, lambda name, weight: stress.change(name, weight, version)
        )


def checksum(servers: AllServers) -> float:
    """Returns the first 48 bits of the first server's checksum. Raises WeightSyncError if servers differ."""
    checksums = dict(zip(servers.urls, servers.ask("weights_checksum"), strict=True))
    check_checksums(checksums, dict(zip(servers.urls, map(form_of, servers.ask("server_info")), strict=True)))
    return float(int(checksums[servers.urls[0]][:12], 16))


def bound_of(config: WeightsConfig, exact: bool) -> float:
    """weights.verify_bound, or by default a bound on rounding. `exact`: trainer and servers use fp32 on a CPU."""
    return config.verify_bound or (1e-5 if exact else 0.1)
