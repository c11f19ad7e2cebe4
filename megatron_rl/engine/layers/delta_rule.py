"""The gated delta rule, chunk by chunk, over sequences of unequal length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, steps: Sequence[int]
) -> Tensor:
    """Returns what queries read from each sequence's state, [N, heads, C, V] for N chunks of C tokens.

    Token t of a sequence decays the state S [K, V], which is zero before its first token, and then corrects what S
    holds for its key: S = exp(decay) S, S = S + key (beta (value - key^T S))^T; it reads query^T S. Within a chunk the
    corrections are the solution of a triangular system [2412.06464, section 3.3; transformers'
    torch_chunk_gated_delta_rule].

    query and key [N, heads, C, K], value [N, heads, C, V], decay and beta [N, heads, C], all in the dtype of the state;
    decay is at most 0. `steps` are those of ChunkPlan: the chunks of step i go on with the states of the first steps[i]
    sequences. What stands in a chunk behind a sequence's last token changes nothing before it.
    """
    total = decay.cumsum(-1)  # from the chunk's beginning
    later = torch.ones(decay.shape[-1], decay.shape[-1], dtype=torch.bool, device=decay.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    faded, beta = total.exp().unsqueeze(-1), beta.unsqueeze(-1)
    system = (beta * key) @ key.mT * between  # its diagonal is taken for ones
    wanted = torch.cat((beta * value, beta * key * faded), dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    parts = (
        *solved.split((value.shape[-1], key.shape[-1]), dim=-1),
        query * faded,
        query @ key.mT * between,
        key * (total[..., -1:] - total).exp().unsqueeze(-1),
        faded[..., -1:, :],
    )
    state = value.new_zeros(steps[0], value.shape[1], key.shape[-1], value.shape[-1])
    outputs = []
    for written, erased, reading, within, kept, fading in zip(*(x.split(tuple(steps)) for x in parts), strict=True):
        state = state[: len(written)]
        written = written - erased @ state
        outputs.append(reading @ state + within @ written)
        state = state * fading + kept.mT @ written
    return torch.cat(outputs)
