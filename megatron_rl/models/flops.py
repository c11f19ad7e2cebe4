"""Counts the arithmetic of a model's forward pass. No torch."""

from __future__ import annotations

import functools

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.registry import weights_of


@functools.lru_cache(maxsize=8)
def active_elements(arch: Architecture) -> float:
    """Returns the elements of the matrices that a token is multiplied with, without the output layer: of experts those
    that it chooses, and of the embedding none."""
    share = arch.experts_per_token / arch.num_experts if arch.num_experts else 1.0
    return sum(
        weight.elements() * (1.0 if weight.expert is None else share)
        for weight in weights_of(arch)
        if weight.kind != "embedding"
    )


@functools.lru_cache(maxsize=4096)
def forward_flops(arch: Architecture, length: int) -> float:
    """Returns the mean FLOPs of a token's forward pass in a sequence of `length` tokens: two for each element of the
    matrices that it meets, and those of attention over the tokens before it."""
    widths = 2 * arch.head_dim
    if arch.latent is not None:
        widths = arch.latent.nope_dim + arch.latent.rope_dim + arch.latent.value_dim
    attended = 0.0
    for layer in range(arch.num_layers):
        if not arch.has_delta_net(layer):
            attended += min(length / 2, arch.window_of(layer) or length)
    return 2 * active_elements(arch) + 2 * attended * arch.num_heads * widths + head_flops(arch)


def head_flops(arch: Architecture) -> float:
    """Returns those of the output layer among them."""
    return 2 * arch.hidden_size * (1 if arch.value_head else arch.vocab_size)
