"""Weight sync: the policy to all rollout servers, by one of two routes; the first is verified, more if asked."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.ranks.collectives import together
from megatron_rl.rollout.source import Leader
from megatron_rl.weights.collective import CollectiveRoute
from megatron_rl.weights.directory import DiskRoute
from megatron_rl.weights.verify import ask_servers, probe, sampled_sequences, trainer_logprobs, verify


class WeightSync:
    """On every rank; `leader` is rank 0's connections and None elsewhere."""

    def __init__(
        self, config: WeightsConfig, policy: Policy, leader: Leader | None, directory: Path, temperature: float
    ) -> None:
        """`temperature`: at which the run's responses are sampled."""
        self._config = config
        self._temperature = temperature
        self._policy = policy
        self._leader = leader
        self._route: CollectiveRoute | DiskRoute | None = None
        self._syncs = 0
        if leader is not None and config.route == "collective":
            self._route = CollectiveRoute(leader.clients, leader.loop, policy.device, config.timeout)
        elif leader is not None:
            dtype = torch.bfloat16 if policy.engine.dtype == "bf16" else torch.float32
            self._route = DiskRoute(leader.clients, leader.loop, directory, policy.model_dir, dtype, config.timeout)

    def push(self, version: int) -> dict[str, float]:
        """All servers then hold weight version `version`; returns what is to be logged. Collective.

        Raises WeightSyncError when a server fails, or a verification does.
        """
        buckets = self._policy.export(self._config.bucket_mib << 20)
        report: dict[str, float] = {}
        # Together: other leaders would ask servers that rank 0 is still giving the weights to.
        with together(self._policy.place.control):
            try:
                if self._route is not None:
                    report["weights/bytes"] = float(self._route.push(buckets, version))
            finally:
                for _ in buckets:  # the ranks gather until all is sent
                    pass
        # The first always: SGLang takes weights of another shape of model without a word.
        if self._syncs == 0 or (self._config.verify and self._syncs % self._config.verify == 0):
            report |= self._verify(version)
        self._syncs += 1
        return report

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


def bound_of(config: WeightsConfig, exact: bool) -> float:
    """weights.verify_bound, or what honest rounding stays below. `exact`: trainer and servers compute in fp32 on a
    CPU."""
    return config.verify_bound or (1e-5 if exact else 0.1)
