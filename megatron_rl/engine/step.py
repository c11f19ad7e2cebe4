"""One pass of Megatron-Core's pipeline schedule over packed micro-batches: forward only, or with gradients.

The loss of a micro-batch is its share of a sum over all micro-batches and data-parallel ranks (the denominators are
global and already in it), so gradients are summed over ranks, never averaged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_rl.engine.micro_batch import MicroBatch
from megatron_rl.routing.replay import RoutingPass

LossFunction = Callable[[int, Tensor], Tensor]
"""(micro-batch index, the last stage's output [T, C]) -> scalar loss. T is the whole packed batch, padding included."""


class _GatherContext(torch.autograd.Function):
    """Concatenates [T / cp, ...] of all context-parallel ranks.

    Every rank then computes the same loss, so each takes its own slice of the gradient, and nothing is summed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()], None


def _whole(output: Tensor, batch: MicroBatch) -> Tensor:
    """Gathers the last stage's [T / cp, C] into [T, C], in packed order."""
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        output = _GatherContext.apply(output, group).index_select(0, batch.gather_order)
    return output


def forward_backward(
    stages: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss: LossFunction,
    routing: RoutingPass | None = None,
) -> None:
    """Accumulates the summed loss's gradients into the stages' gradient buffers, reduced over ranks. Collective.

    `loss` is called on the last pipeline stage only, once per micro-batch that is not empty: an empty one goes through
    the stages and back, and leaves gradients of 0.
    """
    # Megatron-Core divides gradients (and the aux loss, which it scales by its own tokens) by the number of tokens:
    # multiplying our loss by that number first leaves ours as it is and the aux loss a mean over tokens.
    device = micro_batches[0].token_ids.device
    tokens = torch.full((), sum(_tokens(b) for b in micro_batches), dtype=torch.int64, device=device)
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))

    def loss_function(index: int, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        batch = micro_batches[index]
        whole = _whole(output, batch)
        # The backward pass of an empty one still meets the others' all-to-alls: its loss depends on the output.
        value = whole.sum() * 0 if batch.packed.is_empty else loss(index, whole)
        return value * tokens, torch.full((), _tokens(batch), dtype=torch.int, device=device), {}

    _run(stages, micro_batches, loss_function, routing, forward_only=False)


def _tokens(batch: MicroBatch) -> int:
    """Number of this rank's tokens, padding included, that means over tokens count."""
    return 0 if batch.packed.is_empty else batch.token_ids.numel()


@torch.no_grad()
def forward(
    stages: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], routing: RoutingPass | None = None
) -> list[Tensor]:
    """Returns each micro-batch's output [T, C] on the last pipeline stage, and [] on the others. Collective."""

    def collect(index: int, output: Tensor, non_loss_data: bool = True) -> Tensor:
        return _whole(output, micro_batches[index])

    return _run(stages, micro_batches, collect, routing, forward_only=True)


class _LoadBalancing(contextlib.AbstractContextManager[None]):
    """Keeps Megatron-Core's load-balancing loss out of empty micro-batches.

    A stage's forward and backward passes run one after another, so the coefficient is set before each: routers read it
    when they run, and recomputation runs them in the backward pass.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config
        self._coefficient = config.moe_aux_loss_coeff

    def enter(self, batch: MicroBatch) -> None:
        self._config.moe_aux_loss_coeff = 0.0 if batch.packed.is_empty else self._coefficient

    def __exit__(self, *_: object) -> None:
        self._config.moe_aux_loss_coeff = self._coefficient


def _run(
    stages: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_function: Callable[..., Any],
    routing: RoutingPass | None,
    forward_only: bool,
) -> list[Any]:
    def forward_step(batches: Iterator[tuple[int, MicroBatch]], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        index, batch = next(batches)
        balancing.enter(batch)
        with routing.micro_batch(stages.index(stage), index) if routing else contextlib.nullcontext():
            output = stage(
                input_ids=batch.token_ids,
                position_ids=batch.position_ids,
                attention_mask=None,
                labels=batch.labels,
                packed_seq_params=batch.sequences,
            )
        if output.requires_grad:
            output.register_hook(lambda _: balancing.enter(batch))  # the stage's backward pass begins
        return output, functools.partial(loss_function, index)

    config = get_model_config(stages[0])
    balancing = _LoadBalancing(config)
    iterators = [iter(list(enumerate(micro_batches))) for _ in stages]
    with (
        balancing,
        routing.schedule(len(micro_batches), backward=not forward_only) if routing else contextlib.nullcontext(),
    ):
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(stages) > 1 else iterators[0],
            model=list(stages) if len(stages) > 1 else stages[0],
            num_microbatches=len(micro_batches),
            # Over all context-parallel ranks; used with virtual stages only, else shapes travel with the tensors.
            seq_length=int(micro_batches[0].packed.cu_seqlens[-1]),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
