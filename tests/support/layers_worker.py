"""Pieces of the layers in plain PyTorch, next to Megatron-Core's own and to sums in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
TOKENS, HIDDEN, EXPERTS, TOP_K = 40, 16, 8, 3


class Called(TorchDispatchMode):
    """Collects the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def permutation(dtype: torch.dtype) -> dict[str, Any]:
    """What reaches the experts, what comes back, both gradients, and the operations that are called for it."""
    from config_files import ARCHITECTURE
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.config.schema import EngineConfig
    from megatron_rl.engine.layers.plain_torch import TorchLayers
    from megatron_rl.engine.megatron_config import transformer_config
    from megatron_rl.ranks.place import start_process_groups

    layout = Layout.resolve(*parse_layout("tp=1"))
    start_process_groups(layout, CPU, seed=0)
    config = transformer_config(ARCHITECTURE, EngineConfig(device="cpu"), layout, fused_kernels=False)
    TorchLayers().block_spec(ARCHITECTURE, config, None)  # replaces functions of the dispatcher
    made = torch.Generator().manual_seed(0)
    tokens = torch.randn(TOKENS, HIDDEN, generator=made).to(dtype)
    scales = torch.randn(TOKENS * TOP_K, 1, generator=made).to(dtype)
    weights = torch.randn(TOKENS, HIDDEN, generator=made).to(dtype)
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    for row in routing_map:
        row[torch.randperm(EXPERTS, generator=made)[:TOP_K]] = True

    def through(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        x = tokens.to(dtype, copy=True).requires_grad_()
        rows, _, order, *_ = module.permute(x, routing_map, num_out_tokens=TOKENS * TOP_K)
        rows.retain_grad()
        # Weighted in the tokens' own dtype, so that `exact` adds the same numbers.
        back = module.unpermute((rows.to(scales.dtype) * scales).to(dtype), order, restore_shape=x.shape)
        (back * weights.to(dtype)).sum().backward()
        return {"rows": rows.detach(), "back": back.detach(), "rows' gradient": rows.grad, "gradient": x.grad}

    with Called() as megatrons:
        megatron = through(moe_utils, dtype)
    with Called() as own:
        ours = through(token_dispatcher, dtype)
    return {
        "megatron": megatron,
        "ours": ours,
        "exact": through(moe_utils, torch.float64),
        "called": {"megatron": megatrons.names, "ours": own.names},
    }


def rotation(lengths: list[int]) -> dict[str, Tensor]:
    """Queries of packed sequences after the rotary embedding: Megatron-Core's and ours."""
    import numpy as np
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer import TransformerConfig

    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.engine.layers.plain_torch import TorchLayers
    from megatron_rl.engine.layers.rotary import Turns
    from megatron_rl.ranks.place import start_process_groups

    start_process_groups(Layout.resolve(*parse_layout("tp=1")), torch.device("cpu"), seed=0)
    group = parallel_state.get_context_parallel_group()
    bounds = np.cumsum([0, *lengths])
    sequences = TorchLayers().packed_sequences(bounds, 1, 0, torch.device("cpu"))
    rotary = RotaryEmbedding(8, 1.0, cp_group=group)
    angles = rotary(max(lengths))
    query = torch.randn(int(bounds[-1]), 2, 8, generator=torch.Generator().manual_seed(0))
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2)
    sequences.turn(Turns(rotary.inv_freq, 1.0))
    return {
        "megatron": apply_rotary_pos_emb(query, angles, config, cu_seqlens=sequences.cu_seqlens_q, cp_group=group),
        "ours": sequences.rotate(query.unsqueeze(1)).squeeze(1),
    }


def delta_net(lengths: list[int]) -> dict[str, dict[str, Tensor]]:
    """Outputs and gradients of a gated delta network: of packed sequences, and of each alone, put together."""
    import numpy as np
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from megatron_rl.config.layout import Layout, parse_layout
    from megatron_rl.engine.layers.delta_net import GatedDeltaNet
    from megatron_rl.engine.layers.plain_torch import TorchLayers
    from megatron_rl.models.architecture import DeltaNet
    from megatron_rl.ranks.place import start_process_groups

    start_process_groups(Layout.resolve(*parse_layout("tp=1")), CPU, seed=0)
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, perform_initialization=False)
    net = DeltaNet(layers=(0,), key_heads=2, value_heads=4, key_dim=6, value_dim=5, kernel=4)
    layer = GatedDeltaNet(config, 1, net, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=made))
    hidden = torch.randn(sum(lengths), 1, HIDDEN, generator=made)

    def through(parts: list[list[int]]) -> dict[str, Tensor]:
        x = hidden.clone().requires_grad_()
        outputs = []
        for rows, part in zip(x.split([sum(part) for part in parts]), parts, strict=True):
            sequences = TorchLayers().packed_sequences(np.cumsum([0, *part]), 1, 0, CPU)
            outputs.append(layer(rows, None, packed_seq_params=sequences)[0])
        output = torch.cat(outputs)
        output.square().sum().backward()
        assert x.grad is not None
        return {"output": output.detach(), "gradient": x.grad}

    packed, alone = through([lengths]), through([[length] for length in lengths])
    return {"packed": packed, "alone": alone}
