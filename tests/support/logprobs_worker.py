"""Log-probs of a vocabulary that is spread over ranks, and their gradients."""

from __future__ import annotations

from typing import Any


def inputs(dtype: Any) -> tuple[Any, ...]:
    """Returns hidden [T, H], weight [V, H], labels [T], more tokens [T, k] and the slopes of a loss [T, 1 + k]."""
    import torch

    made = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=made, dtype=dtype) for n in (11, 13))
    labels = torch.randint(13, (11,), generator=made)
    top = torch.stack([torch.randperm(13, generator=made)[:4] for _ in range(11)])
    top[0, 0] = labels[0]  # the label may be among them
    return hidden, weight, labels, top, torch.randn(11, 5, generator=made, dtype=dtype)


def main(k: int) -> list[Any]:
    """Returns log-probs [T, 1 + k], the gradient of hidden, and this rank's rows of the weight's gradient."""
    import torch
    import torch.distributed as dist

    from megatron_rl.engine.logprobs import TokenLogProbs, VocabularyShard

    hidden, weight, labels, top, slopes = inputs(torch.float32)
    rows = 14 // dist.get_world_size()  # one row of padding
    start = rows * dist.get_rank()
    padded = torch.cat([weight, torch.full((1, 6), 9.0)])[start : start + rows].clone().requires_grad_()
    hidden.requires_grad_()
    group = dist.group.WORLD
    assert group is not None
    shard = VocabularyShard(start, 13, group)
    found = TokenLogProbs.apply(hidden, padded, labels, top[:, :k], 0.7, shard, 4)
    logprobs = torch.cat([found[0][:, None], found[2]], dim=1)
    (logprobs * slopes[:, : 1 + k]).sum().backward()
    gradient = hidden.grad
    assert padded.grad is not None
    dist.all_reduce(gradient)
    return [logprobs.tolist(), gradient.tolist(), padded.grad.tolist(), found[1].tolist()]
