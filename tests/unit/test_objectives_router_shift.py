"""RSPO's router shift in the loss: numbers by hand for every ratio. It applies before the clip and has no gradient."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from objective_inputs import gradient_of, one_response
from objective_reference import FAMILY, OBJECTIVES, clip_of, pack, random_sequences

from megatron_rl.config.switches import MinClip, ObjectiveConfig
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.policy_loss import policy_loss

OPEN = MinClip(low=None, high=None)
MEAN = Denominators(2, 1)


def with_shift(ratios, advantage, shift):
    inputs = one_response(ratios, advantage)
    return dataclasses.replace(inputs, router_shift=torch.tensor(shift, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("ratio", "value", "gradient"),
    [
        # r (1.5, 0.6), shift (0.9, 0.5) with a floor of 0.8: w (1.35, 0.48).
        ("token", (1.35 + 0.48) / 2, [1.35 / 2, 0.48 / 2]),
        ("sequence", math.sqrt(1.35 * 0.48), [math.sqrt(1.35 * 0.48) / 2] * 2),
        ("sequence-token", math.sqrt(1.35 * 0.48), [math.sqrt(1.35 * 0.48) / 2] * 2),
        ("sequence-product", 1.35 * 0.48, [1.35 * 0.48] * 2),
        ("geometric", math.sqrt(1.35 * 0.48), [math.sqrt(1.35 * 0.48) / 2] * 2),
    ],
)
def test_the_router_shift_multiplies_the_ratio(ratio, value, gradient):
    inputs = with_shift([1.5, 0.6], 1.0, [0.9, 0.5])
    outputs = policy_loss(inputs, ObjectiveConfig(ratio=ratio, clip=OPEN, router_shift=0.8), MEAN)
    outputs.loss.backward()
    assert -outputs.loss.item() == pytest.approx(value)
    np.testing.assert_allclose(-gradient_of(inputs.logprobs), gradient)
    assert inputs.router_shift.grad is None
    assert outputs.values.floored is not None
    assert outputs.values.floored.tolist() == [False, True]
    # Metrics of the policy do not include the router shift.
    assert outputs.values.log_sequence_ratio.exp().item() == pytest.approx(math.sqrt(1.5 * 0.6))


@pytest.mark.parametrize(
    ("ratio", "shift", "advantage", "value", "slope", "clipped"),
    [
        (1.3, 0.9, 1.0, 1.17, 1.17, ""),  # 1.3 alone is outside the band; a shift after the clip would give 1.2 * 0.9
        (1.5, 0.9, 1.0, 1.2, 0.0, "high"),
        (0.85, 0.9, -1.0, -0.8, 0.0, "low"),  # the shift moves it out of the band
        (0.85, 0.9, 1.0, 0.765, 0.765, ""),
        (1.0, 1.0, -1.0, -1.0, -1.0, ""),
    ],
)
def test_the_router_shift_is_applied_before_the_clip(ratio, shift, advantage, value, slope, clipped):
    inputs = with_shift([ratio], advantage, [shift])
    outputs = policy_loss(inputs, ObjectiveConfig(router_shift=0.5), Denominators(1, 1))
    outputs.loss.backward()
    assert -outputs.loss.item() == pytest.approx(value)
    assert -inputs.logprobs.grad.item() == pytest.approx(slope)
    found = outputs.values.clipping
    assert (found.active_high.item(), found.active_low.item()) == (clipped == "high", clipped == "low")


def test_rspo_clips_each_token_before_the_mean():
    inputs = with_shift([math.exp(0.5), math.exp(-0.3)], -1.0, [math.exp(-0.2), 0.1])
    outputs = policy_loss(inputs, FAMILY["rspo"], MEAN)
    outputs.loss.backward()
    second = max(-0.3 + math.log(0.8), -0.4)  # clipped: the advantage pushes it further
    assert second == -0.4
    mean = math.exp((0.5 - 0.2 + second) / 2)
    assert outputs.loss.item() == pytest.approx(mean)
    np.testing.assert_allclose(inputs.logprobs.grad, [mean / 2, 0.0])
    assert outputs.values.clipping.active_low.tolist() == [False, True]


@pytest.mark.parametrize("kind", ["mask", "weight", "tapered"])
def test_the_router_shift_also_multiplies_weights(kind):
    inputs = with_shift([0.9], -1.0, [0.95])
    policy_loss(inputs, ObjectiveConfig(clip=clip_of(kind), router_shift=0.5), Denominators(1, 1)).loss.backward()
    assert inputs.logprobs.grad.item() == pytest.approx(0.9 * 0.95)
    inputs = with_shift([0.9], -1.0, [0.8])  # 0.72, under the band
    policy_loss(inputs, ObjectiveConfig(clip=clip_of(kind), router_shift=0.5), Denominators(1, 1)).loss.backward()
    assert inputs.logprobs.grad.item() == pytest.approx(0.0 if kind == "mask" else 0.8)


@pytest.mark.parametrize("config", [*OBJECTIVES.values(), FAMILY["gmpo"]], ids=[*OBJECTIVES, "gmpo"])
def test_a_router_shift_of_1_and_a_missing_one_change_nothing(config):
    inputs = pack(random_sequences(3, [4, 0, 7]))
    sizes = Denominators(11, 2)
    plain = policy_loss(dataclasses.replace(inputs, router_shift=None), config, sizes)
    assert plain.values.floored is None
    with_floor = config.model_copy(update={"router_shift": 0.8})
    ones = dataclasses.replace(inputs, router_shift=torch.ones_like(inputs.logprobs))
    missing = dataclasses.replace(inputs, router_shift=None)
    for objective, given in ((config, inputs), (with_floor, ones), (with_floor, missing)):
        assert policy_loss(given, objective, sizes).loss.item() == plain.loss.item()
    assert policy_loss(inputs, with_floor, sizes).loss.item() != plain.loss.item()


def test_a_router_shift_of_0_is_raised_to_the_floor():
    inputs = with_shift([1.0], 1.0, [0.0])
    assert policy_loss(inputs, FAMILY["rspo"], Denominators(1, 1)).loss.item() == pytest.approx(-0.8)


def test_a_router_shift_with_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"router_shift: shape \(3,\), expected that of logprobs, \(2,\)"):
        with_shift([1.0, 1.0], 1.0, [1.0, 1.0, 1.0])
