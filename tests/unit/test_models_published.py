"""The config.json files of published models: what is read from each, how many parameters follow, which layouts fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from published_models import PUBLISHED

from megatron_rl.config.layout import Layout, check_layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.models.architecture import Architecture, read_architecture, refuse_unserved
from megatron_rl.models.fields import ModelError
from megatron_rl.models.registry import family_of, weights_of

# Billions of parameters as the model cards have them, without layers that predict several tokens.
PARAMETERS = {
    "Qwen--Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen--Qwen2-57B-A14B": 57.4,
    "Qwen--Qwen3-235B-A22B": 235.1,
    "Qwen--Qwen3-30B-A3B": 30.5,
    "Qwen--Qwen3-8B": 8.2,
    "Qwen--Qwen3-Coder-480B-A35B-Instruct": 480.2,
    "Qwen--Qwen3-Next-80B-A3B-Instruct": 79.7,
    "Qwen--Qwen3.5-35B-A3B": 34.7,
    "allenai--OLMoE-1B-7B-0924": 6.9,
    "deepseek-ai--DeepSeek-V2-Lite": 15.7,
    "deepseek-ai--DeepSeek-V3": 671.0,
    "mistralai--Mixtral-8x7B-v0.1": 46.7,
    "moonshotai--Kimi-K2-Instruct": 1026.4,
    "moonshotai--Moonlight-16B-A3B-Instruct": 16.0,
    "openai--gpt-oss-20b": 20.9,
    "zai-org--GLM-4.5-Air": 106.9,
}
LAYOUTS = {
    "Qwen--Qwen3-235B-A22B": ["tp=4,pp=4,ep=8", "tp=8,pp=4,ep=16", "tp=4,pp=2,vpp=4,ep=8"],
    "Qwen--Qwen3-30B-A3B": ["tp=2,ep=8", "tp=4,cp=2,ep=8"],
    "Qwen--Qwen3-Next-80B-A3B-Instruct": ["tp=4,pp=2,ep=8", "tp=8,cp=2,ep=16"],
    "Qwen--Qwen3.5-35B-A3B": ["tp=4,ep=8", "tp=2,pp=4,cp=2,ep=8"],
    "deepseek-ai--DeepSeek-V3": ["tp=8,pp=8,ep=32", "tp=8,pp=8,vpp=2,ep=32", "pp=16,ep=64"],
    "moonshotai--Kimi-K2-Instruct": ["tp=8,pp=8,ep=48"],
    "moonshotai--Moonlight-16B-A3B-Instruct": ["tp=2,pp=4,ep=8"],
    "zai-org--GLM-4.5-Air": ["tp=8,pp=4,ep=8"],
}


def read(name: str, tmp_path: Path) -> Architecture:
    shutil.copy(PUBLISHED / f"{name}.json", tmp_path / "config.json")
    return read_architecture(tmp_path)


def test_every_published_file_is_listed() -> None:
    assert {file.stem for file in PUBLISHED.glob("*.json")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_model_has_as_many_parameters_as_its_card_says(name: str, tmp_path: Path) -> None:
    arch = read(name, tmp_path)
    count = sum(weight.elements() for weight in weights_of(arch) if not weight.copy)
    assert round(count / 1e9, 1) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_servers_need_no_more_than_published_files_have(name: str, tmp_path: Path) -> None:
    arch = read(name, tmp_path)
    refuse_unserved(tmp_path, arch)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in family_of(arch).SERVER_FIELDS:
        del config.get("text_config", config)[field]
        (tmp_path / "config.json").write_text(json.dumps(config))
        inner = "text_config." if "text_config" in config else ""
        with pytest.raises(ModelError, match=f"config.json has no .*{inner}{field}, without"):
            refuse_unserved(tmp_path, arch)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Qwen--Qwen3-30B-A3B", {"model_type": "llama4"}, "model_type is 'llama4'; expected qwen3_moe or "),
        ("Qwen--Qwen3.5-35B-A3B", {"text_config": None}, "text_config is None; expected an object"),
        ("Qwen--Qwen3.5-35B-A3B", {"tie_word_embeddings": True}, "tie_word_embeddings is True; expected false"),
        ("Qwen--Qwen3.5-35B-A3B", {"audio_config": {}}, "not understood: audio_config = {}; if it changes nothing"),
    ],
)
def test_a_refusal_is_one_short_line(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    published = json.loads((PUBLISHED / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**published, **changes}))
    with pytest.raises(ModelError) as refused:
        read_architecture(tmp_path)
    found = str(refused.value).removeprefix(f"{tmp_path}/")
    assert found.startswith(f"config.json: {message}")
    assert "\n" not in found
    assert len(found) < 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 0}, "text_config.num_experts_per_tok is 0; expected an integer of at least 1"),
        ({"attn_output_gate": False}, "text_config.attn_output_gate is False; expected true"),
        ({"mlp_only_layers": [3]}, "text_config.mlp_only_layers is [3]; expected []"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_time": 1}}, "rope_parameters.mrope_time = 1"),
        ({"new": 1}, "not understood: text_config.new = 1"),
        ({"norm_topk_prob": False}, "text_config.norm_topk_prob is False; expected true"),
        ({"moe_intermediate_size": None}, "text_config.moe_intermediate_size is None; expected an integer"),
    ],
)
def test_errors_name_fields_of_the_object_within(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    published = json.loads((PUBLISHED / "Qwen--Qwen3.5-35B-A3B.json").read_text())
    published["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ModelError) as refused:
        read_architecture(tmp_path)
    assert message in str(refused.value)


@pytest.mark.parametrize(("name", "layout"), [(name, each) for name, layouts in LAYOUTS.items() for each in layouts])
def test_a_published_model_fits_the_layouts_that_its_users_take(name: str, layout: str, tmp_path: Path) -> None:
    """94 layers in four stages, 61 in eight, and more tensor-parallel ranks than key-value heads."""
    arch = read(name, tmp_path)
    resolved = Layout.resolve(*parse_layout(layout))
    assert check_layout(resolved, arch, EngineConfig()) == []
    stages = resolved.split(arch.num_layers)
    assert [layer for stage in stages for layer in stage] == list(range(arch.num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 4}, "topk_group is 4; expected half of num_experts_per_tok = 4, or n_group"),
        ({"n_group": 7}, "n_group is 7; expected a divisor of 256 experts, and at least topk_group = 4"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; expected \"sigmoid\""),
        ({"norm_topk_prob": False}, "norm_topk_prob is False; expected true"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2; expected 1"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8; expected 128 or null"),
        ({"kv_lora_rank": None}, "kv_lora_rank is None; expected an integer"),
    ],
)
def test_what_a_router_cannot_do_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """And what latent attention cannot."""
    published = json.loads((PUBLISHED / "deepseek-ai--DeepSeek-V3.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**published, **changes}))
    with pytest.raises(ModelError) as refused:
        read_architecture(tmp_path)
    assert message in str(refused.value)


def test_features_that_numbers_of_parameters_do_not_show(tmp_path: Path) -> None:
    router = read("deepseek-ai--DeepSeek-V3", tmp_path).router
    assert (router.groups, router.groups_per_token, router.scale) == (8, 4, 2.5)
    assert read("deepseek-ai--DeepSeek-V3", tmp_path).predictor_layers == 1
    assert read("moonshotai--Kimi-K2-Instruct", tmp_path).router.groups == 1
    assert read("zai-org--GLM-4.5-Air", tmp_path).rotary_width == 64
    assert read("deepseek-ai--DeepSeek-V2-Lite", tmp_path).router.pre_softmax
    assert read("moonshotai--Moonlight-16B-A3B-Instruct", tmp_path).dense_layers == (0,)
