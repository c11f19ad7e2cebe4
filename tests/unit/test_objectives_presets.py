"""Every preset: its paper's formula, the specification's numbers, and properties of its gradient."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_inputs import SEEDS, SOME_LENGTHS, gradient_of, loss_and_gradient, one_response, token_keys
from objective_papers import PAPERS, paper_loss
from objective_reference import (
    FAMILY,
    denominators,
    differentiated,
    pack,
    packed_entropy,
    random_sequences,
    reference,
    split,
)

from megatron_rl.config.switches import MinClip, ObjectiveConfig
from megatron_rl.data.schedule import Denominators
from megatron_rl.lab.metrics import TRAINING, training_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.policy_loss import policy_loss

names = st.sampled_from(sorted(FAMILY))


def test_every_preset_has_a_reference_formula():
    assert set(FAMILY) == set(PAPERS)


@pytest.mark.parametrize("drift", [1.5, 0.5, 5e-4])
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradient_equal_the_papers_formula(name, drift):
    for seed in range(4):
        sequences = random_sequences(seed, [3, 0, 5, 1, 7, 2], drift=drift, mismatch=1.0)
        outputs, gradient = loss_and_gradient(sequences, FAMILY[name], padding=3)
        loss, expected = differentiated(sequences, lambda live, frozen: paper_loss(sequences, name, live, frozen))  # noqa: B023
        assert outputs.loss.item() == pytest.approx(loss, rel=1e-9)
        np.testing.assert_allclose(gradient, expected, atol=1e-7 * np.abs(expected).max())
        single, single_gradient = loss_and_gradient(sequences, FAMILY[name], torch.float32)
        if name not in ("gspo", "gspo_token"):  # their clip is as narrow as float32 rounding
            # Score centering has tails that are what is left to 1.
            rounding = 1e-4 if name == "score_centering" else 1e-6
            assert single.loss.item() == pytest.approx(loss, abs=rounding * max(1, abs(loss)))
            np.testing.assert_allclose(single_gradient, expected, atol=1e-6)


@given(SEEDS, SOME_LENGTHS, names)
def test_any_batch_equals_the_papers_formula(seed, lengths, name):
    sequences = random_sequences(seed, lengths, mismatch=0.7)
    outputs, gradient = loss_and_gradient(sequences, FAMILY[name])
    loss, expected = differentiated(sequences, lambda live, frozen: paper_loss(sequences, name, live, frozen))
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@given(SEEDS, SOME_LENGTHS, names, st.integers(1, 4))
def test_results_do_not_depend_on_order_packing_or_micro_batches(seed, lengths, name, parts):
    sequences = random_sequences(seed, lengths)
    whole, gradient = loss_and_gradient(sequences, FAMILY[name])
    wanted = dict(zip(token_keys(sequences), gradient, strict=True))
    total = 0.0
    got: dict[tuple[int, int], float] = {}
    for padding, micro_batch in enumerate(split(sequences, parts, seed)):
        outputs, part = loss_and_gradient(micro_batch, FAMILY[name], padding=padding, whole=sequences)
        total += outputs.loss.item()
        got |= dict(zip(token_keys(micro_batch), part, strict=True))
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    assert got == pytest.approx(wanted, abs=1e-12)


# Advantages by token


@given(SEEDS, SOME_LENGTHS, st.sampled_from(sorted(FAMILY)), st.sampled_from([0.3, 0.01]))
def test_any_batch_with_per_token_advantages_equals_the_reference(seed, lengths, name, drift):
    sequences = random_sequences(seed, lengths, drift=drift, by_token=True)
    outputs, gradient = loss_and_gradient(sequences, FAMILY[name])
    loss, expected = reference(sequences, FAMILY[name])
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ppo", "dapo", "grpo", "dr_grpo", "gspo_token"])
def test_loss_with_per_token_advantages_equals_the_papers_formula(name):
    clipped = 0
    for seed in range(4):
        sequences = random_sequences(seed, [3, 0, 5, 1, 7, 2], drift=0.3, by_token=True)
        outputs, gradient = loss_and_gradient(sequences, FAMILY[name])
        loss, expected = differentiated(sequences, lambda live, frozen: paper_loss(sequences, name, live, frozen))  # noqa: B023
        assert outputs.loss.item() == pytest.approx(loss, rel=1e-9)
        np.testing.assert_allclose(gradient, expected, atol=1e-7 * np.abs(expected).max())
        clipped += int((gradient == 0).sum())
    assert 0 < clipped < 4 * 18


@given(SEEDS, SOME_LENGTHS, st.booleans())
def test_gspo_token_differs_from_gspo_if_advantages_vary_in_a_response(seed, lengths, by_token):
    """All tokens of a response share a ratio, so value and clip agree, but each advantage acts on its own token."""
    sequences = random_sequences(seed, lengths, by_token=by_token)
    for clip in (MinClip(low=0.9, high=9.0), MinClip(low=0.05, high=0.05)):
        (gspo, whole), (token, own) = (
            loss_and_gradient(sequences, FAMILY[name].model_copy(update={"clip": clip}))
            for name in ("gspo", "gspo_token")
        )
        assert token.loss.item() == gspo.loss.item()
        for name in ("below", "above", "active_low", "active_high"):
            assert torch.equal(getattr(token.values.clipping, name), getattr(gspo.values.clipping, name))
        if clip.high == 9.0:  # wide enough that every token has a gradient
            assert np.allclose(own, whole, rtol=1e-9, atol=0) == (not by_token or max(lengths) == 1)


# On policy


@given(SEEDS, st.integers(1, 6), st.integers(1, 5), names)
def test_on_policy_gradients_are_the_weighted_advantages(seed, length, count, name):
    """At equal lengths all presets have the same gradient for one prompt, up to a constant of the aggregation."""
    drawn = random_sequences(seed, [length] * count, drift=0.0, mismatch=0.0)
    sequences = [dataclasses.replace(sequence, prompt=0) for sequence in drawn]
    _, gradient = loss_and_gradient(sequences, FAMILY[name])
    scale = {"seq-mean-token-sum": length, "constant-length": length / 3000}.get(FAMILY[name].aggregation, 1)
    expected = np.concatenate([np.full(length, -s.advantage / (length * count)) for s in sequences])
    np.testing.assert_allclose(gradient, expected * scale, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILY)
def test_nothing_is_clipped_on_the_first_mini_batch(name, dtype):
    clip = FAMILY[name].clip
    narrow = {key: 0.0 for key in ("low", "high") if getattr(clip, key, None) is not None}
    config = FAMILY[name].model_copy(update={"clip": clip.model_copy(update=narrow), "denominator": "old"})
    outputs, gradient = loss_and_gradient(random_sequences(3, [4, 0, 7], drift=0.0), config, dtype)
    clipping = outputs.values.clipping
    assert not (clipping.below | clipping.above | clipping.active_low | clipping.active_high).any()
    assert (outputs.values.log_sequence_ratio == 0).all()
    assert (gradient != 0).all()


@given(SEEDS, SOME_LENGTHS, names, st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_the_first_mini_batch_of_any_batch_is_exact(seed, lengths, name, by_token, dtype):
    """Every ratio is exactly 1 and every clip fraction exactly 0, for any mismatch with mu."""
    clip = FAMILY[name].clip
    narrow = {key: 0.0 for key in ("low", "high") if getattr(clip, key, None) is not None}
    config = FAMILY[name].model_copy(update={"clip": clip.model_copy(update=narrow), "denominator": "old"})
    sequences = random_sequences(seed, lengths, drift=0.0, mismatch=0.7, by_token=by_token)
    inputs = pack(sequences, dtype, padding=2)
    metrics = MetricAccumulator(TRAINING)
    outputs = policy_loss(inputs, config, denominators(sequences))
    training_metrics(metrics, inputs, outputs, packed_entropy(sequences, padding=2))
    report = metrics.finalize()
    for ratio in ("ratio", "sequence_ratio"):
        assert {report[f"{ratio}/{each}"] for each in ("mean", "min", "p1", "p50", "p99", "max", "ess")} == {1.0}
        assert report[f"{ratio}/chi2"] == report[f"{ratio}/std"] == 0
    fractions = [value for metric, value in report.items() if metric.startswith(("clip/", "kl/old_policy"))]
    assert len(fractions) >= 10
    assert not any(fractions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minirl_masks_nothing_on_the_first_mini_batch(dtype):
    sequences = random_sequences(3, [4, 0, 7], drift=0.0, mismatch=0.7)
    clipping = loss_and_gradient(sequences, FAMILY["minirl"], dtype)[0].values.clipping
    assert not (clipping.below | clipping.above).any()


# Numbers by hand


def slope(ratio, advantage, config, mismatch=1.0):
    """Returns (J, dJ/d log pi, clipping) of one token with r = ratio and rho = mismatch; log pi = log r."""
    inputs = one_response([ratio], advantage)
    inputs = dataclasses.replace(inputs, rollout_logprobs=torch.full((1,), -math.log(mismatch), dtype=torch.float64))
    outputs = policy_loss(inputs, config, Denominators(1, 1, {0: 1}))
    outputs.loss.backward()
    return -outputs.loss.item(), -gradient_of(inputs.logprobs).item(), outputs.values.clipping


@pytest.mark.parametrize(("ratio", "weight"), [(2.0, 0.7864), (0.8, 0.9901), (1.0, 1.0)])
def test_sapo_equals_the_specification(ratio, weight):
    value, gradient, _ = slope(ratio, 1.0, FAMILY["sapo"])
    assert gradient == pytest.approx(weight * ratio, abs=1e-4)
    assert value == pytest.approx(4 / (1 + math.exp(1 - ratio)))


def test_the_soft_gate_is_steeper_for_negative_advantages_and_saturates():
    _, negative, _ = slope(2.0, -1.0, FAMILY["sapo"])
    p = 1 / (1 + math.exp(-1.05))
    assert negative == pytest.approx(-2.0 * 4 * p * (1 - p))
    inputs = dataclasses.replace(one_response([1.0], 1.0), old_logprobs=torch.full((1,), -800.0, dtype=torch.float64))
    loss = policy_loss(inputs, FAMILY["sapo"], Denominators(1, 1)).loss
    loss.backward()
    assert (loss.item(), gradient_of(inputs.logprobs).item()) == (-4.0, 0.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(7.0, 1.0, 5.0), (7.0, -1.0, -5.0), (3.0, 1.0, 3.0), (0.01, 1.0, 0.01), (0.01, -1.0, -0.01), (1.1, -2.0, -2.2)],
)
def test_cispo_bounds_the_weight_from_above_and_keeps_every_gradient(ratio, advantage, gradient):
    value, found, clipping = slope(ratio, advantage, FAMILY["cispo"])
    assert found == pytest.approx(gradient)
    assert value == pytest.approx(gradient * math.log(ratio))
    assert clipping.above.item() == (ratio > 5)
    assert not clipping.below.item()


@pytest.mark.parametrize(
    ("ratio", "mismatch", "advantage", "gradient"),
    [
        (1.1, 2.0, 1.0, 2.2),
        (1.1, 8.0, 1.0, 5.0),  # omega 8.8, capped
        (1.1, 8.0, -1.0, -5.0),
        (1.3, 0.1, 1.0, 0.0),  # r beyond 1 + high, though omega is small
        (1.3, 0.1, -1.0, -0.13),
        (0.7, 2.0, -1.0, 0.0),  # r under 1 - low, though omega is not
        (0.7, 2.0, 1.0, 1.4),
    ],
)
def test_minirl_masks_by_staleness_and_weights_by_staleness_and_mismatch(ratio, mismatch, advantage, gradient):
    assert slope(ratio, advantage, FAMILY["minirl"], mismatch)[1] == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("ratio", "mismatch", "advantage", "gradient"),
    [
        (1.1, 0.5, 1.0, 0.55),  # min(r A, ..) = 1.1, times rho
        (1.1, 5.0, 1.0, 5.5),
        (1.1, 5.01, 1.0, 0.0),  # masked by rho, whatever r is
        (1.1, 0.49, -1.0, 0.0),
        (1.3, 2.0, 1.0, 0.0),  # clipped by r
        (1.3, 2.0, -1.0, -2.6),
    ],
)
def test_icepop_masks_by_mismatch_and_clips_by_staleness(ratio, mismatch, advantage, gradient):
    assert slope(ratio, advantage, FAMILY["icepop"], mismatch)[1] == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("ratio", "mismatch", "advantage", "gradient"),
    [(2.0, 2.0, 1.0, 4.0), (2.0, 2.0, -1.0, -4.0), (2.0, 2.6, 1.0, 0.0), (0.5, 0.39, -1.0, 0.0), (0.5, 0.5, 3.0, 0.75)],
)
def test_mimo_weighs_by_the_ratio_to_mu_and_masks_outside_its_band(ratio, mismatch, advantage, gradient):
    """omega = ratio * mismatch is the weight, and is within 0.2 to 5."""
    assert slope(ratio, advantage, FAMILY["mimo"], mismatch)[1] == pytest.approx(gradient)


def test_mimo_takes_another_band_for_negative_advantages():
    band = FAMILY["mimo"].correction.model_copy(update={"negative_low": 0.5, "negative_high": 2.0})
    config = FAMILY["mimo"].model_copy(update={"correction": band})
    assert [slope(3.0, a, config)[1] for a in (1.0, -1.0)] == pytest.approx([3.0, 0.0])
    assert [slope(0.3, a, config)[1] for a in (1.0, -1.0)] == pytest.approx([0.3, 0.0])


def test_topr_tapers_whole_responses_with_negative_advantages():
    inputs = one_response([0.5, 0.8], -1.0)
    policy_loss(inputs, FAMILY["topr"], Denominators(2, 1)).loss.backward()
    np.testing.assert_allclose(gradient_of(inputs.logprobs), [0.4, 0.4])
    for ratios, advantage, expected in (([2.0, 3.0], -1.0, 1.0), ([2.0, 3.0], 1.0, -1.0), ([0.1, 0.1], 1.0, -1.0)):
        inputs = one_response(ratios, advantage)
        policy_loss(inputs, FAMILY["topr"], Denominators(2, 1)).loss.backward()
        np.testing.assert_allclose(gradient_of(inputs.logprobs), [expected] * 2)


def test_gmpo_clips_each_token_before_the_mean():
    inputs = one_response([math.exp(1.0), math.exp(-1.0)], 1.0)
    outputs = policy_loss(inputs, FAMILY["gmpo"], Denominators(2, 1))
    outputs.loss.backward()
    mean = math.exp((0.4 - 1.0) / 2)  # only a ratio that the advantage pushes further is clipped
    assert -outputs.loss.item() == pytest.approx(mean)
    np.testing.assert_allclose(-gradient_of(inputs.logprobs), [0.0, mean / 2])
    clipping = outputs.values.clipping
    assert clipping.active_high.tolist() == clipping.above.tolist() == [True, False]
    assert clipping.below.tolist() == [False, True]
    assert not clipping.active_low.any()


# Edges


@pytest.mark.parametrize("name", FAMILY)
def test_empty_responses_and_fully_masked_batches_change_nothing(name):
    nothing = pack(random_sequences(1, [0, 0]))
    outputs = policy_loss(nothing, FAMILY[name], Denominators(0, 0))
    outputs.loss.backward()
    assert outputs.loss.item() == 0
    assert (gradient_of(nothing.logprobs) == 0).all()
    sequences = random_sequences(2, [3, 0, 4])
    with_it, gradient = loss_and_gradient(sequences, FAMILY[name])
    without_it, expected = loss_and_gradient([sequences[0], sequences[2]], FAMILY[name])
    assert with_it.loss.item() == without_it.loss.item()
    assert (gradient == expected).all()


@pytest.mark.parametrize("name", FAMILY)
def test_zero_advantages_give_no_gradient(name):
    sequences = [dataclasses.replace(s, advantage=0.0) for s in random_sequences(4, [3, 2])]
    outputs, gradient = loss_and_gradient(sequences, FAMILY[name])
    assert outputs.loss.item() == 0
    assert not gradient.any()


def test_without_bounds_nothing_is_clipped():
    sequences = random_sequences(5, [4, 6], drift=2.0)
    config = ObjectiveConfig(clip=MinClip(low=None, high=None))
    outputs, _ = loss_and_gradient(sequences, config)
    expected = -np.mean([(np.exp(s.logprobs - s.old)[s.mask] * s.advantage).mean() for s in sequences])
    assert outputs.loss.item() == pytest.approx(expected)
    assert denominators(sequences).tokens == len(outputs.values.clipping.above)
    assert not (outputs.values.clipping.above | outputs.values.clipping.below).any()


# Advantages by token


def per_token(seed, n, drift=0.05):
    """Returns inputs of one response with per-token advantages, and their arrays."""
    rng = np.random.default_rng(seed)
    old, mu = -rng.exponential(1.0, (2, n))
    new, advantages = old + drift * rng.normal(size=n), rng.normal(size=n)
    inputs = dataclasses.replace(
        one_response([1.0] * n, 0.0),
        logprobs=torch.tensor(new).requires_grad_(),
        old_logprobs=torch.tensor(old),
        rollout_logprobs=torch.tensor(mu),
        advantages=torch.tensor(advantages),
    )
    return inputs, new, old, advantages


@pytest.mark.parametrize("seed", range(5))
def test_gspo_token_with_per_token_advantages_by_hand(seed):
    """[2507.18071, section 4.3]: one ratio for the response, and each token's own advantage and gradient."""
    inputs, new, old, advantages = per_token(seed, 7)
    clip = MinClip(low=0.01, high=0.02)
    outputs = policy_loss(inputs, FAMILY["gspo_token"].model_copy(update={"clip": clip}), Denominators(7, 1))
    outputs.loss.backward()
    s = math.exp((new - old).mean())
    terms = np.minimum(s * advantages, np.clip(s, 0.99, 1.02) * advantages)
    assert outputs.loss.item() == pytest.approx(-terms.mean())
    gone = ((s > 1.02) & (advantages > 0)) | ((s < 0.99) & (advantages < 0))
    np.testing.assert_allclose(-gradient_of(inputs.logprobs), np.where(gone, 0.0, s * advantages / 7), atol=1e-12)
    # GSPO's ratio would give every token the mean of these gradients.
    inputs.logprobs.grad = None
    policy_loss(inputs, FAMILY["gspo"].model_copy(update={"clip": clip}), Denominators(7, 1)).loss.backward()
    mean = np.where(gone, 0.0, s * advantages / 7).mean()
    np.testing.assert_allclose(-gradient_of(inputs.logprobs), np.full(7, mean), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_ppo_with_per_token_advantages_by_hand(seed):
    inputs, new, old, advantages = per_token(seed, 9, drift=0.3)
    outputs = policy_loss(inputs, FAMILY["ppo"], Denominators(9, 1))
    outputs.loss.backward()
    r = np.exp(new - old)
    terms = np.minimum(r * advantages, np.clip(r, 0.8, 1.2) * advantages)
    assert outputs.loss.item() == pytest.approx(-terms.mean())
    gone = ((r > 1.2) & (advantages > 0)) | ((r < 0.8) & (advantages < 0))
    np.testing.assert_allclose(-gradient_of(inputs.logprobs), np.where(gone, 0.0, r * advantages / 9), atol=1e-12)
