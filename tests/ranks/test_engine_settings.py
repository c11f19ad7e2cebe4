"""What the engine's settings become in Megatron-Core's own configuration, and what they change in updates."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import ARCHITECTURE
from forks import Forks
from settings_worker import Case
from tiny_models import make_tiny_model

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.engine.data_parallel import ddp_config
from megatron_rl.engine.layers.choice import choose_layers
from megatron_rl.engine.layers.fused_gradients import has_apex_kernel
from megatron_rl.engine.megatron_config import transformer_config
from megatron_rl.errors import UserError
from megatron_rl.ranks.own_device import check_deterministic

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_experts": 4, "expert_hidden_size": 16}
SETTINGS = (("deterministic", True), ("grad_dtype", "bf16"))


def layout(text: str = "") -> Layout:
    return Layout.resolve(*parse_layout(text))


@pytest.mark.parametrize(
    ("recompute", "fields"),
    [
        ("none", (None, None, None, ["core_attn"])),  # its default, which nothing reads
        ("full", ("full", "uniform", 1, ["core_attn"])),
        ("full:3", ("full", "block", 3, ["core_attn"])),
        ("mlp,layernorm", ("selective", None, None, ["layernorm", "mlp"])),
        ("moe,core_attn", ("selective", None, None, ["core_attn", "moe"])),
    ],
)
def test_recomputation_in_megatrons_words(recompute: str, fields: tuple[Any, ...]) -> None:
    engine = EngineConfig(recompute=recompute)
    found = transformer_config(ARCHITECTURE, engine, layout(), fused_kernels=False)
    granularity, method, layers = found.recompute_granularity, found.recompute_method, found.recompute_num_layers
    assert (granularity, method, layers, found.recompute_modules) == fields


@pytest.mark.parametrize(
    ("engine", "text", "trains", "fields"),
    [
        ({}, "dp=2", True, (True, True, False, True)),
        ({}, "dp=2,pp=2,vpp=2", True, (True, True, True, True)),
        ({"overlap": "grads"}, "dp=2,pp=2,vpp=2", True, (True, False, False, True)),
        ({"overlap": "none"}, "dp=2", True, (False, False, False, True)),
        ({"grad_dtype": "bf16"}, "dp=2", True, (True, True, False, False)),
        ({}, "dp=2", False, (False, False, False, True)),
    ],
)
def test_data_parallelism_in_megatrons_words(
    engine: dict[str, str], text: str, trains: bool, fields: tuple[bool, ...]
) -> None:
    found = ddp_config(EngineConfig.model_validate(engine), layout(text), trains=trains)
    assert found.use_distributed_optimizer == trains
    reduces, gathers = found.overlap_grad_reduce, found.overlap_param_gather
    assert (reduces, gathers, found.align_param_gather, found.grad_reduce_in_fp32) == fields


@pytest.mark.distributed
def test_determinism_changes_nothing_on_a_cpu_and_gradients_in_bf16_change_little(forks: Forks, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", mlp_only_layers=(1,), **SIZES)
    plain = Case(layout="dp=2", engine=(("dtype", "bf16"),))
    cases = [plain, *(replace(plain, engine=(*plain.engine, each)) for each in SETTINGS)]
    default, deterministic, rounded = forks.world(2, "settings_worker:main", tmp_path, cases)[0]
    assert default["norm"] == deterministic["norm"] != rounded["norm"]
    assert rounded["norm"] == pytest.approx(default["norm"], rel=0.02)
    for name, weight in default["weights"][1].items():
        assert torch.equal(deterministic["weights"][1][name], weight), name
    assert deterministic["deterministic"]
    assert not default["deterministic"]


@pytest.mark.distributed
def test_padding_of_rows_as_fp8_needs_it_changes_nothing(forks: Forks, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", mlp_only_layers=(1,), **SIZES)
    cases = [Case(layout=text, token_multiple=multiple) for text in ("tp=2,ep=2", "cp=2") for multiple in (1, 16)]
    found = forks.world(2, "settings_worker:main", tmp_path, cases)[0]
    for default, padded in ((found[0], found[1]), (found[2], found[3])):
        assert any(row % 32 for row in default["rows"])
        assert not any(row % 32 for row in padded["rows"])
        assert padded["norm"] == pytest.approx(default["norm"], rel=1e-5)
        for name, weight in default["weights"][1].items():
            assert float((padded["weights"][1][name] - weight).abs().max()) <= 1e-5, name


@pytest.mark.parametrize(
    ("fp8", "fields"),
    [
        ("none", (None, "delayed")),  # its default, which nothing reads
        ("tensorwise", ("hybrid", "tensorwise")),
        ("blockwise", ("e4m3", "blockwise")),
        ("mxfp8", ("e4m3", "mxfp8")),
    ],
)
def test_fp8_in_megatrons_words(fp8: str, fields: tuple[str | None, str]) -> None:
    """A dense model: with experts Megatron-Core looks for Transformer Engine (test_engine_te.py)."""
    dense = replace(ARCHITECTURE, num_experts=0, experts_per_token=0, expert_hidden_size=0)
    engine = EngineConfig.model_validate({"fp8": fp8})
    found = transformer_config(dense, engine, layout(), fused_kernels=False)
    assert (found.fp8, found.fp8_recipe, found.fp8_param) == (*fields, False)


def test_deepep_in_megatrons_words() -> None:
    for engine, fields in (
        (EngineConfig(), ("alltoall", "deepep")),  # whose second is its default, which nothing reads
        (EngineConfig(dispatcher="deepep"), ("flex", "deepep")),
    ):
        found = transformer_config(ARCHITECTURE, engine, layout("ep=2"), fused_kernels=False)
        assert (found.moe_token_dispatcher_type, found.moe_flex_dispatcher_backend) == fields
        assert found.moe_router_dtype == "fp32"  # DeepEP takes no other


@pytest.mark.distributed
def test_linear_layers_with_apex_add_their_gradients_themselves(forks: Forks, tmp_path: Path) -> None:
    """Under overlap, with weights that do not train, and with recomputation. Frozen weights get no gradient."""
    make_tiny_model(tmp_path / "model", mlp_only_layers=(1,), **SIZES)
    plain = Case(layout="dp=2")
    cases = [
        plain,
        replace(plain, optim=(("freeze", ("attention",)),)),
        replace(plain, layout="tp=2,ep=2", engine=(("recompute", "full"),), critic=True),
    ]
    found = forks.world(2, "settings_worker:main", tmp_path, [*cases, *(replace(case, apex=True) for case in cases)])[0]
    for default, fused in zip(found[:3], found[3:], strict=True):
        assert fused["norm"] == pytest.approx(default["norm"], rel=1e-6)
        for name, weight in default["weights"][1].items():
            assert float((fused["weights"][1][name] - weight).abs().max()) <= 1e-6, name
    assert [each["fused"] for each in found[:3]] == [0, 0, 0]
    assert found[3]["fused"] > found[4]["fused"] > 0


def test_apexs_kernel_is_taken_on_gpus_if_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_apex_kernel(torch.device("cuda"))
    there = types.ModuleType("fused_weight_gradient_mlp_cuda")
    there.__spec__ = importlib.machinery.ModuleSpec(there.__name__, None)
    monkeypatch.setitem(sys.modules, there.__name__, there)
    assert has_apex_kernel(torch.device("cuda"))
    assert not has_apex_kernel(torch.device("cpu"))
    for fused in (False, True):
        found = transformer_config(ARCHITECTURE, EngineConfig(), layout(), fused_kernels=False, fused_gradients=fused)
        assert found.gradient_accumulation_fusion is fused


def test_determinism_on_a_gpu_needs_cublass_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    check_deterministic(EngineConfig(deterministic=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_deterministic(EngineConfig())
    check_deterministic(EngineConfig(deterministic=True, device="cpu"))
    with pytest.raises(ConfigError, match=r"deterministic: true, but the environment variable CUBLAS_WORKSPACE"):
        check_deterministic(EngineConfig(deterministic=True))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    check_deterministic(EngineConfig(deterministic=True))


def test_settings_that_the_layers_would_ignore_are_refused() -> None:
    """engine.layers auto gives layers in plain PyTorch where there is no GPU or no Transformer Engine."""
    for module in ("moe_act", "mla_up_proj"):
        with pytest.raises(UserError, match=f"engine.recompute: {module} needs Transformer Engine's layers"):
            choose_layers(EngineConfig(recompute=f"core_attn,{module}"), ARCHITECTURE)
    choose_layers(EngineConfig(recompute="core_attn,layernorm,moe"), ARCHITECTURE)
    for engine in (EngineConfig(cp_comm="a2a"), EngineConfig(fp8="mxfp8")):
        with pytest.raises(UserError, match=r"(cp_comm: a2a|fp8: mxfp8) needs Transformer Engine's layers, and"):
            choose_layers(engine, ARCHITECTURE)


def test_the_exchange_of_attention_in_megatrons_words() -> None:
    for engine in (EngineConfig(), EngineConfig(cp_comm="a2a")):
        found = transformer_config(ARCHITECTURE, engine, layout("cp=2"), fused_kernels=False)
        assert (found.context_parallel_size, found.cp_comm_type) == (2, engine.cp_comm)
