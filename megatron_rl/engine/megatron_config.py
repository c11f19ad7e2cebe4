"""Megatron-Core's configuration: one row for each feature of the architecture, the engine and the layout.

Every field here means the same in Megatron-Core 0.16.1 to 0.19.x. What differs between these versions is met elsewhere:
by ON_EVERY_DEVICE in device.py, by the marks of expert weights in stages.py, by the norms of latents in
layers/attention.py, by the order of a router's choice in routing/replay.py, and in optimizer.py, where offload needs
Transformer Engine because 0.16.1 asks for its version.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.models.architecture import Architecture, RampedRope, Router, Yarn
from megatron_rl.models.weights_io import torch_dtype


def transformer_config(
    arch: Architecture, engine: EngineConfig, layout: Layout, *, fused_kernels: bool, fused_gradients: bool = False
) -> TransformerConfig:
    """`fused_kernels`: whether the layers have those of rotary embedding, activation, permutation and grouped GEMM.
    `fused_gradients`: whether Megatron-Core's linear layers add weight gradients to the buffer themselves."""
    kind = MLATransformerConfig if arch.latent else TransformerConfig
    config = kind(
        **_decoder(arch, fused_kernels),
        **_latent(arch),
        **_mixture(arch, engine, fused_kernels),
        **_numbers(engine),
        **_parallelism(layout, engine),
        **uneven_stages(arch.num_layers, layout),
        **_recomputation(engine),
        deterministic_mode=engine.deterministic,
        apply_rope_fusion=fused_kernels,
        bias_activation_fusion=fused_kernels,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fused_gradients,
        # Weights come from the Hugging Face files.
        perform_initialization=False,
        # Losses and gradients are summed: the denominators are global and already in the loss.
        calculate_per_token_loss=True,
    )
    # Set late, as Megatron-Core refuses biases with expert-tensor parallelism: its own experts would add them once a
    # rank, and ours do not. Routers and attention read it.
    config.add_bias_linear = arch.biases
    if isinstance(arch.rope_scaling, Yarn) and not arch.latent:
        # GPTModel reads them from the configuration, of which they are no fields (gpt_model.py, 0.16.1 and 0.19.2).
        for name, value in _yarn(arch.rope_scaling).items():
            setattr(config, f"yarn_{name}", value)
    return config


def _decoder(arch: Architecture, fused_kernels: bool) -> dict[str, Any]:
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_query_groups": arch.num_kv_heads,
        "kv_channels": arch.head_dim,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "layernorm_epsilon": arch.rms_norm_eps,
        "layernorm_zero_centered_gamma": arch.zero_centred_norms,
        # Our own latent attention makes its norms itself.
        "qk_layernorm": arch.qk_norm != "none" or (arch.latent is not None and fused_kernels),
        "attention_output_gate": arch.output_gate,
        "add_qkv_bias": arch.qkv_bias,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _latent(arch: Architecture) -> dict[str, Any]:
    if arch.latent is None:
        return {}
    widths = {
        "q_lora_rank": arch.latent.query_rank,
        "kv_lora_rank": arch.latent.kv_rank,
        "qk_head_dim": arch.latent.nope_dim,
        "qk_pos_emb_head_dim": arch.latent.rope_dim,
        "v_head_dim": arch.latent.value_dim,
        "rotary_base": arch.rope_theta,
    }
    if not isinstance(arch.rope_scaling, Yarn):
        return {**widths, "rope_type": "rope", "rotary_scaling_factor": 1.0}
    yarn = _yarn(arch.rope_scaling)
    del yarn["correction_range_round_to_int"]  # it is always done
    return {**widths, "rope_type": "yarn", **yarn}


def _yarn(yarn: Yarn) -> dict[str, Any]:
    """YaRN as Megatron-Core is told of it. Its factor of cosine and sine is the ratio of two: of 0.1 * mscale *
    ln(factor) + 1 and of the same with mscale_all_dim."""
    below = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1
    return {
        "rotary_scaling_factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": (yarn.attention_factor * below - 1) / (0.1 * math.log(yarn.factor)),
        "mscale_all_dim": yarn.mscale_all_dim,
        "correction_range_round_to_int": yarn.truncate,
    }


def rotary_embedding(arch: Architecture) -> dict[str, Any]:
    """Returns GPTModel's arguments on it. Our own layers and latent attention pass its angles over."""
    embedding = {"rotary_base": arch.rope_theta, "rotary_percent": arch.rotary_fraction}
    match arch.rope_scaling:
        case Yarn() if arch.latent is None:
            return {**embedding, "position_embedding_type": "yarn"}
        case RampedRope() as ramped:
            return {
                **embedding,
                "position_embedding_type": "rope",
                "rope_scaling": True,
                "rope_scaling_factor": ramped.factor,
            }
    return {**embedding, "position_embedding_type": "rope"}


def _mixture(arch: Architecture, engine: EngineConfig, fused_kernels: bool) -> dict[str, Any]:
    # Named for dense models too: the default dispatcher refuses packed sequences whether or not it is used.
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}
    if not arch.num_experts:
        return dispatcher
    if engine.dispatcher == "deepep":
        dispatcher = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.expert_hidden_size,
        "moe_layer_freq": [int(arch.is_moe(layer)) for layer in range(arch.num_layers)],
        **_router(arch.router),
        "moe_shared_expert_intermediate_size": arch.shared_hidden_size or None,
        "moe_shared_expert_gate": arch.shared_gate,
        "moe_router_load_balancing_type": "aux_loss" if engine.aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": engine.aux_loss_coefficient,
        "moe_grouped_gemm": fused_kernels,
        "moe_permute_fusion": fused_kernels,
        **dispatcher,
    }


def _router(router: Router) -> dict[str, Any]:
    return {
        "moe_router_score_function": router.scores,
        "moe_router_pre_softmax": router.pre_softmax,
        "moe_router_enable_expert_bias": router.bias,
        "moe_router_bias_update_rate": 0.0,  # it stays as it is in the files
        "moe_router_num_groups": router.groups if router.groups > 1 else None,
        "moe_router_group_topk": router.groups_per_token if router.groups > 1 else None,
        "moe_router_topk_scaling_factor": router.scale if router.scale != 1 else None,
        "moe_router_dtype": "fp32",
    }


def _numbers(engine: EngineConfig) -> dict[str, Any]:
    dtype = torch_dtype(engine.dtype)
    numbers = {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": engine.dtype == "bf16"}
    if engine.fp8 == "none":
        return numbers
    # Gradients have a wider range than e4m3, if one scale is all that a tensor has.
    return {**numbers, "fp8": "hybrid" if engine.fp8 == "tensorwise" else "e4m3", "fp8_recipe": engine.fp8}


def _parallelism(layout: Layout, engine: EngineConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.tp > 1,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "context_parallel_size": layout.cp,
        "cp_comm_type": engine.cp_comm,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        # Packed micro-batches differ in length, but the interleaved schedule cannot exchange shapes when two stages
        # are each other's predecessor and successor: there they are all made as long as the longest (step.py).
        "variable_seq_lengths": layout.vpp == 1,
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
    }


def uneven_stages(num_layers: int, layout: Layout) -> dict[str, Any]:
    """Stages of unequal depth, layer by layer; Megatron-Core makes equal ones by itself."""
    split = layout.split(num_layers)
    if len(set(map(len, split))) == 1:
        return {}
    stages = [["decoder"] * len(layers) for layers in split]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return {"pipeline_model_parallel_layout": stages}


def _recomputation(engine: EngineConfig) -> dict[str, Any]:
    recomputation = engine.recomputation
    if recomputation.is_whole:
        method, layers = ("uniform", 1) if recomputation.layers is None else ("block", recomputation.layers)
        return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    if recomputation.modules:
        return {"recompute_granularity": "selective", "recompute_modules": list(recomputation.modules)}
    return {}
