"""What R3 costs: the trainer's step with and without it, and the traces' share of the rollout, side by side in one run.

    python benchmarks/replay_cost.py [--model DIR] [--device cuda --dtype bf16] [--repeats 7]

A server of its own samples 64 responses again and again, in turn with and without their routes; the trainer then
makes the old-log-prob pass and the gradients of one mini-batch of them, in turn live and under R3. Machines are noisy,
so what counts is the median of the ratios of neighbouring runs. The trainer has one rank, on the server's GPU if there
is one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import httpx
import orjson
import typer

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, Device, EngineConfig, EngineDtype, RoutingConfig
from megatron_rl.cores import usable_cores
from megatron_rl.data.arithmetic_task import ALPHABET, ArithmeticTask, prompt_text
from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.demo.first_run import CONFIGS
from megatron_rl.engine.device import use_device
from megatron_rl.models.architecture import read_architecture
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups
from megatron_rl.rollout.server import Server, ServerOptions, free_ports
from megatron_rl.routing.wire import RouteSpec

SEQUENCES, GROUP = 64, 8


def prompts() -> list[tuple[int, Prompt]]:
    texts = [prompt_text(terms) for terms in ArithmeticTask(count=SEQUENCES // GROUP).problems()]
    ids = [tuple(2 + ALPHABET.index(character) for character in text) for text in texts]
    return [(n, Prompt(str(n), text, i, "", "")) for n, (text, i) in enumerate(zip(texts, ids, strict=True))]


def rollouts(url: str, sampling: Sampling, repeats: int) -> tuple[list[Group], list[float], list[float]]:
    """The last groups with routes, and the seconds of each rollout without and with them."""

    async def run() -> tuple[list[Group], list[float], list[float]]:
        without, with_routes = [], []
        plain = dataclasses.replace(sampling, routes=None)
        async with SGLangClient(url, deadline=600.0) as client:
            sampler = Sampler(Fleet([client]), SEQUENCES)
            for repeat in range(repeats + 1):
                for chosen, seconds in ((plain, without), (sampling, with_routes)):
                    start = time.perf_counter()
                    groups = await rollout_groups(sampler, prompts(), chosen)
                    if repeat:  # the first round warms up
                        seconds.append(time.perf_counter() - start)
        return groups, without, with_routes

    return asyncio.run(run())


def answer_share(url: str, prompt: Prompt) -> tuple[int, int]:
    """(bytes of the routes, bytes of the whole answer) of one request."""
    body = {"input_ids": prompt.token_ids, "return_logprob": True, "return_routed_experts": True}
    body["sampling_params"] = {"max_new_tokens": 64, "ignore_eos": True}
    answer = httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False)
    return len(orjson.loads(answer.content)["meta_info"]["routed_experts"]), len(answer.content)


def trainer_steps(model: Path, samples: list[Sample], engine: EngineConfig) -> dict[str, Callable[[], None]]:
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(free_ports(1)[0]))
    device = use_device(engine.device)
    from megatron_rl.engine.distribute import TrainSample, distribute
    from megatron_rl.engine.packed_losses import PolicyLoss
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups
    from megatron_rl.routing.drift import RoutingStats
    from megatron_rl.routing.exchange import RouteExchange, valid_rows
    from megatron_rl.routing.modes import MiniBatchRouting

    layout = Layout.resolve(*parse_layout("tp=1"))
    place = start_process_groups(layout, device, seed=0)
    policy = Policy(model, layout, place, engine, device, optim=None)
    objective = load_config(Config, CONFIGS / "gspo.yaml").objective
    exchange = RouteExchange(policy.arch, policy.routers.layers, place, layout)
    arch = policy.arch
    numbered = [TrainSample(i, i // GROUP, sample, (-1.0) ** i) for i, sample in enumerate(samples)]

    def step(replay: str) -> None:
        routes = exchange if replay == "r3" else None
        (batch,) = distribute(numbered, place, layout, mini_batches=1, max_tokens=8192, routes=routes)
        stats = RoutingStats(arch.moe_layers, arch.num_experts, arch.experts_per_token, device)
        valid = [valid_rows(packed, layout, place, device) for packed in batch.micro_batches]
        config = RoutingConfig(replay=replay)  # type: ignore[arg-type]
        routing = MiniBatchRouting(config, policy.routers, batch.routes, valid, stats)
        old = [p for p, _ in policy.logprobs(batch.micro_batches, routing=routing.old_pass())]
        policy.gradients(batch.micro_batches, PolicyLoss(objective, batch, old, device), routing.update_pass())
        stats.finalize()

    return {replay: lambda replay=replay: step(replay) for replay in ("none", "r3")}  # type: ignore[misc]


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory; else the demo's architecture")] = None,
    device: Annotated[Device, typer.Option(help="of server and trainer")] = "cpu",
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    repeats: Annotated[int, typer.Option()] = 7,
) -> None:
    import torch

    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            from megatron_rl.demo.demo_model import make_demo_model

            model = Path(scratch) / "model"
            make_demo_model(model)
        arch = read_architecture(model)
        options = ServerOptions(model, port=free_ports(1)[0], device=device, dtype=dtype, return_routed_experts=True)
        flags = ("--weight-version", "0", *(() if device == "cpu" else ("--mem-fraction-static", "0.3")))
        server = Server(dataclasses.replace(options, extra_flags=flags), Path(scratch) / "log")
        try:
            server.wait_ready(300)
            sampling = Sampling(
                GROUP, 64, 1.0, SEQUENCES, arch.vocab_size, frozenset({0}), seed=0, routes=RouteSpec.of(arch)
            )
            groups, without, with_routes = rollouts(server.url, sampling, repeats)
            routes, answer = answer_share(server.url, prompts()[0][1])
        finally:
            server.stop()
        samples = [sample for group in groups for sample in group.samples]
        steps = trainer_steps(model, samples, EngineConfig(device=device, dtype=dtype))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                torch.cuda.synchronize()
                if repeat:
                    seconds[name].append(time.perf_counter() - start)

    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    traces = [sample.trace for sample in samples if sample.trace is not None]
    held, rows = sum(trace.experts.nbytes + trace.present.nbytes for trace in traces), sum(t.rows for t in traces)
    print(f"trainer's step, live:          {statistics.median(seconds['none']):.3f} s")
    print(f"trainer's step, R3 / live:     {ratio(seconds['r3'], seconds['none']):.3f}  (goal: at most 1.05)")
    print(f"rollout, with routes / without: {ratio(with_routes, without):.3f}")
    print(f"routes in an answer:           {routes} of {answer} bytes ({routes / answer:.0%})")
    print(f"traces as held:                {held} bytes, {held / rows:.1f} a row")


if __name__ == "__main__":
    typer.run(main)
