"""Mismatch corrections: against the reference, their effect on denominators, and that each is applied only once."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_inputs import AGGREGATIONS, SEEDS, SOME_LENGTHS, gradient_of, one_response, token_keys
from objective_reference import (
    CORRECTIONS,
    DAPO,
    GRPO,
    OBJECTIVES,
    correction_of,
    denominators,
    kept_denominators,
    kl_of,
    pack,
    random_sequences,
    reference,
    split,
)

from megatron_rl.config.switches import CorrectionConfig, IcePop, MinClip, Mis, NoCorrection, SequenceMask, Tis
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.corrections import kept_lengths, leaves_denominators
from megatron_rl.objectives.policy_loss import policy_loss

FREE = GRPO.model_copy(update={"clip": MinClip(low=None, high=None)})
REWEIGHING = ("tis", "mis", "icepop")


def corrected(config, correction):
    return config.model_copy(update={"correction": correction})


def loss_and_gradient(sequences, config, whole=None, padding=0):
    inputs = pack(sequences, padding=padding)
    outputs = policy_loss(inputs, config, kept_denominators(whole or sequences, config))
    outputs.loss.backward()
    return outputs, gradient_of(inputs.logprobs)[inputs.loss_mask].numpy()


# The reference


@pytest.mark.parametrize("denominator", ["old", "rollout"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_loss_and_gradient_equal_the_reference(correction, name, denominator):
    acted = []
    for number, aggregation in enumerate(AGGREGATIONS):
        update = {"aggregation": aggregation, "constant_length": 5, "denominator": denominator}
        config = corrected(OBJECTIVES[name].model_copy(update=update), correction)
        sequences = random_sequences(number, [3, 0, 5, 1, 7, 2], mismatch=0.8)
        outputs, gradient = loss_and_gradient(sequences, config, padding=2)
        loss, expected = reference(sequences, config)
        assert outputs.loss.item() == pytest.approx(loss, abs=1e-9)
        np.testing.assert_allclose(gradient, expected, atol=1e-7)
        found = outputs.values.correction
        acted += (found.truncated if correction.kind == "tis" else found.masked).tolist()
    assert 0 < sum(acted) < len(acted), "the comparison must cover tokens that it acts on, and others"


@given(SEEDS, SOME_LENGTHS, st.sampled_from(CORRECTIONS), st.sampled_from(AGGREGATIONS), st.integers(1, 4))
def test_results_do_not_depend_on_order_or_micro_batches(seed, lengths, correction, aggregation, parts):
    config = corrected(GRPO.model_copy(update={"aggregation": aggregation, "constant_length": 9}), correction)
    sequences = random_sequences(seed, lengths, mismatch=0.5)
    whole, gradient = loss_and_gradient(sequences, config)
    wanted = dict(zip(token_keys(sequences), gradient, strict=True))
    total = 0.0
    got: dict[tuple[int, int], float] = {}
    for padding, micro_batch in enumerate(split(sequences, parts, seed)):
        outputs, part = loss_and_gradient(micro_batch, config, whole=sequences, padding=padding)
        total += outputs.loss.item()
        got |= dict(zip(token_keys(micro_batch), part, strict=True))
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    assert got == pytest.approx(wanted, abs=1e-12)


# Numbers by hand: ratio 1, advantage 1, two tokens with rho 0.25 and 8


def factors(correction, rho=(0.25, 8.0), advantage=1.0, denominator="old"):
    inputs = one_response([1.0] * len(rho), advantage)
    inputs = dataclasses.replace(inputs, rollout_logprobs=-torch.tensor(rho, dtype=torch.float64).log())
    config = corrected(DAPO, correction).model_copy(update={"denominator": denominator})
    return policy_loss(inputs, config, Denominators(len(rho), 1)).values.correction


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (NoCorrection(), [1, 1]),
        (Tis(high=2.0), [0.25, 2]),
        (Tis(high=9.0), [0.25, 8]),
        (Tis(level="sequence", high=1.5), [1.5, 1.5]),
        (Tis(level="sequence", high=3.0), [2, 2]),
        (Mis(high=5.0), [0.25, 0]),
        (Mis(low=0.5, high=9.0), [0, 8]),
        (Mis(level="sequence", high=1.9), [0, 0]),
        (Mis(level="sequence", high=2.1), [2, 2]),
        (Mis(level="geometric", high=1.4), [0, 0]),
        (Mis(level="geometric", low=1.4, high=1.5), [math.sqrt(2)] * 2),
        (IcePop(low=0.5, high=5.0), [0, 0]),
        (IcePop(low=0.25, high=8.0), [0.25, 8]),  # the bounds are within
        (Mis(low=0.25, high=8.0), [0.25, 8]),
        (IcePop(low=0.2, high=5.0), [0.25, 0]),
        (IcePop(low=0.2, high=5.0, negative_low=1e-3, negative_high=9.0), [0.25, 0]),  # the advantage is positive
    ],
)
def test_correction_factors_by_hand(correction, expected):
    found = factors(correction)
    np.testing.assert_allclose(found.factor, expected, atol=1e-12)
    if found.masked is not None:
        assert found.masked.tolist() == [value == 0 for value in expected]
    if found.truncated is not None:
        uncut = [0.25, 8] if getattr(correction, "level", "token") == "token" else [2, 2]
        assert found.truncated.tolist() == [value < whole for value, whole in zip(expected, uncut, strict=True)]


@pytest.mark.parametrize(
    ("keys", "advantage", "expected"),
    [
        ({"negative_low": 0.3}, 1.0, [0.25, 8]),
        ({"negative_low": 0.3}, 0.0, [0.25, 8]),  # an advantage of 0 has the band of positive ones
        ({"negative_low": 0.3}, -1.0, [0, 8]),
        ({"negative_high": 7.0}, 1.0, [0.25, 8]),
        ({"negative_high": 7.0}, -1.0, [0.25, 0]),
        ({"negative_low": 0.25, "negative_high": 8.0}, -1.0, [0.25, 8]),  # the bounds are within
        ({"low": 0.3, "high": 7.0, "negative_low": 0.2, "negative_high": 9.0}, 1.0, [0, 0]),
        ({"low": 0.3, "high": 7.0, "negative_low": 0.2, "negative_high": 9.0}, -1.0, [0.25, 8]),
        ({"low": 0.3, "high": 7.0}, -1.0, [0, 0]),  # a bound that is not set is the other band's
    ],
)
@pytest.mark.parametrize("denominator", ["old", "rollout"])
def test_icepops_band_depends_on_the_sign_of_the_advantage(keys, advantage, expected, denominator):
    found = factors(IcePop(**{"low": 0.2, "high": 9.0, **keys}), advantage=advantage, denominator=denominator)
    # A ratio against mu has rho in it already.
    wanted = expected if denominator == "old" else [float(value > 0) for value in expected]
    np.testing.assert_allclose(found.factor, wanted, atol=1e-12)
    assert found.masked.tolist() == [value == 0 for value in expected]


@pytest.mark.parametrize(
    ("rho", "advantage", "delta", "factor"),
    [
        ((0.5, 0.5), -1.0, 0.6, 0.0),  # mean log(mu/pi_theta) = log 2 = 0.69
        ((0.5, 0.5), -1.0, 0.7, 1.0),
        ((0.25, 0.25), -1.0, math.log(4), 1.0),  # equal to delta is not above delta
        ((0.5, 0.5), 1.0, 0.6, 1.0),  # good responses stay
        ((2.0, 2.0), -1.0, 0.6, 1.0),  # so do responses that are not less likely than under mu
        ((0.25, 1.0), -1.0, 0.6, 0.0),  # the mean over the response, not each token
    ],
)
@pytest.mark.parametrize("denominator", ["old", "rollout"])
def test_the_off_policy_sequence_mask_by_hand(rho, advantage, delta, factor, denominator):
    found = factors(SequenceMask(delta=delta), rho, advantage, denominator)
    assert found.factor.tolist() == [factor] * 2
    assert found.masked.tolist() == [factor == 0] * 2


# Applied only once


@pytest.mark.parametrize("kind", REWEIGHING)
def test_a_correction_bounds_a_ratio_against_mu_without_multiplying_it_again(kind):
    wide = correction_of(kind, high=1e6)
    sequences = random_sequences(7, [4, 6, 2], mismatch=0.5)
    bypassed = FREE.model_copy(update={"denominator": "rollout"})
    expected, wanted = loss_and_gradient(sequences, bypassed)
    for config in (corrected(bypassed, wide), corrected(FREE, wide)):  # omega; r rho
        outputs, gradient = loss_and_gradient(sequences, config)
        assert outputs.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-10)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_a_correction_changes_nothing_without_mismatch(correction):
    sequences = random_sequences(3, [4, 0, 6], mismatch=0.0, drift=0.0)
    expected, wanted = loss_and_gradient(sequences, GRPO)
    outputs, gradient = loss_and_gradient(sequences, corrected(GRPO, correction))
    assert outputs.loss.item() == expected.loss.item()
    assert (gradient == wanted).all()


@given(SEEDS, SOME_LENGTHS, st.sampled_from(CORRECTIONS))
def test_the_correction_factor_has_no_gradient(seed, lengths, correction):
    """The gradient is the factor times the gradient of the surrogate without correction."""
    sequences = random_sequences(seed, lengths, mismatch=0.5)
    config = corrected(FREE.model_copy(update={"aggregation": "seq-mean-token-sum"}), correction)
    outputs, gradient = loss_and_gradient(sequences, config)
    assert not outputs.values.correction.factor.requires_grad
    _, wanted = loss_and_gradient(sequences, corrected(config, NoCorrection()))
    share = kept_denominators(sequences, config).sequences / denominators(sequences).sequences
    np.testing.assert_allclose(gradient * share, wanted * outputs.values.correction.factor.numpy(), atol=1e-12)


# Denominators


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_dropped_tokens_count_in_denominators_unless_they_are_rejected(correction, aggregation):
    """A rejected token counts as masked out. Any other dropped token counts with advantage 0."""
    config = GRPO.model_copy(update={"aggregation": aggregation, "constant_length": 9})
    sequences = random_sequences(12, [5, 3, 8, 2], mismatch=1.0)
    outputs, _ = loss_and_gradient(sequences, corrected(config, correction))
    inputs, factor = pack(sequences), outputs.values.correction.factor
    kept = inputs.loss_mask.clone()
    advantages = inputs.advantages.clone()
    advantages[inputs.loss_mask] *= factor
    sizes = denominators(sequences)
    if leaves_denominators(corrected(config, correction)):
        kept[inputs.loss_mask] = factor > 0
        lengths = [int(kept[inputs.sequence_ids == i].sum()) for i in range(len(sequences))]
        assert inputs.prompts is not None
        by_prompt = dict.fromkeys(inputs.prompts, 0)
        for prompt, length in zip(inputs.prompts, lengths, strict=True):
            by_prompt[prompt] += length
        sizes = Denominators(sum(lengths), sum(length > 0 for length in lengths), by_prompt)
        assert kept_lengths(inputs, corrected(config, correction)).tolist() == lengths
        assert sizes.tokens < denominators(sequences).tokens
    else:
        assert kept_lengths(inputs, corrected(config, correction)).tolist() == [5, 3, 8, 2]
    by_hand = dataclasses.replace(inputs, advantages=advantages, loss_mask=kept)
    assert outputs.loss.item() == pytest.approx(policy_loss(by_hand, config, sizes).loss.item(), abs=1e-12)


def test_only_rejected_tokens_leave_the_denominators():
    each: list[CorrectionConfig] = [NoCorrection(), *CORRECTIONS]
    assert {c.kind for c in each if leaves_denominators(corrected(GRPO, c))} == {"mis"}
    assert {c.kind for c in each if not leaves_denominators(corrected(GRPO, c))} >= {"none", "tis", "icepop"}


# Edges


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["mis", "icepop"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_with_all_tokens_rejected_gives_zero(name, kind, aggregation):
    update = {"aggregation": aggregation, "constant_length": 9, "correction": correction_of(kind, low=1e6, high=1e6)}
    config = OBJECTIVES[name].model_copy(update=update)
    sequences = random_sequences(1, [3, 0, 4])
    outputs, gradient = loss_and_gradient(sequences, config)
    assert outputs.loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_a_fully_masked_batch_gives_zero(correction):
    inputs = pack(random_sequences(1, [0, 0]))
    outputs = policy_loss(inputs, corrected(GRPO, correction), Denominators(0, 0))
    outputs.loss.backward()
    assert outputs.loss.item() == 0
    assert (gradient_of(inputs.logprobs) == 0).all()


def test_a_dropped_ratio_may_overflow():
    inputs = dataclasses.replace(
        one_response([1.0, 1.0], -1.0, torch.float32),
        old_logprobs=torch.tensor([-500.0, 0.0]),
        rollout_logprobs=torch.tensor([0.0, 0.0]),
    )
    for kind in ("mis", "icepop"):
        config = corrected(GRPO, correction_of(kind, low=0.5, high=2.0))
        inputs = dataclasses.replace(inputs, logprobs=inputs.logprobs.detach().requires_grad_())
        loss = policy_loss(inputs, config, Denominators(1, 1)).loss
        loss.backward()
        assert loss.item() == (1.0 if kind == "mis" else 0.5)
        assert gradient_of(inputs.logprobs).tolist() == [0.0, loss.item()]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "unbiased"])
def test_the_kl_of_a_rejected_token_may_overflow(kind):
    inputs = dataclasses.replace(
        one_response([1.0, 1.0], -1.0, torch.float32),
        old_logprobs=torch.tensor([-500.0, 0.0]),
        reference_logprobs=torch.tensor([500.0, 0.0]),
    )
    config = corrected(GRPO, Mis(low=0.5, high=2.0))
    config = config.model_copy(update={"kl": kl_of(kind, beta=0.1)})
    loss = policy_loss(inputs, config, Denominators(1, 1)).loss
    loss.backward()
    assert loss.item() == 1.0
    assert gradient_of(inputs.logprobs)[0] == 0
    assert gradient_of(inputs.logprobs).isfinite().all()
