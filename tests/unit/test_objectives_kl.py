"""KL estimators: the specification's numbers, and expectations over a whole distribution."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_reference import (
    DAPO,
    OBJECTIVES,
    correction_of,
    denominators,
    kept_denominators,
    kl_of,
    pack,
    random_sequences,
    reference,
)

from megatron_rl.config.switches import KL, MinClip, NoKL
from megatron_rl.objectives.kl import k1, k2, k3, unbiased
from megatron_rl.objectives.policy_loss import policy_loss


@pytest.mark.parametrize(
    ("p", "q", "expected"), [(0.5, 0.4, (0.2231, 0.0249, 0.0231)), (0.4, 0.5, (-0.2231, 0.0249, 0.0269))]
)
def test_kl_estimators_equal_the_numbers_of_the_specification(p, q, expected):
    log_ratio = torch.tensor(math.log(q / p), dtype=torch.float64)
    found = [estimate(log_ratio).item() for estimate in (k1, k2, k3)]
    assert found == pytest.approx(expected, abs=5e-5)
    assert unbiased(log_ratio, torch.tensor(math.log(1.5))).item() == pytest.approx(1.5 * found[2])


def distributions(seed, count=3):
    logits = torch.as_tensor(np.random.default_rng(seed).normal(size=(count, 6)))
    return logits.log_softmax(-1)


@given(st.integers(0, 10**6))
def test_the_expectation_of_unbiased_estimators_is_the_kl(seed):
    policy, reference, old = distributions(seed)
    log_ratio = reference - policy
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert (policy.exp() * k1(log_ratio)).sum().item() == pytest.approx(exact)
    assert (policy.exp() * k3(log_ratio)).sum().item() == pytest.approx(exact)
    assert (old.exp() * unbiased(log_ratio, policy - old)).sum().item() == pytest.approx(exact)
    assert (k3(log_ratio) >= 0).all()
    assert (k2(log_ratio) >= 0).all()


@given(st.integers(0, 10**6))
def test_the_gradient_of_the_unbiased_estimator_is_the_kl_gradient(seed):
    _, reference, old = distributions(seed)
    logits = distributions(seed)[0].clone().requires_grad_()
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad((old.exp() * unbiased(reference - policy, policy - old)).sum(), logits)
    torch.testing.assert_close(found, exact)


def test_equal_policies_have_zero_kl():
    zero = torch.zeros(3)
    assert not any(estimate(zero).any() for estimate in (k1, k2, k3))
    assert not unbiased(zero, torch.ones(3)).any()


# In the loss


def with_reference(sequences, seed=9):
    """Returns the packed inputs, and log pi_ref of the masked-in tokens of each sequence."""
    inputs = pack(sequences, padding=2)
    rng = np.random.default_rng(seed)
    shifts = rng.normal(0, 0.4, len(inputs.logprobs))
    reference = torch.where(inputs.loss_mask, inputs.old_logprobs + torch.as_tensor(shifts), math.nan)
    parts, start = [], 0
    for sequence in sequences:
        here = reference[start : start + len(sequence.mask)].numpy()
        parts.append(here[sequence.mask])
        start += len(sequence.mask)
    return dataclasses.replace(inputs, reference_logprobs=reference), parts


def holding(sequence, part):
    """Returns the sequence with log pi_ref of its masked-in tokens."""
    whole = np.full(len(sequence.mask), np.nan)
    whole[sequence.mask] = part
    return dataclasses.replace(sequence, reference=whole)


@pytest.mark.parametrize("denominator", ["old", "rollout"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "unbiased"])
def test_kl_in_the_loss_equals_the_formula(kind, name, denominator):
    config = OBJECTIVES[name].model_copy(update={"denominator": denominator})
    with_kl = config.model_copy(update={"kl": kl_of(kind, beta=0.3)})
    sequences = random_sequences(4, [3, 0, 5, 1])
    inputs, references = with_reference(sequences)
    sequences = [holding(sequence, part) for sequence, part in zip(sequences, references, strict=True)]
    outputs = policy_loss(inputs, with_kl, denominators(sequences))
    outputs.loss.backward()
    expected, gradient = reference(sequences, with_kl)
    assert expected != pytest.approx(reference(sequences, config)[0], abs=1e-3)
    assert outputs.loss.item() == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(inputs.logprobs.grad[inputs.loss_mask], gradient, atol=1e-7)
    assert (inputs.logprobs.grad[~inputs.loss_mask] == 0).all()


def test_only_k1_has_a_gradient_if_the_policy_equals_its_reference():
    """The mean of k1's gradient over samples of the policy is zero; the others have no gradient."""
    sequences = random_sequences(4, [3, 5])
    inputs, _ = with_reference(sequences)
    config = DAPO.model_copy(update={"aggregation": "token-mean"})
    for kind in ("k1", "k2", "k3", "unbiased"):
        gradients = []
        for kl in (NoKL(), kl_of(kind, beta=1.0)):
            leaf = inputs.logprobs.detach().clone().requires_grad_()
            here = dataclasses.replace(inputs, logprobs=leaf, reference_logprobs=leaf.detach())
            policy_loss(here, config.model_copy(update={"kl": kl}), denominators(sequences)).loss.backward()
            gradients.append(leaf.grad[inputs.loss_mask])
        expected = torch.full((8,), 1 / 8 if kind == "k1" else 0.0, dtype=torch.float64)
        torch.testing.assert_close(gradients[1] - gradients[0], expected, atol=1e-12, rtol=0)


def test_rejected_tokens_have_no_kl_but_dropped_tokens_have():
    sequences = random_sequences(4, [4, 4], mismatch=1.0)
    inputs, references = with_reference(sequences)
    kl = KL(kind="k3", beta=1.0)
    for kind, counts in (("mis", "kept"), ("icepop", "all")):
        config = DAPO.model_copy(
            update={"kl": kl, "correction": correction_of(kind, low=0.8, high=1.25), "clip": MinClip()}
        )
        whole = kept_denominators(sequences, config) if kind == "mis" else denominators(sequences)
        outputs = policy_loss(inputs, config, whole)
        without = policy_loss(inputs, config.model_copy(update={"kl": NoKL()}), whole)
        assert outputs.values.correction.masked is not None
        masked = outputs.values.correction.masked.numpy()
        assert 0 < masked.sum() < len(masked)
        q_over_p = np.exp(np.concatenate(references) - np.concatenate([s.logprobs[s.mask] for s in sequences]))
        terms = (q_over_p - 1 - np.log(q_over_p)) * (~masked if counts == "kept" else 1)
        assert outputs.loss.item() - without.loss.item() == pytest.approx(terms.sum() / whole.tokens)


def test_kl_requires_reference_log_probs():
    sequences = random_sequences(4, [3])
    config = DAPO.model_copy(update={"kl": KL(kind="k3", beta=1.0)})
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        policy_loss(pack(sequences), config, denominators(sequences))
