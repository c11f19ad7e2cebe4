"""Values of the tokens of one micro-batch, as a step that lab.record_steps names keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_rl.data.packing import PackedBatch
from megatron_rl.engine.distribute import Outcome
from megatron_rl.objectives.inputs import LossInputs, LossValues


@dataclass(frozen=True, eq=False)
class TokenValues:
    """The M masked-in tokens of one micro-batch."""

    positions: np.ndarray
    """[M] int64: packed positions of the masked-in tokens."""
    columns: dict[str, np.ndarray]
    """[M] each, as in lab/token_records.py, without step, mini-batch and expert changes."""

    @classmethod
    def of(
        cls, packed: PackedBatch, outcomes: Sequence[Outcome], inputs: LossInputs, values: LossValues, entropy: Tensor
    ) -> TokenValues:
        """Copies the values of `inputs` and entropy, [T] each, from the device."""
        kept = packed.loss_mask.nonzero()[0]
        sequences = packed.sequence_ids[kept]

        def of_sequence(numbers: Sequence[int]) -> np.ndarray:
            return np.array(numbers, dtype=np.int64)[sequences]

        def of_position(row: Tensor) -> np.ndarray:
            return row.detach().float().cpu().numpy()[kept]

        dropped = values.correction.masked
        return cls(
            kept,
            {
                "sample": of_sequence([outcome.index for outcome in outcomes]),
                "group": of_sequence([outcome.group for outcome in outcomes]),
                "position": packed.position_ids[kept] + 1,  # a position holds its label, the next token
                "token_id": packed.labels[kept],
                "weight_version": packed.versions[kept],
                "rollout_logprob": packed.rollout_logprobs[kept],
                "old_logprob": of_position(inputs.old_logprobs),
                "logprob": of_position(inputs.logprobs),
                "entropy": of_position(entropy),
                "advantage": packed.advantages[kept],
                "clipped": _clipped(values).cpu().numpy(),
                "dropped": np.zeros(len(kept), dtype=bool) if dropped is None else dropped.cpu().numpy(),
            },
        )


def _clipped(values: LossValues) -> Tensor:
    clipping = values.clipping
    over = clipping.active_high if clipping.active_dual is None else clipping.active_high | clipping.active_dual
    return over.to(torch.int8) - clipping.active_low.to(torch.int8)
