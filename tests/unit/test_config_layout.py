"""Layouts: degrees of parallelism, limits set by the model, and the experts and replicas of each rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
from config_files import ARCHITECTURE, LAYOUTS
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.layout import (
    Layout,
    LayoutError,
    check_layout,
    fitting_sizes,
    listed,
    parse_layout,
    world_size_of,
)
from megatron_rl.config.schema import EngineConfig, ParallelConfig
from megatron_rl.config.show import MAX_RANKS, rank_experts, show_layout, show_sizes

DENSE = replace(ARCHITECTURE, model_type="qwen3", num_experts=0, experts_per_token=0, expert_hidden_size=0)
degrees = st.builds(ParallelConfig, **dict.fromkeys(("tp", "pp", "cp", "ep", "etp"), st.integers(1, 6)))


def resolve(text: str) -> Layout:
    return Layout.resolve(*parse_layout(text))


# ---- world size -------------------------------------------------------------------------------------------------


def test_data_parallel_size_is_the_rest_of_the_world() -> None:
    layout = Layout.resolve(ParallelConfig(tp=2, pp=2, cp=2, ep=4), 32)
    assert (layout.dp, layout.edp, layout.world_size) == (4, 4, 32)


@given(degrees)
def test_world_size_of_gives_the_smallest_possible_world(parallel: ParallelConfig) -> None:
    smallest = world_size_of(parallel)
    layout = Layout.resolve(parallel, smallest)
    assert layout.tp * layout.cp * layout.pp * layout.dp == smallest
    assert layout.etp * layout.ep * layout.pp * layout.edp == smallest
    for world in range(1, smallest):
        with pytest.raises(LayoutError):
            Layout.resolve(parallel, world)


@pytest.mark.parametrize(
    ("parallel", "world", "message"),
    [
        (ParallelConfig(tp=2, pp=2), 6, "tp * cp * pp = 4 does not divide the world of 6 ranks; start a multiple of 4"),
        (ParallelConfig(ep=4), 2, "etp * ep * pp = 4 does not divide the world of 2 ranks; start a multiple of 4"),
        (
            ParallelConfig(tp=2, ep=3),
            2,
            "etp * ep * pp = 3 does not divide the world of 2 ranks; start a multiple of 6",
        ),
    ],
)
def test_a_world_size_that_does_not_fit_is_an_error(parallel: ParallelConfig, world: int, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.resolve(parallel, world)
    assert message in str(caught.value)


# ---- parse_layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parallel", "world"),
    [
        ("", ParallelConfig(), 1),
        ("tp=2,pp=2,ep=2", ParallelConfig(tp=2, pp=2, ep=2), 4),
        ("tp=2,cp=2,ep=2,etp=3", ParallelConfig(tp=2, cp=2, ep=2, etp=3), 12),
        ("pp=2,vpp=3,dp=2", ParallelConfig(pp=2, vpp=3), 4),
        ("dp=4,ep=4", ParallelConfig(ep=4), 4),
    ],
)
def test_parse_layout_reads_degrees_and_world_size(text: str, parallel: ParallelConfig, world: int) -> None:
    assert parse_layout(text) == (parallel, world)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=2,xp=2", "'xp=2' is not a degree such as tp=2; known: tp, pp, vpp, cp, ep, etp, dp"),
        ("tp=0", "'tp=0' is not a degree"),
        ("tp=-1", "'tp=-1' is not a degree"),
        ("tp", "'tp' is not a degree"),
        ("tp=two", "'tp=two' is not a degree"),
        ("tp=²", "'tp=²' is not a degree"),
        ("tp=2,tp=4", "tp is given twice"),
        ("tp=2;pp=2", "'tp=2;pp=2' is not a degree"),
    ],
)
def test_parse_layout_names_the_mistake(text: str, message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        parse_layout(text)
    assert str(caught.value).startswith(f"layout {text!r}: ")
    assert message in str(caught.value)


# ---- check_layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "tp=4,pp=2,vpp=2,cp=2,ep=8,etp=2", "pp=8", "ep=16", "etp=3,tp=2", "tp=8"])
def test_a_layout_that_fits_the_model_has_no_problems(text: str) -> None:
    assert check_layout(resolve(text), ARCHITECTURE, EngineConfig()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp=3", "parallel.tp: 3 does not divide the 8 attention heads of the model; sizes that fit: 1, 2, 4, 8"),
        ("tp=16", "parallel.tp: 16 does not divide the 8 attention heads of the model; sizes that fit: 1, 2, 4, 8"),
        (
            "etp=5",
            "parallel.etp: 5 does not divide the 48 features of each expert of the model; sizes that fit: 1, 2, 3, 4,",
        ),
        ("ep=3", "parallel.ep: 3 does not divide the 16 experts of the model; sizes that fit: 1, 2, 4, 8, 16"),
        (
            "pp=9",
            "parallel.pp * parallel.vpp: 9 stages, but the model has 8 layers; take at most 8 (parallel.stage_layers",
        ),
        ("pp=3,vpp=3", "parallel.pp * parallel.vpp: 9 stages, but the model has 8 layers; take at most 8"),
        ("vpp=2", "parallel.vpp: 2 virtual stages need pipeline stages; set parallel.pp above 1"),
    ],
)
def test_a_layout_that_does_not_fit_the_model_is_reported(text: str, message: str) -> None:
    problems = check_layout(resolve(text), ARCHITECTURE, EngineConfig())
    assert sum(problem.startswith(message) for problem in problems) == 1, problems


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("pp=4", 8, [2, 2, 2, 2]),
        ("pp=4", 94, [23, 24, 24, 23]),  # Qwen3-235B
        ("pp=8", 61, [7, 8, 8, 8, 8, 8, 7, 7]),  # DeepSeek-V3
        ("pp=2", 5, [2, 3]),
        ("pp=2,vpp=2", 7, [1, 2, 2, 2]),
        ("pp=3", 3, [1, 1, 1]),
    ],
)
def test_layers_that_are_left_over_go_to_the_middle(text: str, layers: int, expected: list[int]) -> None:
    split = resolve(text).split(layers)
    assert [len(stage) for stage in split] == expected
    assert [number for stage in split for number in stage] == list(range(layers))


def test_stages_may_be_given() -> None:
    layout = replace(resolve("pp=2,vpp=2"), stage_layers=(1, 3, 3, 1))
    assert check_layout(layout, ARCHITECTURE, EngineConfig()) == []
    assert layout.split(8) == [range(1), range(1, 4), range(4, 7), range(7, 8)]
    for stages in ((1, 3, 4), (1, 3, 3, 2)):
        (problem,) = check_layout(replace(layout, stage_layers=stages), ARCHITECTURE, EngineConfig())
        assert problem.startswith(f"parallel.stage_layers: {list(stages)} are {len(stages)} stages with {sum(stages)} ")
        assert problem.endswith("the model has 8 layers; write as [2, 2, 2, 2], or leave it out")


def test_dense_mlp_sizes_are_checked_only_if_the_model_has_dense_layers() -> None:
    odd = replace(ARCHITECTURE, ffn_hidden_size=97)
    assert check_layout(resolve("tp=2"), odd, EngineConfig()) == []
    for arch in (replace(odd, dense_layers=(0,)), replace(DENSE, ffn_hidden_size=97)):
        (problem,) = check_layout(resolve("tp=2"), arch, EngineConfig())
        assert problem == (
            "parallel.tp: 2 does not divide the 97 features of the dense MLP of the model; sizes that fit: 1"
        )


def test_the_width_of_the_shared_expert_is_checked() -> None:
    (problem,) = check_layout(resolve("tp=4"), replace(ARCHITECTURE, shared_hidden_size=6), EngineConfig())
    assert problem.startswith("parallel.tp: 4 does not divide the 6 features of the shared expert of the model; ")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "sizes"),
    [
        (64, 4, 128, [1, 2, 4, 8, 16, 32, 64]),  # Qwen3-235B
        (12, 2, 8, [1, 2, 4]),  # 6 ranks: a third of a head's 32 rows of keys and values is no whole number
        (12, 2, 12, [1, 2, 4, 6, 12]),
        (6, 6, 8, [1, 2, 3, 6]),
        (8, 1, 8, [1, 2, 4, 8]),
    ],
)
def test_tensor_parallelism_may_exceed_the_key_value_heads(
    heads: int, kv_heads: int, head_dim: int, sizes: list[int]
) -> None:
    arch = replace(ARCHITECTURE, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    assert fitting_sizes("tp", arch) == sizes


def test_ranks_do_not_hold_parts_of_two_key_value_heads() -> None:
    arch = replace(ARCHITECTURE, num_heads=12, num_kv_heads=4, head_dim=12)
    (problem,) = check_layout(resolve("tp=6"), arch, EngineConfig())
    assert problem == (
        "parallel.tp: 6 is neither a divisor nor a multiple of the 4 key-value heads of the model; sizes that fit: "
        "1, 2, 4, 12"
    )


def test_the_dry_run_says_which_sizes_fit(capsys: pytest.CaptureFixture[str]) -> None:
    show_sizes(ARCHITECTURE)
    show_sizes(replace(DENSE, num_layers=94))
    moe, dense = capsys.readouterr().out.splitlines()
    assert moe == (
        "sizes that fit this model: tp 1, 2, 4, 8; ep 1, 2, 4, 8, 16; etp 1, 2, 3, 4, 6, 8, 12, 16, 24, 48; "
        "pp * vpp up to 8, with parallel.stage_layers for stages of your own; any cp"
    )
    assert dense.startswith("sizes that fit this model: tp 1, 2, 4, 8; pp * vpp up to 94, with ")


def test_a_long_list_of_sizes_is_cut() -> None:
    sizes = fitting_sizes("etp", replace(ARCHITECTURE, expert_hidden_size=1536))
    assert listed(sizes) == "1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, ..., 1536"


@pytest.mark.parametrize("text", ["ep=2", "etp=2"])
def test_expert_degrees_are_refused_for_a_dense_model(text: str) -> None:
    (problem,) = check_layout(resolve(text), DENSE, EngineConfig())
    assert problem.startswith("parallel.ep, parallel.etp: ")
    assert problem.endswith("on a model without experts; both must be 1")
    assert check_layout(resolve("tp=2,pp=2"), DENSE, EngineConfig()) == []


@pytest.mark.parametrize(
    ("text", "engine", "message"),
    [
        ("", {"device": "cpu", "layers": "te"}, "engine.layers: te needs a GPU"),
        ("", {"dtype": "fp32", "layers": "te"}, "engine.layers: te needs engine.dtype bf16, but that is fp32"),
        (
            "",
            {"dtype": "fp32", "grad_dtype": "bf16"},
            "engine.grad_dtype: bf16 needs engine.dtype bf16, but that is fp32",
        ),
        (
            "cp=2",
            {"device": "cpu", "cp_comm": "a2a"},
            "engine.cp_comm: a2a needs Transformer Engine's layers, but engine",
        ),
        ("", {"cp_comm": "a2a"}, "engine.cp_comm: a2a, but parallel.cp is 1"),
        (
            "tp=4,cp=2",
            {"cp_comm": "a2a"},
            "engine.cp_comm: a2a gives each of parallel.cp 2 ranks some of the 1 key-value",
        ),
        (
            "",
            {"fp8": "mxfp8", "device": "cpu"},
            "engine.fp8: mxfp8 needs Transformer Engine's layers, but engine.device",
        ),
        ("", {"fp8": "mxfp8", "layers": "torch"}, "engine.fp8: mxfp8 needs Transformer Engine's layers, but engine.la"),
        ("", {"fp8": "mxfp8", "dtype": "fp32"}, "engine.fp8: mxfp8 needs engine.dtype bf16, but that is fp32"),
        (
            "tp=2,etp=2",
            {"fp8": "blockwise"},
            "engine.fp8: blockwise needs matrices whose sides divide by 16, but a rank has 24 features of each expert "
            "at parallel.etp 2; set it to none, or take a smaller parallel.etp",
        ),
        ("ep=2", {"device": "cpu", "dispatcher": "deepep"}, "engine.dispatcher: deepep needs a GPU"),
        ("tp=2", {"dispatcher": "deepep"}, "engine.dispatcher: deepep needs parallel.ep or parallel.etp above 1"),
    ],
)
def test_engine_settings_that_do_not_fit_are_reported(text: str, engine: dict[str, str], message: str) -> None:
    arch = replace(ARCHITECTURE, expert_hidden_size=96) if engine.get("fp8") == "mxfp8" else ARCHITECTURE
    (problem,) = check_layout(resolve(text), arch, EngineConfig.model_validate(engine))
    assert problem.startswith(message)


def test_matrices_in_fp8_have_sides_that_divide() -> None:
    wide = replace(ARCHITECTURE, expert_hidden_size=96)
    for text, fp8, problems in (
        ("tp=2", "tensorwise", 0),
        ("", "mxfp8", 0),
        ("tp=8", "mxfp8", 2),
        ("etp=2", "mxfp8", 1),
    ):
        engine = EngineConfig.model_validate({"fp8": fp8})
        assert len(check_layout(resolve(text), wide, engine)) == problems, (text, fp8)


def test_micro_batches_and_sequences_divide_as_the_schedule_and_the_ring_need() -> None:
    """The interleaved schedule takes micro-batches by the pp, and a rank of cp has two stretches of a sequence."""
    layout = Layout.resolve(ParallelConfig(pp=4, vpp=2, cp=4), 16)
    assert (layout.micro_batch_multiple, layout.sequence_multiple) == (4, 8)
    layout = Layout.resolve(ParallelConfig(pp=4), 4)
    assert (layout.micro_batch_multiple, layout.sequence_multiple) == (1, 1)


def test_a_load_balancing_loss_needs_experts() -> None:
    engine = EngineConfig(aux_loss_coefficient=0.01)
    assert check_layout(resolve(""), ARCHITECTURE, engine) == []
    (problem,) = check_layout(resolve(""), DENSE, engine)
    assert problem.startswith("engine.aux_loss_coefficient: 0.01 on a model without experts")


# ---- coordinates -----------------------------------------------------------------------------------------------


# tests/ranks/test_config_layout_megatron.py compares layouts with Megatron-Core.


@pytest.mark.parametrize("text", LAYOUTS)
def test_the_first_rank_of_a_replica_leads_it(text: str) -> None:
    layout = resolve(text)
    for dp in range(layout.dp):
        replica = layout.replica_ranks(dp)
        assert [rank for rank in range(layout.world_size) if layout.coordinates(rank).dp == dp] == sorted(replica)
        assert (
            [rank for rank in replica if layout.coordinates(rank).leads_replica] == [layout.leader(dp)] == replica[:1]
        )


def test_every_expert_is_held_once_per_expert_replica() -> None:
    layout = resolve("tp=2,pp=2,ep=4,etp=2,dp=4")
    for pp in range(layout.pp):
        for edp in range(layout.edp):
            for etp in range(layout.etp):
                ranks = [layout.coordinates(rank) for rank in range(layout.world_size)]
                parts = [
                    rank_experts(layout, ARCHITECTURE, r.ep) for r in ranks if (r.pp, r.edp, r.etp) == (pp, edp, etp)
                ]
                assert sorted(expert for part in parts for expert in part) == list(range(16))


def test_the_layout_table_is_cut_for_large_worlds(capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout.resolve(ParallelConfig(cp=2), 2 * MAX_RANKS)
    show_layout(layout, DENSE, EngineConfig(max_tokens_per_micro_batch=1000))
    shown = capsys.readouterr().out
    assert f"{2 * MAX_RANKS} ranks: tp=1, pp=1, vpp=1, cp=2, dp={MAX_RANKS}" in shown
    assert "at most 1000 packed tokens, 500 a rank" in shown
    assert f"... and {MAX_RANKS} ranks more" in shown
    assert f" {MAX_RANKS - 1} " in shown
