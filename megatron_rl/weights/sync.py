"""Sends the policy's weights to all rollout servers, by broadcast or by disk. The first sync is always verified."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.models.weights_io import torch_dtype
from megatron_rl.ranks.collectives import together
from megatron_rl.rollout.source import Leader
from megatron_rl.weights.collective import CollectiveRoute
from megatron_rl.weights.directory import DiskRoute
from megatron_rl.weights.stressed import StressedBuckets, read_stress
from megatron_rl.weights.substitute import substituted
from megatron_rl.weights.verify import ask_servers, probe, sampled_sequences, trainer_logprobs, verify


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
        self._route: CollectiveRoute | DiskRoute | None = None
        self._syncs = 0
        if leader is not None and config.route == "collective":
            self._route = CollectiveRoute(leader.clients, leader.loop, policy.device, config.timeout)
        elif leader is not None:
            dtype = torch_dtype(policy.engine.dtype)
            self._route = DiskRoute(leader.clients, leader.loop, directory, policy.model_dir, dtype, config.timeout)

    def push(self, version: int) -> dict[str, float]:
        """Brings all servers to weight version `version`; returns metrics to log. Collective.

        Raises WeightSyncError if a server fails.
        """
        exported = self._policy.export(self._config.bucket_mib << 20)
        stressed = None if self._stress is None else StressedBuckets(exported, self._stress, version)
        report: dict[str, float] = {}
        # All ranks leave together, or other leaders would send requests while rank 0 still sends weights.
        with together(self._policy.place.control):
            try:
                if self._route is not None:
                    report["weights/bytes"] = float(
                        self._route.push(exported if stressed is None else stressed, version)
                    )
                    if stressed is not None:
                        report["weights/stress/relative_error"] = stressed.relative_error
            finally:
                for _ in exported:  # the other ranks gather until every bucket is sent
                    pass
        return report

    def verify_if_due(self, version: int) -> dict[str, float]:
        """Verifies the first sync, and those that weights.verify says, and returns metrics to log. Collective.

        Raises WeightSyncError. The first is always verified, because SGLang accepts weights of a model with other
        shapes without an error.
        """
        syncs, every = self._syncs, self._config.verify
        self._syncs += 1
        return self._verify(version) if syncs == 0 or (every and syncs % every == 0) else {}

    def close(self) -> None:
        if self._route is not None:
            self._route.close()

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


def bound_of(config: WeightsConfig, exact: bool) -> float:
    """weights.verify_bound, or by default a bound on rounding. `exact`: trainer and servers use fp32 on a CPU."""
    return config.verify_bound or (1e-5 if exact else 0.1)
