"""From an Architecture and a layout to this rank's stages of Megatron-Core's GPTModel: policy or critic."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.layers import RMSNorm, layer_spec
from megatron_rl.engine.logprobs import TokenLogProbs, VocabularyShard
from megatron_rl.models.architecture import Architecture


class PolicyModel(GPTModel):
    """A stage of the policy. The last one returns [T, 2], fp32: the log-prob of each label, and the entropy."""

    def __init__(
        self, *args: Any, unpadded_vocab_size: int, temperature: float, logit_chunk_tokens: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.logit_chunk_tokens = logit_chunk_tokens
        tp = self.pg_collection.tp
        self.shard = VocabularyShard(start=tp.rank() * self.vocab_size // tp.size(), size=unpadded_vocab_size, group=tp)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """Takes the place of the logits: hidden_states [T, 1, H] (sequence-parallel), labels [1, T]."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        logprobs, entropy = TokenLogProbs.apply(
            hidden_states.squeeze(1),
            weight,
            labels.squeeze(0),
            self.temperature,
            self.shard,
            self.logit_chunk_tokens,
        )
        return torch.stack([logprobs, entropy], dim=-1)


class ValueHead(torch.nn.Module):
    """One number from each hidden state, the same on every tensor-parallel rank. Weights not yet set."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(1, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, 1], fp32."""
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class ValueModel(GPTModel):
    """A stage of the critic. The last one returns [T, 1], fp32: the value of the state before each label."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = ValueHead(self.config.hidden_size, self.config.params_dtype)

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # All ranks compute the same values, so each takes its own slice of the gradient and nothing is summed.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return self.output_layer(hidden_states.squeeze(1))


def uses_transformer_engine(engine: EngineConfig) -> bool:
    """Raises RuntimeError when Transformer Engine is asked for and cannot be imported."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if engine.layers == "te" and not installed:
        raise RuntimeError(
            "engine.layers is te, but transformer_engine is not installed; install the extra [te], or use auto"
        )
    on_gpu = engine.device != "cpu" and torch.cuda.is_available()
    return engine.layers == "te" or (engine.layers == "auto" and installed and on_gpu)


def transformer_config(arch: Architecture, engine: EngineConfig, layout: Layout) -> TransformerConfig:
    te = uses_transformer_engine(engine)
    dtype = torch.bfloat16 if engine.dtype == "bf16" else torch.float32
    # Named for dense models too: the default dispatcher refuses packed sequences whether or not it is used.
    moe: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    if arch.num_experts:
        moe |= {
            "num_moe_experts": arch.num_experts,
            "moe_router_topk": arch.experts_per_token,
            "moe_ffn_hidden_size": arch.expert_hidden_size,
            "moe_layer_freq": [int(arch.is_moe(layer)) for layer in range(arch.num_layers)],
            # Softmax over the chosen scores is softmax over all, then normalised over the chosen.
            "moe_router_pre_softmax": not arch.norm_topk_prob,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss" if engine.aux_loss_coefficient else "none",
            "moe_aux_loss_coeff": engine.aux_loss_coefficient,
            "moe_grouped_gemm": te,
            "moe_permute_fusion": te,
        }
        if engine.dispatcher == "deepep":
            moe |= {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    recompute: dict[str, Any] = {}
    if engine.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif engine.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        layernorm_epsilon=arch.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=engine.dtype == "bf16",
        # Weights come from the Hugging Face files.
        perform_initialization=False,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        # Packed micro-batches differ in length, but the interleaved schedule cannot exchange shapes when two stages
        # are each other's predecessor and successor: there they are all made as long as the longest (step.py).
        variable_seq_lengths=layout.vpp == 1,
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        # Losses and gradients are summed: the denominators are global and already in the loss.
        calculate_per_token_loss=True,
        apply_rope_fusion=te,
        bias_activation_fusion=te,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **moe,
        **recompute,
    )


def build_stages(
    arch: Architecture,
    engine: EngineConfig,
    layout: Layout,
    config: TransformerConfig,
    temperature: float,
) -> list[GPTModel]:
    """This rank's virtual stages, in order, weights not yet set: of a PolicyModel, or of a ValueModel if the
    architecture has its head. Collective over all ranks."""
    vocab_size = -(-arch.vocab_size // layout.tp) * layout.tp
    stages: list[GPTModel] = []
    for index in range(layout.vpp):
        vp_stage = index if layout.vpp > 1 else None
        common = {
            "transformer_layer_spec": _block_spec(arch, engine, config, vp_stage),
            "vocab_size": vocab_size,
            "max_sequence_length": arch.max_position_embeddings,
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            "position_embedding_type": "rope",
            "rotary_base": arch.rope_theta,
            "vp_stage": vp_stage,
        }
        if arch.value_head:
            stages.append(ValueModel(config, **common))
        else:
            stages.append(
                PolicyModel(
                    config,
                    **common,
                    share_embeddings_and_output_weights=arch.tied_embeddings,
                    unpadded_vocab_size=arch.vocab_size,
                    temperature=temperature,
                    logit_chunk_tokens=engine.logit_chunk_tokens,
                )
            )
        _mark_shards(stages[-1])
    return stages


def _mark_shards(stage: GPTModel) -> None:
    """Sets what DDP, the gradient norm and clipping ask of a weight: over which ranks it is copied or cut.

    Megatron-Core marks tensor-parallel weights as it initialises them, which we have it leave out. An unmarked one
    is taken for a copy, and all shards but the first are missing from the gradient norm.
    """
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in stage.modules():
        dim = dims.get(type(module))
        if dim is None or module.weight is None or hasattr(module.weight, "tensor_model_parallel"):
            continue
        set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
    for name, parameter in stage.named_parameters():
        if ".experts." in name:
            # Reduced over the ranks that hold the same experts, which are not those that hold the same attention
            # whenever ep > 1 or etp differs from tp. With Transformer Engine, Megatron-Core 0.16 looks at ep alone.
            parameter.allreduce = False
            # Not a copy on other tensor-parallel ranks: each counts in the gradient norm and is clipped. Transformer
            # Engine from 2.13 on leaves it to Megatron-Core, which does it from 0.19.2 on (Megatron-LM #5916).
            parameter.tensor_model_parallel = True


def _block_spec(
    arch: Architecture, engine: EngineConfig, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    if uses_transformer_engine(engine):
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(arch.is_moe(layer)) for layer in layers], layer_norm=RMSNorm
    )
