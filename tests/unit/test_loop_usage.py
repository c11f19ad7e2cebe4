"""Tokens a second, memory, and the share of the GPUs' arithmetic; a GPU's name stands in for the GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_tiny_model

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.data.packing import pack
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.gpus import GPUS, gpu_of
from megatron_rl.loop.usage import Usage, lengths_of
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.flops import forward_flops

TIMES = {"time/rollout": 6.0, "time/update": 2.0}


def mini_batch(*lengths: int) -> MiniBatch:
    prompt = Prompt("p", "", (5, 6, 7), "", "arithmetic")
    samples = [Sample.start(prompt, i).extend([9] * (n - 3), [-0.5] * (n - 3), 0) for i, n in enumerate(lengths)]
    packed = pack(samples, [0.0] * len(samples), total=64)
    return SimpleNamespace(micro_batches=(packed, pack([], [], total=64)))  # type: ignore[return-value]


def test_lengths_are_those_of_sequences_without_padding() -> None:
    assert lengths_of(mini_batch(12, 30)) == [12, 30]


def test_the_mfu_is_what_the_replica_s_gpus_did_of_what_they_could(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = read_architecture(make_tiny_model(tmp_path / "model", num_layers=2))
    layout = Layout.resolve(*parse_layout("tp=2,dp=3"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    usage = Usage(arch, layout, torch.device("cuda"), "bf16")
    for lengths in ((12, 30), (20,)):
        usage.count(mini_batch(*lengths))
    figures = usage.drain(400.0, TIMES)
    done = sum(3 * n * forward_flops(arch, n) for n in (12, 30, 20))
    assert figures.pop("throughput/mfu") == pytest.approx(done / (2.0 * 2 * GPUS["h100"].flops))
    assert figures.pop("memory/process") > 1e6
    assert figures == {"throughput/tokens_per_second": 50.0, "memory/gpu": 123.0}
    assert usage.drain(400.0, TIMES)["throughput/mfu"] == 0.0, "each step counts its own"
    assert "throughput/mfu" not in Usage(arch, layout, torch.device("cuda"), "fp32").drain(1.0, TIMES)


def test_a_cpu_has_no_mfu_and_no_memory_of_a_gpu(tmp_path: Path) -> None:
    arch = read_architecture(make_tiny_model(tmp_path / "model", num_layers=1))
    usage = Usage(arch, Layout.resolve(*parse_layout("tp=1")), torch.device("cpu"), "bf16")
    usage.count(mini_batch(12))
    assert usage.drain(400.0, TIMES).keys() == {"throughput/tokens_per_second", "memory/process"}
    assert usage.drain(0.0, {}).keys() == {"memory/process"}


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_gives_it(name: str, known: str | None) -> None:
    assert gpu_of(name) == (GPUS[known] if known else None)
