"""Experts with few calls equal experts one by one. test_rollout_logprobs.py tests the real server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from megatron_rl.rollout import sglang_cpu_experts as cpu_experts

EXPERTS, HIDDEN, WIDTH = 5, 8, 12
PLAIN: dict[str, Any] = {"activation": "silu", "gemm1_alpha": None, "apply_router_weight_on_input": False}


def unexpected(*arguments: object) -> Tensor:
    raise AssertionError("fell back to SGLang's own function")


def layer(width: int = WIDTH, **more: Any) -> SimpleNamespace:
    g = torch.Generator().manual_seed(1)
    gate_up, down = (torch.randn(EXPERTS, *shape, generator=g) for shape in ((2 * width, HIDDEN), (HIDDEN, width)))
    return SimpleNamespace(num_experts=EXPERTS, w13_weight=gate_up, w2_weight=down, **more)


def tokens(experts: list[list[int]]) -> tuple[Tensor, tuple[Tensor, Tensor, None]]:
    """Returns hidden states of tokens, and their weights and experts as SGLang's router gives them."""
    g = torch.Generator().manual_seed(2)
    ids = torch.tensor(experts, dtype=torch.int32)
    return torch.randn(len(ids), HIDDEN, generator=g), (torch.rand(ids.shape, generator=g), ids, None)


def one_by_one(hidden: Tensor, chosen: tuple[Tensor, Tensor, None], made: SimpleNamespace) -> Tensor:
    result = torch.zeros_like(hidden)
    for token, (weights, experts) in enumerate(zip(*chosen[:2], strict=True)):
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            gate, up = (made.w13_weight[expert] @ hidden[token]).chunk(2)
            result[token] += weight * (made.w2_weight[expert] @ (silu(gate) * up))
    return result


@pytest.mark.parametrize("experts", [[[0, 4], [4, 1], [2, 0]], [[3]], [[1, 0, 2], [2, 1, 0]]])
def test_a_token_gets_the_weighted_sum_of_its_experts(experts: list[list[int]]) -> None:
    made, (hidden, chosen) = layer(), tokens(experts)
    computed = cpu_experts.forward(unexpected, made, hidden, chosen, SimpleNamespace(**PLAIN))
    torch.testing.assert_close(computed, one_by_one(hidden, chosen, made))


def test_no_token_at_all_is_left_to_sglang() -> None:
    hidden, chosen = torch.empty(0, HIDDEN), (torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32), None)
    with pytest.raises(AssertionError, match="fell back"):
        cpu_experts.forward(unexpected, layer(), hidden, chosen, SimpleNamespace(**PLAIN))


def test_widths_that_a_grouped_product_refuses_are_left_to_sglang() -> None:
    made, (hidden, chosen) = layer(width=WIDTH - 2), tokens([[0, 1]])
    with pytest.raises(RuntimeError, match="16"):
        grouped_mm(hidden, made.w2_weight, offs=torch.ones(EXPERTS, dtype=torch.int32))
    with pytest.raises(AssertionError, match="fell back"):
        cpu_experts.forward(unexpected, made, hidden, chosen, SimpleNamespace(**PLAIN))


@pytest.mark.parametrize(
    "change", [{"activation": "gelu"}, {"gemm1_alpha": 1.7}, {"apply_router_weight_on_input": True}]
)
def test_other_experts_than_plain_swiglu_are_left_to_sglang(change: dict[str, object]) -> None:
    hidden, chosen = tokens([[0, 1]])
    with pytest.raises(AssertionError, match="fell back"):
        cpu_experts.forward(unexpected, layer(), hidden, chosen, SimpleNamespace(**PLAIN | change))


@pytest.mark.parametrize("bias", ["w13_weight_bias", "w2_weight_bias"])
def test_experts_with_biases_are_left_to_sglang(bias: str) -> None:
    hidden, chosen = tokens([[0, 1]])
    biased: dict[str, Any] = {bias: torch.ones(1)}
    with pytest.raises(AssertionError, match="fell back"):
        cpu_experts.forward(unexpected, layer(**biased), hidden, chosen, SimpleNamespace(**PLAIN))
