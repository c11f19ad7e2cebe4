"""Reading config.json into an Architecture, and refusing unsupported settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from models_reference import moe_architecture

from megatron_rl.models.architecture import Architecture, Router, differences, read_architecture
from megatron_rl.models.fields import ModelError

# As published for Qwen3-30B-A3B (written by transformers 4.51).
MOE: dict = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DENSE = {
    **{k: v for k, v in MOE.items() if k not in {"decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef"}},
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "tie_word_embeddings": True,
}
for _name in (
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
):
    DENSE.pop(_name)
ABSENT = object()


def read(directory: Path, base: dict, **changes: object) -> Architecture:
    content = {name: value for name, value in {**base, **changes}.items() if value is not ABSENT}
    (directory / "config.json").write_text(json.dumps(content))
    return read_architecture(directory)


def test_the_configuration_of_qwen3_30b_a3b_is_read(tmp_path):
    assert read(tmp_path, MOE) == Architecture(
        model_type="qwen3_moe",
        num_layers=48,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        ffn_hidden_size=6144,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        qk_norm="head",
        tied_embeddings=False,
        initializer_range=0.02,
        num_experts=128,
        experts_per_token=8,
        expert_hidden_size=768,
        dense_layers=(),
        router=Router(scores="softmax", pre_softmax=False),
    )


def test_the_configuration_of_a_dense_model_is_read(tmp_path):
    arch = read(tmp_path, DENSE)
    assert (arch.model_type, arch.tied_embeddings, arch.num_experts) == ("qwen3", True, 0)
    assert not arch.is_moe(0)


def test_a_configuration_saved_by_transformers_5_is_read_the_same(tmp_path):
    """transformers 5 writes num_local_experts and rope_parameters instead of num_experts and rope_theta."""
    from transformers import Qwen3Config, Qwen3MoeConfig

    for base, config in ((MOE, Qwen3MoeConfig), (DENSE, Qwen3Config)):
        before = read(tmp_path, base)
        config.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
        written = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert "rope_parameters" in written
        assert "num_experts" not in written
        assert read_architecture(tmp_path / "saved") == before


@pytest.mark.parametrize(
    ("mlp_only", "step", "dense"),
    [([], 1, ()), ([0, 2], 1, (0, 2)), ([], 2, (0, 2, 4)), ([1], 3, (0, 1, 3, 4)), (None, 1, ())],
)
def test_dense_layers_match_transformers(tmp_path, mlp_only, step, dense):
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeMLP

    small = {"num_hidden_layers": 6, "hidden_size": 8, "num_experts": 8, "moe_intermediate_size": 4}
    arch = read(tmp_path, MOE, **small, intermediate_size=4, mlp_only_layers=mlp_only, decoder_sparse_step=step)
    assert arch.dense_layers == dense
    config = AutoConfig.from_pretrained(tmp_path)
    theirs = [isinstance(Qwen3MoeDecoderLayer(config, layer).mlp, Qwen3MoeMLP) for layer in range(6)]
    assert theirs == [not arch.is_moe(layer) for layer in range(6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected \"silu\""),
        ({"attention_bias": True}, "attention_bias is True; expected false"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.original_max_position_embeddings is miss",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type is 'linear'"),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 4.0}},
            "not understood: rope_scaling.factor = 4.0",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta is .*differ"),
        ({"rope_theta": ABSENT}, "rope_theta is missing"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types is .*full_attention"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*each of the 48 layers"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'; expected"),
        ({"model_type": "phimoe"}, "model_type is 'phimoe'; expected qwen3_moe or qwen3"),
        ({"architectures": ["Qwen3MoeForTokenClassification"]}, "architectures is .*Qwen3MoeForCausalLM"),
        ({"num_shared_experts": 1}, "not understood: num_shared_experts = 1; .*remove it"),
        ({"head_dims": 64}, "not understood: head_dims = 64"),
        ({"hidden_size": ABSENT}, "hidden_size is missing"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'; expected an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": ABSENT}, "tie_word_embeddings is missing"),
        ({"norm_topk_prob": ABSENT}, "norm_topk_prob is missing"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; expected true or false"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps is 10+\.\.\.; expected a number above 0 and below 1e\+38"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 10+; expected an integer of at most 1000"),
        ({"num_experts": 10**9}, "num_experts is 10+; expected an integer of at most 4096"),
        ({"hidden_size": 10**30}, "hidden_size is 10+; expected an integer of at most 1000000000"),
        ({f"extra_{n}": 1 for n in range(40)}, "extra_9 = 1 and 30 more; if it changes nothing"),
        ({"extra": "x" * 5000}, r"not understood: extra = \"x+\.\.\.;"),
        ({"num_experts": ABSENT}, "num_experts is missing"),
        ({"num_local_experts": 64}, r"num_experts is \[64, 128\]"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129; expected at most num_experts = 128"),
        ({"mlp_only_layers": [48]}, r"mlp_only_layers is \[48\]; expected .* 0 to 47"),
        (
            {"num_key_value_heads": 5},
            "num_key_value_heads is 5; expected a divisor of num_attention_heads = 32",
        ),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, MOE, **change)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True},  # Qwen3-Coder
        {"unsloth_fixed": True, "unsloth_version": "2025.5.1"},
        {"auto_map": {"AutoConfig": "configuration.Config"}},
        {"pretraining_tp": 1, "mlp_bias": False, "_attn_implementation": "sdpa"},
        {"head_dim": None, "hidden_size": 4096},
        {
            "rope_theta": ABSENT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "attention_factor": None},
        },
        # What transformers 4 writes with use_diff=False.
        {
            "torchscript": False,
            "pruned_heads": {},
            "is_decoder": False,
            "add_cross_attention": False,
            "cross_attention_hidden_size": None,
            "tie_encoder_decoder": False,
            "use_bfloat16": False,
            "max_length": 20,
            "temperature": 1.0,
            "top_k": 50,
            "task_specific_params": None,
            "finetuning_task": None,
        },
    ],
)
def test_fields_that_change_nothing_are_accepted(tmp_path, fields):
    hidden_size = fields.get("hidden_size", MOE["hidden_size"])
    assert read(tmp_path, MOE, **fields) == read(tmp_path, MOE, hidden_size=hidden_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qkv_bias", True),
        ("shared_expert_intermediate_size", 768),
        ("use_qk_norm", False),
        ("mlp_bias", True),
        ("pretraining_tp", 2),
        ("pruned_heads", {"0": [1]}),
        ("add_cross_attention", True),
    ],
)
def test_an_inert_field_with_another_value_is_refused(tmp_path, field, value):
    with pytest.raises(ModelError, match=rf"{field} is .*; expected .*no other value is supported"):
        read(tmp_path, MOE, **{field: value})


def test_fields_of_one_family_are_refused_in_another(tmp_path):
    with pytest.raises(ModelError, match="not understood: shared_expert_intermediate_size = 0"):
        read(tmp_path, DENSE, shared_expert_intermediate_size=0)


def test_a_full_configuration_written_by_transformers_5_is_read(tmp_path):
    from transformers import Qwen3Config, Qwen3MoeConfig

    for base, config in ((MOE, Qwen3MoeConfig), (DENSE, Qwen3Config)):
        before = read(tmp_path, base)
        (tmp_path / "config.json").write_text(config.from_pretrained(tmp_path).to_json_string(use_diff=False))
        assert read_architecture(tmp_path) == before


def test_the_error_for_a_refused_object_shows_its_short_parts(tmp_path):
    kept = [f"model.layers.{layer}.mlp.gate" for layer in range(200)]
    with pytest.raises(ModelError) as caught:
        read(tmp_path, MOE, pruned_heads={"heads": kept, "method": "short"})
    assert "pruned_heads is {'method': 'short', 'heads': [" in str(caught.value)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 250


def test_a_dense_model_refuses_expert_fields_and_requires_head_dim(tmp_path):
    with pytest.raises(ValueError, match="not understood: num_experts = 8"):
        read(tmp_path, DENSE, num_experts=8)
    with pytest.raises(ValueError, match="head_dim is missing"):
        read(tmp_path, DENSE, head_dim=ABSENT)
    with pytest.raises(ValueError, match="head_dim is missing"):
        read(tmp_path, DENSE, head_dim=None)
    assert read(tmp_path, MOE, head_dim=ABSENT).head_dim == 64
    assert read(tmp_path, MOE, head_dim=None).head_dim == 64


def test_a_missing_file_and_invalid_json_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="model directory"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, "is not valid JSON: nested too deep"),
        (b'{"a": ' * 100_000, "is not valid JSON: nested too deep"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON: Exceeds the limit"),
        (b'{"hidden_size": "\xff"}', "is not valid JSON: 'utf-8' codec"),
        (b'{"hidden_size": 64, "hidden_size": 32}', "hidden_size is given twice; keep one"),
        (b'{"rope_scaling": {"factor": 1, "factor": 2}}', "factor is given twice; keep one"),
    ],
)
def test_a_damaged_file_gives_one_error_that_names_it(tmp_path, content, told):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_architecture(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}")
    assert told in str(caught.value)


def test_a_directory_in_place_of_config_json_is_an_error(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Is a directory"):
        read_architecture(tmp_path)


def test_models_differ_in_what_they_compute() -> None:
    arch = moe_architecture()
    same = dataclasses.replace(arch, initializer_range=0.5, predictor_layers=1)
    assert differences(same, arch) == []
    assert differences(dataclasses.replace(arch, num_layers=9), arch) == [f"num_layers 9, not {arch.num_layers}"]
