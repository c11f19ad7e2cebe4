"""Weights gathered from real ranks over gloo, in Megatron-Core's own process groups."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core import parallel_state
from megatron_rl.models.architecture import Architecture
from megatron_rl.weights import export
from megatron_rl.weights.export import ExportGroups, export_stream
from models_reference import (
    chunk_layers,
    chunk_parameters,
    dense_architecture,
    hf_tensors,
    moe_architecture,
    stage_module,
)
from torch import Tensor, nn

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Layout:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1


MOE = moe_architecture()
TIED = dense_architecture(tied_embeddings=True)
CASES: dict[int, list[tuple[Architecture, Layout]]] = {
    1: [(MOE, Layout()), (TIED, Layout())],
    2: [(MOE, Layout(tp=2, etp=2)), (MOE, Layout(pp=2, vpp=2)), (MOE, Layout(ep=2)), (TIED, Layout(pp=2))],
    4: [
        (MOE, Layout()),  # four replicas
        (MOE, Layout(tp=4)),  # more ranks than key-value heads; four replicas of the experts
        (MOE, Layout(tp=2, pp=2, ep=2)),
        (MOE, Layout(tp=2, ep=2, etp=2)),
        (MOE, Layout(pp=2, vpp=2, ep=2)),
        (MOE, Layout(cp=2, ep=4)),
        (MOE, Layout(pp=4)),
        (TIED, Layout(tp=2, pp=2)),
    ],
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run_ranks(world: int, work, *arguments) -> None:
    """Calls work(rank, world, port, *arguments) in `world` processes; an exception in one is raised here."""
    mp.spawn(work, args=(world, free_port(), *arguments), nprocs=world)


def join(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)


def start_groups(layout: Layout) -> ExportGroups:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    return ExportGroups(
        tp=parallel_state.get_tensor_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
    )


def build(hf: dict[str, Tensor], arch: Architecture, layout: Layout, groups: ExportGroups) -> list[nn.Module]:
    """This rank's stages. What a replica beyond the first holds is NaN: it must not be exported."""
    stages = []
    for layers in chunk_layers(arch, groups.pp.rank(), layout.pp, layout.vpp):
        tp, ep, etp = ((group.rank(), group.size()) for group in (groups.tp, groups.ep, groups.etp))
        parameters = chunk_parameters(hf, arch, layers, tp=tp, ep=ep, etp=etp)
        for name, tensor in parameters.items():
            replica = (
                parallel_state.get_expert_data_parallel_rank()
                if ".experts." in name
                else parallel_state.get_data_parallel_rank(with_context_parallel=True)
            )
            parameters[name] = tensor if replica == 0 else torch.full_like(tensor, torch.nan)
        stages.append(stage_module(parameters, layers))
    return stages


def flat(buckets: Iterator[list[tuple[str, Tensor]]]) -> list[tuple[str, Tensor]]:
    return [pair for bucket in buckets for pair in bucket]


def check_case(arch: Architecture, layout: Layout, bucket_bytes: int) -> None:
    rank = dist.get_rank()
    hf = hf_tensors(arch)
    groups = start_groups(layout)
    stages = build(hf, arch, layout, groups)
    buckets = list(export_stream(stages, arch, groups, bucket_bytes))
    # Gradients go the same way.
    for stage in stages:
        for parameter in stage.parameters():
            parameter.main_grad = -2 * parameter.data.double()
    gradients = flat(export_stream(stages, arch, groups, bucket_bytes, lambda p: p.main_grad))

    count = torch.tensor([len(buckets), -len(buckets)])
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    assert count.tolist() == [len(buckets), -len(buckets)]
    if rank == 0:
        exported = flat(iter(buckets))
        assert [name for name, _ in exported] == list(hf), layout
        assert [name for name, _ in gradients] == list(hf), layout
        for (name, tensor), (_, gradient) in zip(exported, gradients, strict=True):
            assert torch.equal(tensor, hf[name]), (layout, name)
            assert gradient.dtype == torch.float64
            assert torch.equal(gradient, -2 * hf[name].double()), (layout, name)
            assert not tensor.requires_grad
        assert all(buckets)
        assert (len(buckets) == 1) == (bucket_bytes > 10**6)
        weights = arch.vocab_size * arch.hidden_size * 4  # the largest weight here
        for bucket in buckets:
            assert sum(t.nbytes for _, t in bucket) <= max(bucket_bytes, weights)
    else:
        assert all(bucket == [] for bucket in [*buckets, gradients])
    parallel_state.destroy_model_parallel()


def run_cases(rank: int, world: int, port: int) -> None:
    join(rank, world, port)
    for number, (arch, layout) in enumerate(CASES[world]):
        check_case(arch, layout, bucket_bytes=10**9 if number == 1 else 2000)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_layout_exports_the_checkpoint(world):
    run_ranks(world, run_cases)


def run_guards(rank: int, world: int, port: int) -> None:
    join(rank, world, port)
    hf = hf_tensors(MOE)
    layout = Layout(tp=2, pp=2, ep=2)
    groups = start_groups(layout)
    stages = build(hf, MOE, layout, groups)

    with pytest.raises(RuntimeError, match=f"ranks disagree: .*rank {rank}"):
        export_stream(stages, MOE, groups, 2000 + rank // 3)
    with pytest.raises(RuntimeError, match="ranks disagree"):
        export_stream(stages, MOE, groups, 2000, lambda p: p.data.to(torch.bfloat16 if rank == 1 else p.dtype))
    with pytest.raises(RuntimeError, match=r"is number .* \(tp, etp, ep, pp\) groups; .*rank order"):
        export_stream(stages, MOE, ExportGroups(groups.pp, groups.etp, groups.pp, groups.tp), 2000)
    # Three layers on the first stage and one on the last.
    layers = range(3) if groups.pp.rank() == 0 else range(3, 4)
    parameters = chunk_parameters(hf, MOE, layers, tp=(groups.tp.rank(), 2), ep=(groups.ep.rank(), 2))
    uneven = [stage_module(parameters, layers)]
    if groups.pp.rank() == 1:
        with pytest.raises(RuntimeError, match=rf"rank {rank} should hold decoder\.layers\.2\.input_layernorm"):
            export_stream(uneven, MOE, groups, 2000)
    dist.barrier()

    def mixed(parameter: nn.Parameter) -> Tensor:
        return parameter.data.double() if parameter.dim() == 3 else parameter.data

    with pytest.raises(RuntimeError, match=r"torch\.float64 tensor of shape .* expected torch\.float32"):
        list(export_stream(stages, MOE, groups, 10**9, mixed))
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_ranks_that_do_not_fit_together_are_refused():
    run_ranks(4, run_guards)


def run_mutation(rank: int, world: int, port: int, mutation: str) -> None:
    join(rank, world, port)
    if mutation == "bucket skipped":
        cut = export._buckets
        export._buckets = lambda *arguments: (lambda b: b[:3] + b[4:])(cut(*arguments))
    else:
        holders = export.Grid.holders

        def other_expert_rank(grid, weight, arch):
            found = holders(grid, weight, arch)
            return range(1 - found.start, 2 - found.start) if weight.expert is not None else found

        export.Grid.holders = other_expert_rank
    check_case(MOE, Layout(ep=2), 2000)


@pytest.mark.parametrize(("mutation", "seen"), [("bucket skipped", "AssertionError"), ("experts", "should hold")])
def test_a_mutated_export_is_seen(mutation, seen):
    with pytest.raises(mp.ProcessRaisedException, match=seen):
        run_ranks(2, run_mutation, mutation)
