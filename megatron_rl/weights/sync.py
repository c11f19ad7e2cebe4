"""Brings the policy's weights to all rollout servers. The first sync is always verified."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import orjson

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.models.weights_io import torch_dtype
from megatron_rl.ranks.collectives import broadcast_bytes, together
from megatron_rl.rollout.source import Leader
from megatron_rl.weights.all_servers import AllServers, Sent
from megatron_rl.weights.collective import CollectiveRoute
from megatron_rl.weights.delta import DeltaRoute, Published, gather_changes
from megatron_rl.weights.directory import DiskRoute
from megatron_rl.weights.stressed import StressedBuckets, read_stress
from megatron_rl.weights.substitute import substituted
from megatron_rl.weights.verify import (
    ask_servers,
    check_checksums,
    form_of,
    probe,
    sampled_sequences,
    trainer_logprobs,
    verify,
)


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
    ) -> None:
        """`temperature` is the sampling temperature of the run's responses, `seed` the run's."""
        self._config = config
        self._stress = read_stress(config.stress, policy.arch, seed)
        self._temperature = temperature
        self._policy = policy
        self._leader = leader
        self._published = Published(policy) if config.route == "delta" else None
        self._servers: AllServers | None = None
        self._route: CollectiveRoute | DiskRoute | DeltaRoute | None = None
        self._syncs = 0
        self._kind = "whole"  # of the last sync
        self._was_verified = {"whole": False, "changes": False}
        if leader is not None:
            self._servers = AllServers(leader.clients, leader.loop, config.timeout)
            self._route = self._make_route(self._servers, directory)

    def _make_route(self, servers: AllServers, directory: Path) -> CollectiveRoute | DiskRoute | DeltaRoute:
        policy = self._policy
        if self._config.route == "collective":
            return CollectiveRoute(servers, policy.device)
        disk = DiskRoute(servers, directory, policy.model_dir, torch_dtype(policy.engine.dtype))
        return disk if self._config.route == "disk" else DeltaRoute(disk)

    def push(self, version: int) -> dict[str, float]:
        """Brings all servers to weight version `version`; returns metrics to log. Collective.

        Raises WeightSyncError if a server fails.
        """
        self._kind = "changes" if self._published is not None and self._all_hold(self._published.version) else "whole"
        report = self._push_changes(version) if self._kind == "changes" else self._push_whole(version)
        if self._published is not None:
            self._published.remember(version)
        return report

    def verify_if_due(self, version: int) -> dict[str, float]:
        """Verifies the first sync, and those that weights.verify says, and returns metrics to log. Collective.

        Raises WeightSyncError. The first is always verified, because SGLang accepts weights of a model with other
        shapes without an error; with weights.route delta also the first of changed elements.
        """
        kind, syncs, every = self._kind, self._syncs, self._config.verify
        self._syncs += 1
        if not self._was_verified[kind] or (every and syncs % every == 0):
            self._was_verified[kind] = True
            return self._verify(version)
        return {}

    def close(self) -> None:
        if self._route is not None:
            self._route.close()

    def _push_whole(self, version: int) -> dict[str, float]:
        exported = self._policy.export(self._config.bucket_mib << 20, reuse=True)
        stressed = None if self._stress is None else StressedBuckets(exported, self._stress, version)
        report: dict[str, float] = {}
        start = time.perf_counter()
        # All ranks leave together, or other leaders would send requests while rank 0 still sends weights.
        with together(self._policy.place.control):
            try:
                if self._route is not None:
                    sent = self._route.push(exported if stressed is None else stressed, version)
                    report = self._measured(sent, start)
                    if stressed is not None:
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
        with together(self._policy.place.control):
            if changes is not None:
                assert isinstance(self._route, DeltaRoute)
                report = self._measured(self._route.push_changes(changes, version), start)
                report["weights/changed"] = changes.changed / changes.elements
        return report

    def _all_hold(self, version: int | None) -> bool:
        """Tells whether all servers hold the version. Collective."""
        found = b""
        with together(self._policy.place.control):
            if isinstance(self._route, DeltaRoute):
                found = orjson.dumps(self._route.holds(version))
        return bool(orjson.loads(broadcast_bytes(found or None, self._policy.place.control)))

    def _measured(self, sent: Sent, start: float) -> dict[str, float]:
        """Returns what a sync moved and took since `start`. Raises WeightSyncError if servers differ after it."""
        assert self._servers is not None
        seconds = time.perf_counter() - start
        return {
            "weights/bytes": float(sent.bytes),
            "weights/seconds": seconds,
            **{f"weights/seconds/{phase}": spent for phase, spent in sent.seconds.items()},
            "weights/bytes_per_second": sent.bytes / seconds,
            "weights/checksum": checksum(self._servers),
        }

    def _verify(self, version: int) -> dict[str, float]:
        policy, leader = self._policy, self._leader
        temperature = self._temperature
        asked = None
        with together(policy.place.control):
            if leader is not None:
                asked = leader.loop.run(ask_servers(leader.clients, policy.arch, temperature, version))
        with self._with_servers_weights(version):
            expected = trainer_logprobs(policy, probe(policy.arch), 1.0)
            sampled = trainer_logprobs(policy, sampled_sequences(asked, policy), temperature)
        result = None
        with together(policy.place.control):
            if asked is not None and expected is not None and sampled is not None:
                exact = policy.engine.dtype == "fp32" and policy.device.type == "cpu" and asked.are_exact
                bound = bound_of(self._config, exact)
                result = verify(asked, expected, sampled, bound, temperature)
        if result is None:
            return {}
        return {
            "weights/probe_max_abs_diff": result.max_abs_diff,
            "weights/probe_mean_abs_diff": result.mean_abs_diff,
            "weights/sampled_mean_abs_diff": result.sampled_mean_abs_diff,
        }

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
