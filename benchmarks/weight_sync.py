"""Weight syncs to a real SGLang server beside a raw gloo broadcast of the same bytes, in turn, in one run.

    python benchmarks/weight_sync.py [--model DIR | --size 1b] [--dtype bf16] [--bucket-mib 256] [--repeats 7]
    python -m megatron_rl.ranks.launch 2 benchmarks/weight_sync.py --layout tp=2

The raw broadcast goes from rank 0 to one process that throws the bytes away, bucket by bucket, and whose memory is
new for each bucket; with --raw-keeps it is used again, which takes half the time. The sync is all of it:
shards gathered, broadcast and loaded by the server, its session, its cache and its version. Machines are noisy, so what
counts is the median of the ratios of neighbouring runs. Small experts cost SGLang's loaders more time in Python than
in copies. On a GPU the broadcast's seconds count as loading.
"""

from __future__ import annotations

import datetime
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo
from train_throughput import Size, make_model

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, EngineDtype, WeightsConfig
from megatron_rl.engine.device import use_device
from megatron_rl.heap import keep_freed_memory
from megatron_rl.rollout.server import Server, ServerOptions, free_ports
from megatron_rl.rollout.source import Leader

TIMEOUT = datetime.timedelta(seconds=300)


def join(store: dist.TCPStore, rank: int) -> ProcessGroupGloo:
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    return ProcessGroupGloo(PrefixStore("raw", store), rank, 2, options)


def receive(port: int, sizes: list[int], keeps: bool) -> None:
    """Receives buckets of these sizes, again and again, until the sender ends this process. keeps: see --raw-keeps."""
    torch.set_num_threads(1)
    if keeps:
        keep_freed_memory()
    group = join(dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=TIMEOUT), 1)
    while True:
        for size in sizes:
            group.broadcast([torch.empty(size, dtype=torch.uint8)]).wait()
        group.barrier().wait()


def raw_broadcast(sizes: list[int], *, keeps: bool) -> tuple[Callable[[], None], multiprocessing.process.BaseProcess]:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    receiver = multiprocessing.get_context("spawn").Process(
        target=receive, args=(store.port, sizes, keeps), daemon=True
    )
    receiver.start()
    group = join(store, 0)
    buckets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]

    def broadcast() -> None:
        for bucket in buckets:
            group.broadcast([bucket]).wait()
        group.barrier().wait()

    return broadcast, receiver


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory; default: a random one of --size")] = None,
    size: Annotated[Size, typer.Option()] = "1b",
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    layout: Annotated[str, typer.Option(help="of the trainer, as tp=2")] = "tp=1",
    bucket_mib: Annotated[int, typer.Option()] = WeightsConfig().bucket_mib,
    repeats: Annotated[int, typer.Option()] = 7,
    raw_keeps: Annotated[
        bool, typer.Option(help="the raw receiver keeps freed memory, as servers on a CPU do")
    ] = False,
) -> None:
    device = use_device("cpu")
    from megatron_rl.demo.demo_model import make_tokenizer
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.collectives import broadcast_bytes
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups
    from megatron_rl.weights.all_servers import AllServers
    from megatron_rl.weights.collective import CollectiveRoute

    torch.set_num_threads(1)
    resolved = Layout.resolve(*parse_layout(layout))
    place = start_process_groups(resolved, device, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            model = Path(broadcast_bytes(str(Path(scratch) / "model").encode(), place.control).decode())
            if place.rank == 0:
                make_model(model, size, dtype, device)
                make_tokenizer().save_pretrained(model)  # without one SGLang's health check ends the server
        dist.barrier(place.control)
        policy = Policy(model, resolved, place, EngineConfig(device="cpu", dtype=dtype), device, optim=None)
        bucket_bytes = bucket_mib << 20
        sizes = [sum(weight.nbytes for _, weight in bucket) for bucket in policy.export(bucket_bytes)]
        if place.rank != 0:
            for _ in range(repeats + 1):
                for _ in policy.export(bucket_bytes, reuse=True):
                    pass
            return stop_process_groups()
        (port,) = free_ports(1)
        options = ServerOptions(model, port=port, device="cpu", dtype=dtype, threads=1, max_total_tokens=8192)
        server = Server(options, Path(scratch) / "server.log")
        raw, receiver = raw_broadcast(sizes, keeps=raw_keeps)
        leader = None
        try:
            server.wait_ready(300.0)
            leader = Leader([server.url], api_key=None, deadline=300.0)
            route = CollectiveRoute(AllServers(leader.clients, leader.loop, 300.0), device)
            route.push(policy.export(bucket_bytes, reuse=True), 0)  # joins the group
            seconds: dict[str, list[float]] = {"raw broadcast": [], "weight sync": []}
            for version in range(1, repeats + 1):
                start = time.perf_counter()
                raw()
                middle = time.perf_counter()
                sent = route.push(policy.export(bucket_bytes, reuse=True), version)
                seconds["raw broadcast"].append(middle - start)
                seconds["weight sync"].append(time.perf_counter() - middle)
                for phase, spent in sent.seconds.items():
                    seconds.setdefault(f"  {phase}", []).append(spent)
            route.close()
        finally:
            if leader is not None:
                leader.close()
            receiver.kill()
            server.stop()
    mebibytes = sum(sizes) / 2**20
    print(f"{dtype}, {layout}: {mebibytes:.0f} MiB in {len(sizes)} buckets")
    for name, spent in seconds.items():
        median, best = statistics.median(spent), min(spent)
        print(f"{name:15} {median:.3f} s {mebibytes / median:7.0f} MiB/s; at best {best:.3f} s")
    ratios = sorted(r / s for r, s in zip(seconds["raw broadcast"], seconds["weight sync"], strict=True))
    print(f"raw seconds / sync's: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); goal .8")
    stop_process_groups()


if __name__ == "__main__":
    typer.run(main)
