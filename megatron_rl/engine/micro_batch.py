"""One rank's view of a packed micro-batch, as tensors: its context-parallel slice and how attention reads it.

The packing itself, and the order of context parallelism, are made in megatron_rl.data.packing, without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rl.data.packing import PackedBatch, cp_index
from megatron_rl.engine.device import put
from megatron_rl.engine.layers.provider import LayerProvider


@dataclass(frozen=True)
class MicroBatch:
    """Inputs of one forward pass on this rank, each [1, T / cp], and the whole packed batch they are cut from.

    With top tokens labels are [1 + k, T / cp]: the labels, and below them the k tokens whose log-probs are wanted too.
    """

    token_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    sequences: PackedSeqParams
    packed: PackedBatch
    gather_order: Tensor  # [T]: where each token of the whole batch is in the concatenation over cp ranks


def micro_batch(
    packed: PackedBatch, cp: int, cp_rank: int, device: torch.device, layers: LayerProvider, top: bool = False
) -> MicroBatch:
    """Cuts this rank's slice out of a packed batch; `layers` say what their attention is told of it. `top` asks for the
    log-probs of the batch's top tokens, if it has any."""
    mine = cp_index(packed.cu_seqlens, cp, cp_rank)
    gathered = np.concatenate([cp_index(packed.cu_seqlens, cp, rank) for rank in range(cp)])

    def tensor(array: npt.NDArray[np.generic]) -> Tensor:
        return put(array[mine].astype(np.int64), device).unsqueeze(0)

    labels = tensor(packed.labels)
    if top and packed.top is not None:
        likely = put(packed.top.ids[mine].T.astype(np.int64), device)
        labels = torch.cat([labels, likely])
    return MicroBatch(
        token_ids=tensor(packed.token_ids),
        position_ids=tensor(packed.position_ids),
        labels=labels,
        sequences=layers.packed_sequences(packed.cu_seqlens, cp, cp_rank, device),
        packed=packed,
        gather_order=put(np.argsort(gathered), device),
    )
