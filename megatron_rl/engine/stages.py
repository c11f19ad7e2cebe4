"""This rank's stages of Megatron-Core's GPTModel, and the marks that say over which ranks a weight is cut."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.heads import PolicyModel, ValueModel
from megatron_rl.engine.layers.provider import LayerProvider
from megatron_rl.engine.megatron_config import rotary_embedding
from megatron_rl.models.architecture import Architecture


def build_stages(
    arch: Architecture,
    engine: EngineConfig,
    layout: Layout,
    config: TransformerConfig,
    layers: LayerProvider,
    temperature: float,
) -> list[GPTModel]:
    """Returns this rank's virtual stages, in order, weights not yet set: of a PolicyModel, or of a ValueModel if the
    architecture has its head. Collective over all ranks."""
    vocab_size = -(-arch.vocab_size // layout.tp) * layout.tp
    stages: list[GPTModel] = []
    for index in range(layout.vpp):
        vp_stage = index if layout.vpp > 1 else None
        common = {
            "transformer_layer_spec": layers.block_spec(arch, config, vp_stage),
            "vocab_size": vocab_size,
            "max_sequence_length": arch.max_position_embeddings,
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            **rotary_embedding(arch),
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
