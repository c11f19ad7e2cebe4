"""The critic's loss: numbers by hand, a float64 reference, and invariances."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_inputs import by_the_formula, gradient_of, inputs_of

from megatron_rl.data.schedule import Denominators
from megatron_rl.lab.metrics import VALUE, explained_variance, value_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.value import ValueInputs, value_loss


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope", "clipped"),
    [
        (0.1, 1.0, 0.405, -0.9, False),  # within the band: the plain square
        (0.5, 1.0, 0.32, 0.0, True),  # moved past the band towards the target: bounded at 0.2, no gradient
        (0.5, 0.0, 0.125, 0.5, False),  # moved past it away from the target: the gradient must still pull back
        (-0.5, -1.0, 0.32, 0.0, True),
    ],
)
def test_the_value_clip_by_hand(value, target, loss, slope, clipped):
    inputs = inputs_of([value], [0.0], [target])
    outputs = value_loss(inputs, 0.2, Denominators(1, 1))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(loss)
    assert gradient_of(inputs.values).item() == pytest.approx(slope)
    assert outputs.clipped.tolist() == [clipped]


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([None, 0.1, 0.5]))
def test_loss_and_gradient_equal_the_formulas(seed, n, clip):
    rng = np.random.default_rng(seed)
    values, old, returns = rng.normal(size=(3, n))
    mask = rng.random(n) < 0.7
    tokens = int(mask.sum())
    hidden = np.where(mask, (values, old, returns), np.nan)  # NaN must never be read
    inputs = inputs_of(hidden[0], hidden[1], hidden[2], mask)
    outputs = value_loss(inputs, clip, Denominators(tokens, min(tokens, 1)))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(by_the_formula(values, old, returns, mask, clip), abs=1e-12)
    step = 1e-6
    for t in range(n):
        ends = []
        for sign in (1, -1):
            moved = values.copy()
            moved[t] += sign * step
            ends.append(by_the_formula(moved, old, returns, mask, clip))
        assert gradient_of(inputs.values)[t].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6)


def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch():
    rng = np.random.default_rng(0)
    values, old, returns = rng.normal(size=(3, 7))
    whole = value_loss(inputs_of(values, old, returns), 0.2, Denominators(7, 2)).loss
    parts = [
        value_loss(inputs_of(values[part], old[part], returns[part]), 0.2, Denominators(7, 2)).loss
        for part in (slice(0, 3), slice(3, 7))
    ]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item())


def test_a_fully_masked_batch_has_zero_loss_and_gradient():
    inputs = inputs_of([float("nan")] * 2, [0.0] * 2, [0.0] * 2, [False, False])
    loss = value_loss(inputs, 0.2, Denominators(0, 0)).loss
    loss.backward()
    assert loss.item() == 0
    assert (gradient_of(inputs.values) == 0).all()


def test_the_error_names_a_field_with_a_wrong_shape():
    with pytest.raises(ValueError, match=r"returns: shape \(1,\)"):
        inputs_of([1.0, 2.0], [1.0, 2.0], [1.0])


def report_of(values, returns, outcomes):
    metrics = MetricAccumulator(VALUE)
    values, returns, outcomes = (torch.tensor(each, dtype=torch.float64) for each in (values, returns, outcomes))
    outputs = value_loss(
        ValueInputs(values, values, returns, torch.ones(len(values), dtype=torch.bool)), None, Denominators(4, 1)
    )
    value_metrics(metrics, values, returns, outcomes, outputs)
    return metrics.finalize()


def test_only_the_values_get_a_gradient():
    inputs = inputs_of([0.1, 0.9, -0.3], [0.0, 0.5, 0.0], [1.0, 0.0, 0.5])
    others = {"old_values": inputs.old_values.requires_grad_(), "returns": inputs.returns.requires_grad_()}
    value_loss(inputs, 0.2, Denominators(3, 1)).loss.backward()
    assert gradient_of(inputs.values).any()
    assert {name: leaf.grad for name, leaf in others.items()} == dict.fromkeys(others)


def test_explained_variance_equals_its_formula():
    values, returns, outcomes = [0.0, 1.0, 2.0, 4.0], [0.5, 1.0, 2.5, 3.0], [0.0, 0.0, 1.0, 1.0]
    report = report_of(values, returns, outcomes)
    explained = explained_variance(report)
    for name, target in (("", returns), ("/outcome", outcomes)):
        expected = 1 - np.var(np.subtract(target, values)) / np.var(target)
        assert explained[f"explained_variance{name}"] == pytest.approx(expected)
    assert report["loss"] == pytest.approx(np.mean(np.square(np.subtract(returns, values))) / 2)
    assert explained_variance(report_of([0.0, 1.0], [1.0, 1.0], [2.0, 2.0])) == {}
    equal = [0.9] * 1237  # their standard deviation is only a rounding error
    assert explained_variance(report_of([0.5] * 1237, equal, equal)) == {}
    perfect = explained_variance(report_of(returns, returns, returns))
    assert perfect["explained_variance"] == pytest.approx(1)
