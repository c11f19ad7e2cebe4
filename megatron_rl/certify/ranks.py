"""Certifies on the ranks of one world: each layout with each recomputation, and the negative cases."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import torch
import torch.distributed as dist

from megatron_rl.certify.result import CertificateResult, CertificateSpec
from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.device import use_device
from megatron_rl.garbage import collect_rarely

if TYPE_CHECKING:
    from megatron_rl.certify.router_watch import ReplayCount
    from megatron_rl.certify.spoil import Spoiled
    from megatron_rl.data.sample import Sample
    from megatron_rl.engine.policy import Policy

FEW_SAMPLES = 6
"""Samples of a negative case. Its fault is in every sample, so a few show it."""


def worker(spec: CertificateSpec, answer: Path) -> None:
    device = use_device(spec.device)
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.heartbeat import Heartbeat
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    results: list[CertificateResult] = []
    with contextlib.ExitStack() as stack:
        for text in spec.layouts:
            layout = Layout.resolve(*parse_layout(text))
            place = start_process_groups(layout, device, seed=0)
            if not results:
                stack.enter_context(Heartbeat(place.control, EngineConfig().heartbeat))
            for recompute in spec.recompute:
                engine = EngineConfig(dtype=spec.dtype, recompute=recompute, device=spec.device)  # type: ignore[arg-type]
                policy = Policy(Path(spec.model), layout, place, engine, device, optim=None)
                results.append(_certify(policy, text))
            stop_process_groups(leave_world=False)
        if place.rank == 0:
            answer.write_bytes(orjson.dumps([asdict(r) for r in results]))
    stop_process_groups()


def _certify(policy: Policy, text: str) -> CertificateResult:
    from megatron_rl.certify.samples import make_samples
    from megatron_rl.certify.spoil import Spoiled, cases, refuses_fusion

    samples = make_samples(policy.arch)
    forward, backward, held = _prove(policy, samples, Spoiled(), trains=True)
    problems = [] if forward.holds else [f"forward: {forward}"]
    if backward is not None and not backward.holds:
        problems.append(f"recomputation: {backward}")
    few = samples[:FEW_SAMPLES]
    caught = {name: _is_caught(policy, few, case) for name, case in cases(policy).items()}
    return CertificateResult(
        layout=text,
        recompute=policy.engine.recompute,
        dtype=policy.engine.dtype,
        replayed_rows=forward.replayed,
        live_rows=forward.live,
        recomputed_rows=backward.replayed if backward else 0,
        trace_bytes=_maximum(policy, held),
        problems=problems,
        caught=caught | {"router fusion": _maximum(policy, not refuses_fusion(policy)) == 0},
    )


def _prove(
    policy: Policy, samples: list[Sample], case: Spoiled, *, trains: bool
) -> tuple[ReplayCount, ReplayCount | None, int]:
    """Returns the verdict on the forward pass, that on the recomputation or None, and bytes of routes on this rank.

    Without `trains` there is no backward pass.
    """
    from megatron_rl.certify.router_watch import RouterWatch, judge, share_rows
    from megatron_rl.engine.distribute import TrainSample, distribute
    from megatron_rl.routing.exchange import RouteExchange

    place, layout = policy.place, policy.layout
    # All samples begin on one leader, so that samples of other replicas must move.
    mine = case.samples(samples) if place.leads_replica and place.dp == 0 else []
    numbered = [TrainSample(i, i, sample, 1.0) for i, sample in enumerate(mine)]
    exchange = RouteExchange(policy.arch, policy.routers.layers, place, layout)
    (mini_batch,) = distribute(numbered, place, layout, mini_batches=1, max_tokens=64, routes=exchange)
    routes = [case.routes(each).to(policy.device) for each in mini_batch.routes or ()]
    reruns = policy.engine.recomputation.rerun_routers(layout, policy.arch) if trains else []
    routing = case.routing_pass(policy.routers, routes)
    masks = [torch.as_tensor(batch.loss_mask, device=policy.device) for batch in mini_batch.micro_batches]
    watch = RouterWatch(policy)
    with watch.on(reruns):
        if trains:
            policy.gradients(mini_batch.micro_batches, lambda i, logprobs, _: -(logprobs * masks[i]).sum(), routing)
        else:
            policy.logprobs(mini_batch.micro_batches, routing=routing)
    rows = share_rows(watch.rows, place)
    forward = judge(watch.forward, rows, samples, place, policy.arch.moe_layers)
    backward = judge(watch.backward, rows, samples, place, reruns) if reruns else None
    return forward, backward, sum(each.bytes for each in routes)


def _is_caught(policy: Policy, samples: list[Sample], case: Spoiled) -> bool:
    forward, backward, _ = _prove(policy, samples, case, trains=case.backward)
    if case.backward:
        return forward.holds and backward is not None and not backward.holds
    return not forward.holds


def _maximum(policy: Policy, value: int) -> int:
    largest = torch.tensor(int(value))
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=policy.place.control)
    return int(largest)


if __name__ == "__main__":
    collect_rarely()
    worker(CertificateSpec(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
