"""Inputs of the losses, and two formulas as the papers write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from objective_reference import TrainedSequence, denominators, pack

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.objectives.policy_loss import policy_loss
from megatron_rl.objectives.value import ValueInputs

AGGREGATIONS = ["token-mean", "prompt-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant-length"]

SEEDS = st.integers(0, 10**6)
SOME_LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)
"""Number of masked-in tokens of each sequence of a batch; at least one is not 0."""

Numbers = Sequence[Any] | np.ndarray


def loss_and_gradient(
    sequences: Sequence[TrainedSequence],
    config: ObjectiveConfig,
    dtype: torch.dtype = torch.float64,
    padding: int = 0,
    whole: Sequence[TrainedSequence] | None = None,
) -> tuple[Any, np.ndarray]:
    """Returns the outputs of one micro-batch, and the gradient at its masked-in tokens in packed order."""
    inputs = pack(sequences, dtype, padding)
    outputs = policy_loss(inputs, config, denominators(whole or sequences))
    outputs.loss.backward()
    gradient = gradient_of(inputs.logprobs)
    assert (gradient[~inputs.loss_mask] == 0).all()
    return outputs, gradient[inputs.loss_mask].double().numpy()


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def one_response(ratios: Sequence[float], advantage: float, dtype: torch.dtype = torch.float64) -> LossInputs:
    n = len(ratios)
    return LossInputs(
        logprobs=torch.tensor(ratios, dtype=dtype).log().requires_grad_(),
        old_logprobs=torch.zeros(n, dtype=dtype),
        rollout_logprobs=torch.zeros(n, dtype=dtype),
        advantages=torch.full((n,), float(advantage), dtype=dtype),
        loss_mask=torch.ones(n, dtype=torch.bool),
        sequence_ids=torch.zeros(n, dtype=torch.int64),
        num_sequences=1,
        prompts=[0],
    )


def token_keys(sequences: Sequence[TrainedSequence]) -> list[tuple[int, int]]:
    """Returns an id of each token that does not depend on order."""
    return [(id(sequence), int(t)) for sequence in sequences for t in np.flatnonzero(sequence.mask)]


def inputs_of(values: Numbers, old: Numbers, returns: Numbers, mask: Numbers | None = None) -> ValueInputs:
    found, before, wanted = (torch.tensor(each, dtype=torch.float64) for each in (values, old, returns))
    trained = torch.ones(len(values), dtype=torch.bool) if mask is None else torch.tensor(mask)
    return ValueInputs(found.requires_grad_(), before, wanted, trained)


def by_the_paper(rewards: Numbers, values: Numbers, gamma: float, gae_lambda: float) -> list[float]:
    """Sums A_t = sum_l (gamma lambda)^l (R_{t+l} + gamma V_{t+l+1} - V_{t+l}) term by term."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    return [
        sum((gamma * gae_lambda) ** (k - t) * (rewards[k] + gamma * following[k] - values[k]) for k in range(t, n))
        for t in range(n)
    ]


def by_the_formula(values: Numbers, old: Numbers, returns: Numbers, mask: Numbers, clip: float | None) -> float:
    terms = []
    for v, o, r, m in zip(values, old, returns, mask, strict=True):
        if m:
            bounded = v if clip is None else min(max(v, o - clip), o + clip)
            terms.append(max((v - r) ** 2, (bounded - r) ** 2) / 2)
    return sum(terms) / max(len(terms), 1)
