"""Token log-probs and entropy from hidden states under vocabulary parallelism, without a full logits tensor.

Shapes: T tokens, H hidden, V vocabulary rows of this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """Rows [start, start + V) of a vocabulary padded up to a multiple of the group; rows >= size are padding."""

    start: int
    size: int
    group: dist.ProcessGroup


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the labels and at k more tokens of each position, and the entropy
    over the whole vocabulary.

    Logits exist for `chunk` tokens at a time, in the forward and, computed again, in the backward pass. The gradient of
    hidden is this rank's part of a sum over the group, as Megatron's sequence-parallel gather expects it. Entropy
    carries no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        top: Tensor,
        temperature: float,
        shard: VocabularyShard,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [T, H], weight [V, H], labels [T] and top [T, k] global ids; returns fp32 log-probs [T], entropy [T]
        and log-probs [T, k]."""
        logprobs, entropy, log_z = (
            torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3)
        )
        at_top = torch.empty(top.shape, dtype=torch.float32, device=hidden.device)
        # Half as many tokens as in the backward pass, because two fp32 tensors of the logits' size exist here.
        for part in _parts(len(hidden), max(chunk // 2, 1)):
            logits = _logits(hidden[part], weight, temperature, shard)
            log_z[part], logprobs[part], entropy[part] = _log_softmax(logits, labels[part], shard)
            if top.shape[1]:
                local, mine = _local_labels(top[part], shard, len(weight))
                chosen = logits.gather(1, local) * mine
                dist.all_reduce(chosen, group=shard.group)
                at_top[part] = chosen - log_z[part, None]
        ctx.save_for_backward(hidden, weight, labels, top, log_z)
        ctx.constants = (temperature, shard, chunk)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, at_top

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, top, log_z = ctx.saved_tensors
        temperature, shard, chunk = ctx.constants
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None  # frozen: None
        for part in _parts(len(hidden), chunk):
            grad, grad_top = grads[0][part, None] / temperature, grads[2][part] / temperature
            total = grad + grad_top.sum(-1, keepdim=True)
            logits = _logits(hidden[part], weight, temperature, shard)
            grad_logits = logits.sub_(log_z[part, None]).exp_().mul_(-total)
            local, mine = _local_labels(labels[part], shard, len(weight))
            grad_logits.scatter_add_(1, local[:, None], grad * mine[:, None])
            if top.shape[1]:
                local, mine = _local_labels(top[part], shard, len(weight))
                grad_logits.scatter_add_(1, local, grad_top * mine)
            grad_logits = grad_logits.to(weight.dtype)
            del logits  # in fp32
            grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden[part]
            del grad_logits  # before the next logits are made
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _parts(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _log_softmax(logits: Tensor, labels: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logarithm of the softmax's denominator, log-probs at the labels, and entropy, each [T]."""
    highest = logits.max(dim=-1).values
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=shard.group)
    unnormalised = (logits - highest[:, None]).exp_()
    local, mine = _local_labels(labels, shard, logits.shape[1])
    at_label = logits.gather(1, local[:, None]).squeeze(1) * mine
    sums = torch.stack([unnormalised.sum(-1), unnormalised.mul_(logits).sum(-1), at_label])
    dist.all_reduce(sums, group=shard.group)
    log_z = highest + sums[0].log()
    return log_z, sums[2] - log_z, log_z - sums[1] / sums[0]


def _logits(hidden: Tensor, weight: Tensor, temperature: float, shard: VocabularyShard) -> Tensor:
    """Returns a new fp32 tensor [T, V], which may be written to."""
    logits = (hidden @ weight.t()).float().div_(temperature)
    padding = shard.start + len(weight) - shard.size
    if padding > 0:
        # Finite, so that 0 * logit stays 0 in the entropy.
        logits[:, max(len(weight) - padding, 0) :] = torch.finfo(torch.float32).min
    return logits


def _local_labels(labels: Tensor, shard: VocabularyShard, rows: int) -> tuple[Tensor, Tensor]:
    """The labels as rows of this shard, and 1.0 where this shard holds them."""
    local = labels - shard.start
    return local.clamp(0, rows - 1), ((local >= 0) & (local < rows)).float()
