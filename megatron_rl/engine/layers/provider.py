"""Whose layers a model is made of: what the engine asks of them, the same for every provider."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_rl.engine.device import put
from megatron_rl.models.architecture import Architecture


class LayerProvider(Protocol):
    """Layers under Megatron-Core's names and with its values; only kernels and the names of some parameters differ."""

    @property
    def fused_kernels(self) -> bool:
        """Whether Megatron-Core may use fused kernels of rotary embedding, activation, permutation and grouped GEMM."""

    def block_spec(
        self, arch: Architecture, config: TransformerConfig, vp_stage: int | None
    ) -> TransformerBlockSubmodules:
        """Describes the layers of this rank's virtual stage `vp_stage`; None if there is one stage."""

    def packed_sequences(
        self, cu_seqlens: npt.NDArray[np.integer], cp: int, cp_rank: int, device: torch.device
    ) -> PackedSeqParams:
        """Returns what attention is told of a packed micro-batch, with its plan if it needs one. cu_seqlens [S + 1] are
        the bounds of the whole batch's sequences, in tokens."""

    def weight_names(self, name: str, experts: range) -> Iterable[tuple[str, int | None]]:
        """Returns what a layer's parameter holds; see models.binding.WeightNames."""


def sequence_bounds(cu_seqlens: npt.NDArray[np.integer], device: torch.device) -> dict[str, Any]:
    """Returns the fields of Megatron-Core's PackedSeqParams."""
    bounds = put(cu_seqlens.astype(np.int32), device)
    longest = int(np.diff(cu_seqlens).max())
    return {
        "qkv_format": "thd",
        "cu_seqlens_q": bounds,
        "cu_seqlens_kv": bounds,
        "cu_seqlens_q_padded": bounds,
        "cu_seqlens_kv_padded": bounds,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
    }
