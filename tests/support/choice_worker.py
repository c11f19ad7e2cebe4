"""Two leaders of two servers, one of which only the second leader has ejected, agree on who gets the next weights."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from fault_proxy import FaultProxy
from sync_worker import policy_of

from megatron_rl.config.schema import EngineConfig, RolloutConfig, WeightsConfig
from megatron_rl.loop.connections import Servers
from megatron_rl.loop.members import Members
from megatron_rl.ranks.collectives import broadcast_bytes
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.pool import Pool, PoolOptions
from megatron_rl.rollout.source import Leader
from megatron_rl.weights.sync import WeightSync


def main(model: str, url: str, directory: str) -> tuple[list[str], list[str], list[str]]:
    """Returns the two servers, those that get the weights, and those of them that are verified first; on rank 0."""
    policy = policy_of(model, "dp=2")
    is_first = policy.place.rank == 0
    loop, proxy = BackgroundLoop(), FaultProxy(url)
    with ExitStack() as stack:
        if is_first:
            loop.run(proxy.__aenter__())
            stack.callback(lambda: loop.run(proxy.__aexit__()))
        other = broadcast_bytes(proxy.url.encode() if is_first else None, policy.place.control).decode()
        leader = Leader([url, other], api_key=None, deadline=60.0)
        stack.callback(leader.close)
        if not is_first:
            leader.admit([url], {other: "did not answer"})
        rollout = RolloutConfig.model_validate(
            {"prompts_per_step": 1, "max_response_tokens": 1, "servers": {"urls": [url, other]}}
        )
        pool = Pool(PoolOptions(rollout, EngineConfig(), Path(model), Path(directory), 0)) if is_first else None
        sync = WeightSync(
            WeightsConfig(), policy, leader if is_first else None, Path(directory), temperature=1.0, seed=0
        )
        Members(policy.place.control, Servers(pool, leader)).choose(sync)
        dist.barrier(group=policy.place.control)
        return [url, other], sync.urls, sorted(sync.newcomers)
