"""The layers in plain PyTorch, piece by piece: the order of tokens by expert, rotary embedding, packed attention."""

from __future__ import annotations

import pytest
import torch
from forks import Forks


@pytest.mark.distributed
def test_tokens_go_to_their_experts_and_back_as_with_megatron(forks: Forks) -> None:
    (found,) = forks.world(1, "layers_worker:permutation", torch.float32)
    for name, expected in found["megatron"].items():
        torch.testing.assert_close(found["ours"][name], expected, atol=1e-6, rtol=0, msg=name)


@pytest.mark.distributed
def test_in_bf16_a_sum_over_experts_is_rounded_once(forks: Forks) -> None:
    (found,) = forks.world(1, "layers_worker:permutation", torch.bfloat16)
    assert torch.equal(found["ours"]["back"], found["exact"]["back"].bfloat16())


@pytest.mark.distributed
def test_experts_and_gradients_are_added_up_without_atomic_additions(forks: Forks) -> None:
    """On a GPU these operations add in any order, which gives other bits in every pass."""
    (found,) = forks.world(1, "layers_worker:permutation", torch.float32)
    assert found["called"]["megatron"] & {"scatter_add_", "index_add_", "index_add"}
    assert not [name for name in found["called"]["ours"] if "scatter" in name or "index_add" in name]


@pytest.mark.distributed
@pytest.mark.parametrize("lengths", [[7, 3, 12, 1], [9]])
def test_the_rotary_embedding_of_packed_sequences_is_that_of_megatron(forks: Forks, lengths: list[int]) -> None:
    (found,) = forks.world(1, "layers_worker:rotation", lengths)
    assert torch.equal(found["ours"], found["megatron"])


@pytest.mark.distributed
def test_a_delta_network_gives_a_packed_sequence_what_it_gives_it_alone(forks: Forks) -> None:
    (found,) = forks.world(1, "layers_worker:delta_net", [3, 130, 1, 64, 65])
    for name, expected in found["alone"].items():
        torch.testing.assert_close(found["packed"][name], expected, atol=1e-4, rtol=1e-5, msg=name)


@pytest.mark.gpu
def test_on_a_gpu_two_passes_give_the_same_bits_and_flash_attention_equals_padded_attention() -> None:
    import numpy as np

    from megatron_rl.engine.device import use_device

    device = use_device("cuda")
    from megatron_rl.engine.layers.attention import flash_attention, padded_attention
    from megatron_rl.engine.layers.permutation import add_rows
    from megatron_rl.engine.layers.plain_torch import TorchLayers

    made = torch.Generator(device).manual_seed(0)
    rows = torch.randn(8 * 4096, 64, device=device, generator=made).bfloat16()
    token_of = torch.arange(4096, device=device).repeat(8)
    assert torch.equal(add_rows(rows, token_of, 4096), add_rows(rows, token_of, 4096))

    bounds = np.cumsum([0, 5, 130, 64, 1])
    sequences = TorchLayers().packed_sequences(bounds, 1, 0, device)
    query, key, value = (torch.randn(200, heads, 32, device=device, generator=made).bfloat16() for heads in (4, 2, 2))
    flash = flash_attention(query, key, value, sequences, 0.2)
    padded = padded_attention(query, key, value, sequences, 0.2)
    torch.testing.assert_close(flash, padded, atol=2e-2, rtol=2e-2)
