"""The plan of a run: formulas of activations, the largest rank, what makes it fit, and proposed layouts. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from config_files import ARCHITECTURE, write
from planned_jobs import RUN, job

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.recompute import Recomputation, read_recompute
from megatron_rl.config.schema import Config, OptimConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.gpus import GPUS
from megatron_rl.models.architecture import LatentAttention
from megatron_rl.models.flops import active_elements, forward_flops
from megatron_rl.models.kinds import PolicyKind
from megatron_rl.planner.activations import (
    StageActivations,
    Workload,
    in_flight,
    layer_bytes,
    logits_bytes,
    stage_activations,
)
from megatron_rl.planner.candidates import on_layout, proposals, single_changes
from megatron_rl.planner.forecast import find_gpu, memory_lines, read_job
from megatron_rl.planner.memory import GIB, MIB, all_ranks, largest_rank
from megatron_rl.planner.roofline import step_time
from megatron_rl.planner.shares import network_bytes

NONE_AND_EXPERTS: tuple[tuple[PolicyKind, ...], ...] = ((), ("expert",))
EMBEDDING: tuple[PolicyKind, ...] = ("embedding",)
H100 = GPUS["h100"]
# One of each sort of layout, and what the largest rank needs (GiB): a change of a figure should be meant.
PLANS = {
    ("Qwen--Qwen3-8B", "tp=2,dp=4"): 48,
    ("Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4"): 80,
    ("Qwen--Qwen3-30B-A3B", "tp=2,cp=2,ep=8,dp=2"): 80,
    ("Qwen--Qwen3-235B-A22B", "tp=4,pp=2,ep=32,dp=8"): 81,
    ("Qwen--Qwen3-235B-A22B", "tp=4,pp=2,vpp=4,ep=32,dp=8"): 81,
    ("deepseek-ai--DeepSeek-V3", "tp=8,pp=8,ep=32,dp=8"): 45,
    ("mistralai--Mixtral-8x7B-v0.1", "tp=4,pp=2,ep=2,etp=2,dp=2"): 81,
    ("openai--gpt-oss-20b", "pp=2,ep=4,dp=4"): 66,
    ("Qwen--Qwen3-Next-80B-A3B-Instruct", "tp=4,pp=2,ep=8,dp=4"): 79,
}


def layout(text: str) -> Layout:
    return Layout.resolve(*parse_layout(text))


def work(text: str = "tp=1", tokens: int = 1024, **options: Any) -> Workload:
    return Workload(ARCHITECTURE, layout(text), tokens, 2, **options)


def stage(workload: Workload, recompute: str, pp: int = 0, micro_batches: int = 64) -> StageActivations:
    layers = workload.layout.split(ARCHITECTURE.num_layers)[pp :: workload.layout.pp]
    return stage_activations(workload, layers, pp, micro_batches, read_recompute(recompute))


# ---- formulas --------------------------------------------------------------------------------------------------


def test_a_dense_layer_keeps_what_the_terms_add_up_to() -> None:
    arch = dataclasses.replace(ARCHITECTURE, num_experts=0, qk_norm="none")
    hidden, heads, keys, mlp = 64, 64, 32, 96
    norms = 2 * (6 * hidden + 4)
    attention = 2 * hidden + 2 * heads + 2 * (heads + 2 * keys + heads) + 4 * 8
    expected = norms + attention + 2 * hidden + 10 * mlp
    assert layer_bytes(Workload(arch, layout("tp=1"), 1, 2), 0).under(Recomputation()) == expected


@pytest.mark.parametrize("more", ["tp=2", "cp=2", "tp=2,cp=2", "tp=4"])
def test_more_ranks_keep_less_each(more: str) -> None:
    for recompute in ("none", "core_attn", "full"):
        alone, shared = stage(work(), recompute), stage(work(more), recompute)
        assert shared.kept < 0.8 * alone.kept
        assert shared.layer < alone.layer


def test_activations_grow_with_the_tokens_alone() -> None:
    for recompute in ("none", "core_attn", "full"):
        small, large = stage(work(tokens=1024), recompute), stage(work(tokens=2048), recompute)
        assert large == StageActivations(2 * small.kept, 2 * small.layer)


def test_recomputation_of_layers_keeps_their_inputs_alone() -> None:
    full = stage(work(), "full")
    assert full.kept == 8 * 1024 * 64 * 2
    assert full.kept < 0.1 * stage(work(), "none").kept
    half = stage(work(), "full:4")
    assert half.kept == (full.kept + stage(work(), "none").kept) / 2
    assert half.layer == full.layer
    assert full.layer > stage(work(), "none").layer  # a layer is computed again


def test_recomputed_modules_are_made_again_in_the_backward_pass() -> None:
    whole, experts, norms = stage(work(), "none"), stage(work(), "moe"), stage(work(), "layernorm")
    assert stage(work(), "mlp") == whole  # all layers have experts
    assert experts.layer - whole.layer == (whole.kept - experts.kept) / 8
    assert norms.kept < whole.kept
    together = stage(work(), "layernorm,moe")
    assert together.kept - whole.kept == (experts.kept - whole.kept) + (norms.kept - whole.kept)
    assert together.layer - whole.layer == (experts.layer - whole.layer) + (norms.layer - whole.layer)


def test_moe_takes_the_modules_inside_of_it_along() -> None:
    arch = dataclasses.replace(ARCHITECTURE, shared_hidden_size=32)
    layer = layer_bytes(Workload(arch, layout("tp=1"), 1024, 2, fused=True), 0)
    none, moe, shared, act = (
        layer.under(read_recompute(text)) for text in ("none", "moe", "shared_experts", "moe_act")
    )
    assert none - shared == 1024 * 3 * 32 * 2
    assert none - act == 1024 * 2 * 48 * 2  # of both experts of a token: the input of the second projection
    assert none - moe > (none - shared) + (none - act)


def test_up_projections_of_latent_attention_that_are_recomputed_keep_latents() -> None:
    """By formula alone: no layer in plain PyTorch recomputes them."""
    latent = LatentAttention(query_rank=24, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=12)
    arch = dataclasses.replace(ARCHITECTURE, latent=latent)
    layer = layer_bytes(Workload(arch, layout("tp=1"), 1, 2, fused=True), 0)
    none, up = (layer.under(read_recompute(text)) for text in ("none", "mla_up_proj"))
    queries_keys_and_values = 2 * 8 * (24 + 24 + 12)
    assert none - up == queries_keys_and_values + 2 * (24 + 32) - 2 * 8


def test_a_norm_fused_into_a_projection_is_not_recomputed() -> None:
    layer = layer_bytes(work(tokens=1, fused=True), 0)
    none, norms = (layer.under(read_recompute(text)) for text in ("none", "layernorm"))
    assert none - norms == 2 * 64 + 4  # of the experts' norm: its output and inverse root


def test_transformer_engine_keeps_less() -> None:
    assert stage(work(fused=True), "none").kept < 0.8 * stage(work(), "none").kept


def test_expert_parallelism_counts_the_fullest_rank() -> None:
    even, uneven = work("ep=2", imbalance=1.0), work("ep=2", imbalance=1.5)
    assert stage(work(), "none").kept == stage(even, "none").kept < stage(uneven, "none").kept
    assert stage(work(imbalance=1.5), "none") == stage(work(), "none")  # alone it has all rows anyway


@pytest.mark.parametrize(
    ("text", "expected"),
    [("tp=1", [1]), ("pp=4", [4, 3, 2, 1]), ("pp=2,vpp=2", [5, 3]), ("pp=4,vpp=2", [11, 9, 7, 5])],
)
def test_micro_batches_in_flight(text: str, expected: list[int]) -> None:
    at = layout(text)
    assert [in_flight(at, pp, 64) for pp in range(at.pp)] == expected
    assert [in_flight(at, pp, 1) for pp in range(at.pp)] == [min(n, at.vpp) for n in expected]


def test_the_first_stage_keeps_most_and_a_pipeline_keeps_as_much_as_one_rank() -> None:
    stages = [stage(work("pp=4"), "none", pp).kept for pp in range(4)]
    assert stages == sorted(stages, reverse=True)
    assert stages[0] == pytest.approx(stage(work(), "none").kept)


def test_logits_exist_for_a_chunk_at_a_time() -> None:
    small, large = (logits_bytes(work(), chunk) for chunk in (128, 256))
    assert large - small == 128 * 99 * 6
    assert logits_bytes(work(), 4096) == logits_bytes(work(), 1024)


# ---- the largest rank ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), PLANS)
def test_the_plan_of_a_published_model(tmp_path: Path, name: str, text: str) -> None:
    overrides = ["engine.layers=torch"] if "oss" in name or "Next" in name else []
    planned = job(tmp_path, name, text, *overrides)
    assert round(largest_rank(planned).total / GIB) == PLANS[name, text]


def test_tied_embeddings_are_held_twice_in_a_pipeline_alone() -> None:
    tied = dataclasses.replace(ARCHITECTURE, tied_embeddings=True)
    for arch, copies in ((ARCHITECTURE, 2), (tied, 1)):
        alone = network_bytes(arch, layout("tp=1"), layout("tp=1").coordinates(0), 1).weights
        optim = OptimConfig(freeze=EMBEDDING)
        no_embedding = network_bytes(arch, layout("tp=1"), layout("tp=1").coordinates(0), 1, optim=optim)
        assert alone - no_embedding.gradients // 4 == copies * 99 * 64
    last = [
        network_bytes(arch, layout("pp=2"), layout("pp=2").coordinates(1), 1).weights for arch in (ARCHITECTURE, tied)
    ]
    assert last[0] == last[1]


def test_frozen_weights_have_neither_gradients_nor_state() -> None:
    at = layout("tp=1").coordinates(0)
    frozen = network_bytes(ARCHITECTURE, layout("tp=1"), at, 2)
    assert (frozen.gradients, frozen.optimizer, frozen.largest) == (0, 0, 0)
    whole, part = (
        network_bytes(ARCHITECTURE, layout("tp=1"), at, 2, optim=OptimConfig(freeze=kinds))
        for kinds in NONE_AND_EXPERTS
    )
    assert part.weights == whole.weights == frozen.weights
    assert whole.gradients - part.gradients == 4 * 8 * 16 * 3 * 64 * 48


def test_a_reference_adds_weights_and_a_critic_all_that_trains(tmp_path: Path) -> None:
    planned = job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", "presets=ppo", "critic.path=null")
    memory = largest_rank(planned)
    assert memory.reference == memory.weights
    assert memory.critic == pytest.approx(memory.weights + memory.gradients + memory.optimizer, rel=0.05)


def test_gradients_in_bf16_take_half(tmp_path: Path) -> None:
    fp32, bf16 = (
        largest_rank(job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", f"engine.grad_dtype={dtype}"))
        for dtype in ("fp32", "bf16")
    )
    assert bf16.gradients == fp32.gradients // 2
    assert (bf16.weights, bf16.optimizer) == (fp32.weights, fp32.optimizer)


def test_an_optimizer_with_smaller_moments_or_on_the_host_is_counted(tmp_path: Path) -> None:
    """By weight 12 bytes; 6 with moments in bf16; and on the host 16, with the gradient."""
    plain, half, bf16 = (
        largest_rank(job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", "engine.layers=auto", *overrides))
        for overrides in ([], ["optim.offload=0.5"], ["optim.moments_dtype=bf16"])
    )
    assert half.optimizer == pytest.approx(plain.optimizer / 2)
    assert half.host == pytest.approx(plain.optimizer * 16 / 12 / 2)
    assert bf16.optimizer == pytest.approx(plain.optimizer / 2)
    assert (plain.host, bf16.host) == (0, 0)
    assert plain.step > bf16.step == half.step == 0  # they need Transformer Engine, which makes no temporaries
    (line, _) = memory_lines(job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", "optim.offload=1")).splitlines()
    assert "GiB, and 56.9 GiB of its host; " in line


def test_weights_in_fp8_are_kept_beside_the_others(tmp_path: Path) -> None:
    """Twice for the policy, as its backward pass reads them transposed, and once for the reference."""
    plain, fp8, alone = (
        largest_rank(job(tmp_path, "Qwen--Qwen3-8B", "tp=2,dp=4", *overrides))
        for overrides in ([], ["engine.fp8=mxfp8"], ["engine.fp8=mxfp8", "objective.kl.kind=none"])
    )
    embeddings = 2 * 151936 * 4096
    assert fp8.fp8 == pytest.approx(3 * (8.19e9 - embeddings) / 2, rel=0.01)
    assert alone.fp8 == pytest.approx(fp8.fp8 * 2 / 3)
    assert fp8.total - plain.total == fp8.fp8
    assert plain.fp8 == 0


def test_the_largest_of_what_is_not_there_at_once_counts(tmp_path: Path) -> None:
    memory = largest_rank(job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4"))
    assert memory.total - memory.static == memory.activations + max(memory.layer, memory.logits)
    late = dataclasses.replace(memory, bucket=9 * GIB)
    assert late.total - late.static == 9 * GIB


def test_ranks_of_first_middle_and_last_stage_are_shown(tmp_path: Path) -> None:
    ranks = all_ranks(job(tmp_path, "deepseek-ai--DeepSeek-V3", "tp=8,pp=8,ep=32,dp=8"))
    assert [(rank.rank, rank.stage) for rank in ranks] == [(0, 0), (64, 1), (448, 7)]
    assert [rank.logits > 0 for rank in ranks] == [False, False, True]
    assert [rank.bucket > 2 * GIB for rank in ranks] == [True, False, False]  # rank 0 holds two


def test_small_mini_batches_have_few_micro_batches_in_flight(tmp_path: Path) -> None:
    small = ["rollout.prompts_per_step=4", "rollout.group_size=4", "engine.recompute=none"]
    few, many = (job(tmp_path, "Qwen--Qwen3-235B-A22B", "tp=4,pp=4,ep=32,dp=8", *more) for more in (small, small[2:]))
    assert (few.micro_batches, many.micro_batches) == (1, 64)
    assert largest_rank(few).activations < 0.3 * largest_rank(many).activations


def test_a_sample_longer_than_the_micro_batch_is_not_cut(tmp_path: Path) -> None:
    planned = job(tmp_path, "Qwen--Qwen3-8B", "tp=2", "engine.max_tokens_per_micro_batch=100")
    assert planned.tokens == 8192


def test_a_dry_run_has_two_lines(tmp_path: Path) -> None:
    lines = memory_lines(job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4")).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("memory of the largest rank (0): about 80.4 GiB")
    assert "weights 8.2 GiB" in lines[1]


# ---- what fits -------------------------------------------------------------------------------------------------


def test_single_changes_are_the_smallest_that_fit(tmp_path: Path) -> None:
    planned = job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4")
    changes = {change.text: change.memory.total for change in single_changes(planned, 79 * GIB)}
    assert changes.keys() == {"parallel.tp=4", "optim.moments_dtype=bf16", "objective.kl.kind=none"}
    assert all(total <= 79 * GIB for total in changes.values())
    unrecomputed = job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", "engine.recompute=none")
    assert "engine.recompute=full" in {change.text for change in single_changes(unrecomputed, 82 * GIB)}
    assert "optim.offload=1" in {change.text for change in single_changes(planned, 45 * GIB)}
    assert single_changes(planned, GIB) == []


def test_a_smaller_micro_batch_is_tried_down_to_the_longest_sample(tmp_path: Path) -> None:
    planned = job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", "engine.max_tokens_per_micro_batch=65536")
    limit = largest_rank(planned).total - 4 * MIB
    texts = [change.text for change in single_changes(planned, limit)]
    assert "engine.max_tokens_per_micro_batch=32768" in texts


def test_transformer_engine_is_proposed_in_bf16_alone(tmp_path: Path) -> None:
    for dtype, proposed in (("bf16", True), ("fp32", False)):
        overrides = ("engine.layers=torch", f"engine.dtype={dtype}")
        changes = single_changes(job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", *overrides), 1000 * GIB)
        assert ("engine.layers=te" in {change.text for change in changes}) == proposed


def test_proposed_layouts_fit_and_come_by_time(tmp_path: Path) -> None:
    planned = job(tmp_path, "Qwen--Qwen3-30B-A3B", "dp=16")
    found = proposals(planned, H100, 79 * GIB)
    assert len(found) == 3
    assert all(largest_rank(each.job).total == each.memory.total <= 79 * GIB for each in found)
    times = [step_time(each.job, H100).total for each in found]
    assert times == sorted(times)
    assert proposals(planned, H100, 10 * GIB) == []


def test_a_layout_that_does_not_fit_the_model_is_not_tried(tmp_path: Path) -> None:
    planned = job(tmp_path, "Qwen--Qwen3-8B", "dp=16")
    assert on_layout(planned, ep=2) is None
    assert on_layout(planned, tp=3) is None
    changed = on_layout(planned, tp=2)
    assert changed is not None
    assert (changed.layout.tp, changed.layout.dp, changed.config.parallel.tp) == (2, 8, 2)


# ---- time ------------------------------------------------------------------------------------------------------


def test_active_parameters_are_those_of_the_model_cards(tmp_path: Path) -> None:
    active = {"Qwen--Qwen3-30B-A3B": 3.3, "Qwen--Qwen3-235B-A22B": 22, "deepseek-ai--DeepSeek-V3": 37}
    for name, billions in active.items():
        arch = job(tmp_path, name, "dp=1").arch
        embeddings = 2 * arch.vocab_size * arch.hidden_size
        assert (active_elements(arch) + embeddings) / 1e9 == pytest.approx(billions, rel=0.02)


def test_longer_sequences_and_recomputation_cost_more(tmp_path: Path) -> None:
    planned = job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4")
    short, long = (forward_flops(planned.arch, length) for length in (0, 8192))
    assert long - short == 2 * 48 * 4096 * 32 * 2 * 128
    without = job(tmp_path, "Qwen--Qwen3-30B-A3B", "tp=2,ep=8,dp=4", "engine.recompute=none")
    assert step_time(planned, H100).flops == pytest.approx(4 / 3 * step_time(without, H100).flops)
    assert step_time(planned, H100).compute > step_time(without, H100).compute


def test_a_pipeline_has_a_bubble(tmp_path: Path) -> None:
    times = [step_time(job(tmp_path, "Qwen--Qwen3-235B-A22B", f"tp=4,pp={pp},ep=16,dp=4"), H100) for pp in (1, 4)]
    assert times[0].bubble == 0 < times[1].bubble


def test_the_last_stage_computes_the_logits_too(tmp_path: Path) -> None:
    even = step_time(job(tmp_path, "Qwen--Qwen3-30B-A3B", "pp=4,dp=2"), H100)
    fewer = ["parallel.stage_layers=[14, 14, 13, 7]"]
    assert step_time(job(tmp_path, "Qwen--Qwen3-30B-A3B", "pp=4,dp=2", *fewer), H100).compute < even.compute


# ---- errors ----------------------------------------------------------------------------------------------------


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpu: found v100, expected one of a100, h100, h200, b200"):
        find_gpu("v100")
    with pytest.raises(ConfigError, match=r"parallel\.tp: 3 does not divide the 32 attention heads"):
        job(tmp_path, "Qwen--Qwen3-8B", "tp=3")
    with pytest.raises(ConfigError, match=r"model\.path: nowhere/config\.json does not exist"):
        read_job(Config, write(tmp_path / "run.yaml", RUN), ["model.path=nowhere"], 1)
