"""Process groups and stage layers according to Megatron-Core."""

from __future__ import annotations

from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.engine.megatron_config import uneven_stages

Groups = dict[str, list[list[int]]]


def answer(num_layers: int, layouts: list[str]) -> dict[str, tuple[Groups, list[list[list[int]]]]]:
    """Returns (groups by axis, layers by stage and virtual stage) for each layout."""
    resolved = {text: Layout.resolve(*parse_layout(text)) for text in layouts}
    return {text: (groups(layout), layers(layout, num_layers)) for text, layout in resolved.items()}


def groups(layout: Layout) -> Groups:
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(layout.tp, 1, layout.dp, layout.pp, layout.cp, order)
    expert = RankGenerator(layout.etp, layout.ep, layout.edp, layout.pp, 1, order)
    of_expert = {"etp": "tp", "ep": "ep", "edp": "dp"}
    return {axis: dense.get_ranks(axis) for axis in ("tp", "cp", "dp", "pp")} | {
        name: expert.get_ranks(axis) for name, axis in of_expert.items()
    }


def layers(layout: Layout, num_layers: int) -> list[list[list[int]]]:
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=64,
        num_attention_heads=8,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        **uneven_stages(num_layers, layout),
    )

    def part(pp: int, vpp: int | None) -> list[int]:
        # For uneven stages Megatron-Core asks its process groups, and there are none here.
        virtual = None if vpp is None else layout.vpp
        with (
            mock.patch.object(parallel_state, "get_pipeline_model_parallel_rank", return_value=pp),
            mock.patch.object(parallel_state, "get_virtual_pipeline_model_parallel_world_size", return_value=virtual),
        ):
            first = get_transformer_layer_offset(config, vp_stage=vpp, pp_rank=pp)
            return list(range(first, first + get_num_layers_to_build(config, vpp, pp)))

    stages = range(layout.vpp) if layout.vpp > 1 else [None]
    return [[part(pp, vpp) for vpp in stages] for pp in range(layout.pp)]
