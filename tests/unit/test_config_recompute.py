"""engine.recompute: its values, what it refuses, and which routers run again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from config_files import ARCHITECTURE
from pydantic import ValidationError

from megatron_rl.config.layout import Layout, check_layout, parse_layout
from megatron_rl.config.recompute import MODULES, Recomputation, read_recompute
from megatron_rl.config.schema import EngineConfig
from megatron_rl.models.architecture import Architecture

DENSE = replace(ARCHITECTURE, model_type="qwen3", num_experts=0, experts_per_token=0, expert_hidden_size=0)
ONE = Layout.resolve(*parse_layout(""))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Recomputation()),
        ("full", Recomputation(layers=None)),
        ("full:12", Recomputation(layers=12)),
        ("moe,core_attn", Recomputation(modules=("core_attn", "moe"))),
        *((name, Recomputation(modules=(name,))) for name in MODULES),
    ],
)
def test_values_are_read(text: str, expected: Recomputation) -> None:
    assert read_recompute(text) == expected
    assert EngineConfig(recompute=text).recomputation == expected


@pytest.mark.parametrize("text", ["", "selective", "full:0", "full:-1", "full,moe", "moe,moe", "moe, layernorm", "Moe"])
def test_other_values_are_refused_with_all_that_are_known(text: str) -> None:
    with pytest.raises(ValidationError, match=r"none, full, full:N .* core_attn, layernorm, mlp, moe"):
        EngineConfig(recompute=text)


@pytest.mark.parametrize(
    ("engine", "arch", "message"),
    [
        ({"recompute": "moe"}, DENSE, "engine.recompute: moe, but the model has no experts; drop it"),
        (
            {"recompute": "shared_experts"},
            ARCHITECTURE,
            "engine.recompute: shared_experts, but the model has no shared",
        ),
        ({"recompute": "mlp"}, ARCHITECTURE, "engine.recompute: mlp, but the model has no dense MLPs; drop it"),
        ({"recompute": "mla_up_proj"}, ARCHITECTURE, "engine.recompute: mla_up_proj, but the model has no latent"),
        (
            {"recompute": "moe_act", "layers": "torch"},
            ARCHITECTURE,
            "engine.recompute: moe_act needs Transformer Engine",
        ),
        ({"recompute": "moe_act", "device": "cpu"}, ARCHITECTURE, "engine.recompute: moe_act needs Transformer Engine"),
        ({"recompute": "moe,moe_act"}, ARCHITECTURE, "engine.recompute: moe_act is a part of moe, which is there too"),
    ],
)
def test_modules_that_would_do_nothing_are_refused(engine: dict[str, str], arch: Architecture, message: str) -> None:
    arch = replace(arch, dense_layers=())
    (problem,) = check_layout(ONE, arch, EngineConfig.model_validate(engine))
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("text", "layout", "expected"),
    [
        ("none", "", []),
        ("core_attn,layernorm", "", []),
        ("moe", "pp=2", [0, 2, 3, 4, 5]),
        ("full", "pp=2", [0, 2, 3, 4, 5]),
        ("full:2", "", [0]),
        ("full:2", "pp=3", [0, 2, 3, 4, 5]),
        ("full:1", "pp=3", [0, 2, 4]),
        ("full:1", "pp=3,vpp=2", [0, 2, 3, 4, 5]),
    ],
)
def test_which_routers_run_again_follows_from_the_stages(text: str, layout: str, expected: list[int]) -> None:
    arch = replace(ARCHITECTURE, num_layers=6, dense_layers=(1,))
    assert read_recompute(text).rerun_routers(Layout.resolve(*parse_layout(layout)), arch) == expected
