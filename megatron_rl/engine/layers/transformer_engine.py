"""Transformer Engine's layers, as Megatron-Core puts them together."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_rl.engine.layers.provider import sequence_bounds
from megatron_rl.models.architecture import Architecture

# A norm is fused into the linear layer that follows it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class TransformerEngineLayers:
    """The LayerProvider of Transformer Engine. Which layers a block has follows from the configuration alone."""

    fused_kernels = True

    def block_spec(
        self, arch: Architecture, config: TransformerConfig, vp_stage: int | None
    ) -> TransformerBlockSubmodules:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)

    def packed_sequences(
        self, cu_seqlens: npt.NDArray[np.integer], cp: int, cp_rank: int, device: torch.device
    ) -> PackedSeqParams:
        return PackedSeqParams(**sequence_bounds(cu_seqlens, device))

    def weight_names(self, name: str, experts: range) -> list[tuple[str, int | None]]:
        if local := re.fullmatch(r"(mlp\.experts\.linear_fc[12]\.weight)(\d+)", name):
            return [(f"{local[1]}{experts.start + int(local[2])}", None)]
        return [(_FUSED_NORMS.get(name, name), None)]
