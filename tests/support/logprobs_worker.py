"""Log-probs of a vocabulary that is spread over ranks, and their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from benchmarks.allocations import allocated_peak
from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.engine.device import use_device
from megatron_rl.models.weights_io import torch_dtype


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


def peaks(model: Path, dtype: Literal["fp32", "bf16"]) -> dict[str, int]:
    """Returns the most bytes that are allocated at once while the policy's head computes log-probs of a micro-batch of
    the default size: in the forward pass, and in a forward and a backward pass."""
    device = use_device("cpu")
    import torch
    import torch.distributed as dist

    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    layout = Layout.resolve(*parse_layout(f"tp={dist.get_world_size()}"))
    place = start_process_groups(layout, device, seed=0)
    engine = EngineConfig(device="cpu", dtype=dtype)
    policy = Policy(model, layout, place, engine, device, None)
    tokens = engine.max_tokens_per_micro_batch
    hidden = torch.randn(tokens // layout.tp, 1, policy.arch.hidden_size, dtype=torch_dtype(dtype), requires_grad=True)
    labels = torch.randint(policy.arch.vocab_size, (1, tokens))
    head: Any = policy.models[0]._postprocess
    with torch.no_grad():
        found = {"forward": allocated_peak(lambda: head(hidden, labels))}
    found["gradient"] = allocated_peak(lambda: head(hidden, labels)[:, 0].sum().backward())
    stop_process_groups(leave_world=False)
    return found
