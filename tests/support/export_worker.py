"""Checks on ranks that every layout exports the checkpoint and rejects mismatches."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from models_reference import (
    chunk_layers,
    chunk_parameters,
    dense_architecture,
    hf_tensors,
    moe_architecture,
    stage_module,
    weight_names,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine import export
from megatron_rl.engine.export import export_stream
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weight import Weight

if TYPE_CHECKING:
    from megatron_rl.ranks.place import Place

MOE = moe_architecture()
TIED = dense_architecture(tied_embeddings=True)
CASES: dict[int, list[tuple[Architecture, str]]] = {
    2: [(MOE, "tp=2,etp=2"), (MOE, "pp=2,vpp=2"), (MOE, "ep=2"), (TIED, "pp=2")],
    4: [
        (MOE, "dp=4"),
        (MOE, "tp=4"),  # more ranks than key-value heads; four replicas of the experts
        (MOE, "tp=2,pp=2,ep=2"),
        (MOE, "tp=2,ep=2,etp=2,dp=2"),
        (MOE, "pp=2,vpp=2,ep=2"),
        (MOE, "cp=2,ep=4"),
        (MOE, "pp=4"),
        (TIED, "tp=2,pp=2"),
    ],
}


def two_ranks() -> None:
    for arch, layout in CASES[2]:
        check_stand_ins(arch, layout, bucket_bytes=2000)
    check_mutations_are_seen(dist.get_rank())
    check_one_dtype(dist.get_rank())


def four_ranks(models: Path) -> None:
    for number, (arch, layout) in enumerate(CASES[4]):
        check_stand_ins(arch, layout, bucket_bytes=10**9 if number == 1 else 2000)
    for layout in ("tp=2,pp=2,ep=2", "pp=2,vpp=2,ep=2", "tp=2,ep=2,etp=2,dp=2"):
        check_engine(models / "qwen3_moe", layout)
    check_engine(models / "qwen3", "tp=2,pp=2")
    for layout in ("tp=2,pp=2,ep=2", "pp=2,vpp=2,ep=2"):
        check_engine(models / "deepseek_v3", layout)
    check_biases_stay_fp32(models / "deepseek_v3", models / "saved")
    check_ranks_that_do_not_fit(dist.get_rank())
    check_another_order(dist.get_rank())


def start(text: str) -> tuple[Layout, Place]:
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    layout = Layout.resolve(*parse_layout(text))
    stop_process_groups(leave_world=False)
    place = start_process_groups(layout, torch.device("cpu"), seed=0)
    return layout, place


def build(hf: dict[str, Tensor], arch: Architecture, layout: Layout, place: Place) -> list[nn.Module]:
    """Builds stand-ins for this rank's stages. Replicas after the first hold NaN, which must not be exported."""
    from megatron.core import parallel_state as mpu

    expert_replica = mpu.get_expert_data_parallel_rank()
    replica = mpu.get_data_parallel_rank(with_context_parallel=True)
    tp, ep, etp = (place.tp, layout.tp), (place.ep, layout.ep), (place.etp, layout.etp)
    stages = []
    for layers in chunk_layers(arch, place.pp, layout.pp, layout.vpp):
        parameters = chunk_parameters(hf, arch, layers, tp=tp, ep=ep, etp=etp)
        for name, tensor in parameters.items():
            if expert_replica if ".experts." in name else replica:
                parameters[name] = torch.full_like(tensor, torch.nan)
        stages.append(stage_module(parameters, layers))
    return stages


def flat(buckets: Iterable[list[tuple[str, Tensor]]]) -> list[tuple[str, Tensor]]:
    return [pair for bucket in buckets for pair in bucket]


def check_stand_ins(arch: Architecture, layout_text: str, bucket_bytes: int) -> None:
    layout, place = start(layout_text)
    hf = hf_tensors(arch)
    stages = build(hf, arch, layout, place)
    buckets = list(export_stream(stages, arch, layout, weight_names(), bucket_bytes))
    # Gradients are exported in the same way.
    for stage in stages:
        for parameter in stage.parameters():
            parameter.main_grad = -2 * parameter.data.double()  # type: ignore[attr-defined]
    gradients = flat(export_stream(stages, arch, layout, weight_names(), bucket_bytes, lambda p: p.main_grad))  # type: ignore[attr-defined]

    count = torch.tensor([len(buckets), -len(buckets)])
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    assert count.tolist() == [len(buckets), -len(buckets)]
    if dist.get_rank() > 0:
        assert all(bucket == [] for bucket in [*buckets, gradients])
        return
    exported = flat(buckets)
    assert [name for name, _ in exported] == list(hf), layout
    assert [name for name, _ in gradients] == list(hf), layout
    for (name, tensor), (_, gradient) in zip(exported, gradients, strict=True):
        assert torch.equal(tensor, hf[name]), (layout, name)
        assert gradient.dtype == torch.float64
        assert torch.equal(gradient, -2 * hf[name].double()), (layout, name)
        assert not tensor.requires_grad
    assert all(buckets)
    assert (len(buckets) == 1) == (bucket_bytes > 10**6)
    qkv_rows = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim  # rows of the largest weight here
    most = max(bucket_bytes, 4 * qkv_rows * arch.hidden_size)
    assert max(sum(t.nbytes for _, t in bucket) for bucket in buckets) <= most


def check_engine(model: Path, layout_text: str) -> None:
    """Checks that real Megatron-Core stages, loaded from transformers' file, export the same tensors."""
    from megatron_rl.engine.policy import Policy

    layout, place = start(layout_text)
    engine = EngineConfig(device="cpu", dtype="fp32")
    policy = Policy(model, layout, place, engine, torch.device("cpu"), optim=None)
    exported = dict(flat(policy.export(bucket_bytes=5000)))
    if dist.get_rank() == 0:
        file = load_file(model / "model.safetensors")
        assert exported.keys() == file.keys()
        assert [name for name in file if not torch.equal(exported[name], file[name])] == []


def check_biases_stay_fp32(model: Path, saved: Path) -> None:
    """Checks that a bf16 model exports and saves its routers' biases to the bit, and all else in bf16."""
    from megatron_rl.engine.policy import Policy
    from megatron_rl.models.weights_io import save_weights

    layout, place = start("tp=2,pp=2,ep=2")
    engine = EngineConfig(device="cpu", dtype="bf16")
    policy = Policy(model, layout, place, engine, torch.device("cpu"), optim=None)
    buckets = [bucket for bucket in policy.export(bucket_bytes=10**9) if bucket]
    dtypes = [{tensor.dtype for _, tensor in bucket} for bucket in buckets]
    assert dtypes == ([{torch.bfloat16}, {torch.float32}] if dist.get_rank() == 0 else [])
    if dist.get_rank() == 0:
        save_weights(flat(buckets), saved, model, 10**9, torch.bfloat16)
        file, written = load_file(model / "model.safetensors"), load_file(saved / "model.safetensors")
        biases = [name for name in file if name.endswith("e_score_correction_bias")]
        assert len(biases) == 3
        for name, tensor in file.items():
            expected = tensor if name in biases else tensor.bfloat16()
            assert written[name].dtype == expected.dtype
            assert torch.equal(written[name], expected)


def check_ranks_that_do_not_fit(rank: int) -> None:
    layout, place = start("tp=2,pp=2,ep=2")
    stages = build(hf_tensors(MOE), MOE, layout, place)
    with pytest.raises(RuntimeError, match=f"ranks disagree: .* on rank {rank}"):
        export_stream(stages, MOE, layout, weight_names(), 2000 + rank // 3)
    odd = torch.bfloat16 if rank == 1 else torch.float32
    with pytest.raises(RuntimeError, match=f"ranks disagree: .* on rank {rank}"):
        export_stream(stages, MOE, layout, weight_names(), 2000, lambda p: p.data.to(odd))

    if place.pp == 1:  # one layer here, three on the first stage
        shares = (place.tp, 2), (place.ep, 2)
        uneven = stage_module(chunk_parameters(hf_tensors(MOE), MOE, [3], tp=shares[0], ep=shares[1]), [3])
        with pytest.raises(RuntimeError, match=rf"rank {rank} should hold decoder\.layers\.2\."):
            export_stream([uneven], MOE, layout, weight_names(), 2000)


def check_another_order(rank: int) -> None:
    """Checks that a layout with another rank order than Megatron-Core is an error at the start of a run."""
    with pytest.MonkeyPatch.context() as patch:
        coordinates = Layout.coordinates
        patch.setattr(Layout, "coordinates", lambda layout, number: coordinates(layout, number ^ 1))
        with pytest.raises(RuntimeError, match=rf"rank {rank}: Megatron-Core puts it at .*, expected "):
            start("tp=2,pp=2,ep=2")


def check_mutations_are_seen(rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut = export._buckets
        patch.setattr(export, "_buckets", lambda *arguments: cut(*arguments)[:3] + cut(*arguments)[4:])
        with pytest.raises(AssertionError) if rank == 0 else nullcontext():
            check_stand_ins(MOE, "ep=2", 2000)
    with pytest.MonkeyPatch.context() as patch:
        holders = export.holders

        def other_expert_rank(layout: Layout, weight: Weight, arch: Architecture) -> range:
            found = holders(layout, weight, arch)
            return range(1 - found.start, 2 - found.start) if weight.expert is not None else found

        patch.setattr(export, "holders", other_expert_rank)
        with pytest.raises(RuntimeError, match="should hold decoder"):
            check_stand_ins(MOE, "ep=2", 2000)


def check_one_dtype(rank: int) -> None:
    layout, place = start("dp=2")
    stages = build(hf_tensors(MOE), MOE, layout, place)

    def mixed(parameter: nn.Parameter) -> Tensor:
        return parameter.data.double() if parameter.dim() == 3 else parameter.data

    stream = export_stream(stages, MOE, layout, weight_names(), 10**9, mixed)
    if rank == 0:  # the other rank has a duplicate
        with pytest.raises(RuntimeError, match=r"torch\.float64 tensor of shape .* expected torch\.float32"):
            list(stream)
