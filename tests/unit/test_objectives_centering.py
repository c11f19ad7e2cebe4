"""Score centering: dense formulas over the whole vocabulary by autograd, numbers by hand, and heads at their limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from objective_inputs import gradient_of
from objective_reference import FAMILY, correction_of

from megatron_rl.config.switches import ObjectiveConfig, WeightClip
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives import centering as module
from megatron_rl.objectives.centering import LEAST_TAIL
from megatron_rl.objectives.inputs import LossInputs, PolicyLossOutputs
from megatron_rl.objectives.policy_loss import policy_loss

REINFORCE = FAMILY["score_centering"]
Weight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""f of the ratio r [T, V] and of the advantages [T, 1]."""


def bounded(**correction: Any) -> ObjectiveConfig:
    return REINFORCE.model_copy(update={"clip": WeightClip(), "correction": correction_of(**correction)})


def by_sign(r: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return r * torch.where(a < 0, (r >= 0.9) & (r <= 1.2), (r >= 0.5) & (r <= 3.0))


WEIGHTS: dict[str, tuple[ObjectiveConfig, Weight]] = {
    "one": (REINFORCE, lambda r, a: torch.ones_like(r)),
    "ratio": (REINFORCE.model_copy(update={"clip": WeightClip()}), lambda r, a: r),
    "capped": (bounded(kind="tis", high=1.3), lambda r, a: r.clamp(max=1.3)),
    "clipped": (REINFORCE.model_copy(update={"clip": WeightClip(low=0.4, high=0.5)}), lambda r, a: r.clamp(0.6, 1.5)),
    "band": (bounded(kind="icepop", low=0.5, high=2.0), lambda r, a: r * ((r >= 0.5) & (r <= 2.0))),
    "by sign": (bounded(kind="icepop", low=0.5, high=3.0, negative_low=0.9, negative_high=1.2), by_sign),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """One response of T tokens over a vocabulary of V; logits of pi_theta carry the gradient."""

    logits: torch.Tensor
    q: torch.Tensor
    sampled: torch.Tensor
    advantages: torch.Tensor

    @property
    def log_p(self) -> torch.Tensor:
        return self.logits.log_softmax(-1)


def drawn(seed: int, tokens: int = 6, size: int = 9, mismatch: float = 0.7) -> Batch:
    made = torch.Generator().manual_seed(seed)
    sampler = 2 * torch.randn(tokens, size, generator=made, dtype=torch.float64)
    logits = sampler + mismatch * torch.randn(tokens, size, generator=made, dtype=torch.float64)
    q = sampler.softmax(-1)
    sampled = torch.multinomial(q, 1, generator=made)[:, 0]
    return Batch(logits.requires_grad_(), q, sampled, torch.randn(tokens, generator=made, dtype=torch.float64))


def evaluate(batch: Batch, config: ObjectiveConfig, k: int, dtype: torch.dtype = torch.float64) -> PolicyLossOutputs:
    """Returns the objective's outputs with mu's k most likely tokens as its head."""
    log_q, ids = batch.q.log().topk(k)
    log_p = batch.log_p.to(dtype)
    n = len(batch.sampled)
    inputs = LossInputs(
        logprobs=log_p.gather(1, batch.sampled[:, None])[:, 0],
        old_logprobs=torch.full((n,), math.nan, dtype=dtype),
        rollout_logprobs=batch.q.log().gather(1, batch.sampled[:, None])[:, 0].to(dtype),
        advantages=batch.advantages.to(dtype),
        loss_mask=torch.ones(n, dtype=torch.bool),
        sequence_ids=torch.zeros(n, dtype=torch.int64),
        num_sequences=1,
        top_logprobs=log_p.gather(1, ids),
        top_rollout_logprobs=log_q.to(dtype),
    )
    return policy_loss(inputs, config, Denominators(n, 1))


def dense(batch: Batch, weight: Weight, q: torch.Tensor) -> torch.Tensor:
    """Returns the paper's loss, with the mean over a sampler q [T, V] of the whole vocabulary."""
    log_p, a = batch.log_p, batch.advantages
    sampled = batch.sampled[:, None]
    with torch.no_grad():
        own = weight((log_p - batch.q.log()).exp(), a[:, None]).gather(1, sampled)[:, 0]
        mass = q * weight(log_p.exp() / q, a[:, None])
    term = own * log_p.gather(1, sampled)[:, 0] - (mass * log_p).sum(-1)
    return -(a * term).mean()


def gradient(loss: torch.Tensor, batch: Batch) -> np.ndarray:
    (found,) = torch.autograd.grad(loss, batch.logits)
    return found.numpy()


def in_head(batch: Batch, k: int) -> torch.Tensor:
    return torch.zeros_like(batch.q, dtype=torch.bool).scatter(1, batch.q.topk(k).indices, True)


def tails(batch: Batch, k: int) -> list[float]:
    """Returns each token's probability outside the head: under q, then under pi_theta."""
    outside = ~in_head(batch, k)
    return [float(mass) for p in (batch.q, batch.log_p.detach().exp()) for mass in (p * outside).sum(-1)]


def with_modelled_tail(batch: Batch, k: int) -> torch.Tensor:
    """Returns q with the tail's mass in proportion to pi_theta."""
    head, p = in_head(batch, k), batch.log_p.detach().exp()
    alpha = (batch.q * ~head).sum(-1, keepdim=True) / (p * ~head).sum(-1, keepdim=True)
    return torch.where(head, batch.q, alpha * p)


# The dense formula


@pytest.mark.parametrize("name", WEIGHTS)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.5]))
def test_the_whole_vocabulary_equals_the_dense_formula(name, seed, mismatch):
    config, weight = WEIGHTS[name]
    batch = drawn(seed, mismatch=mismatch)
    loss, expected = evaluate(batch, config, k=9).loss, dense(batch, weight, batch.q)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    np.testing.assert_allclose(gradient(loss, batch), gradient(expected, batch), atol=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
@given(st.integers(0, 10**6), st.integers(1, 8), st.sampled_from([0.0, 0.3, 1.5]))
def test_a_head_equals_the_dense_formula_with_a_tail_in_proportion(name, seed, k, mismatch):
    config, weight = WEIGHTS[name]
    batch = drawn(seed, mismatch=mismatch)
    assume(min(tails(batch, k)) > LEAST_TAIL)  # a smaller one counts as rounding: tested below
    loss, expected = evaluate(batch, config, k).loss, dense(batch, weight, with_modelled_tail(batch, k))
    np.testing.assert_allclose(gradient(loss, batch), gradient(expected, batch), atol=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_single_precision_is_near_the_dense_formula(name):
    config, weight = WEIGHTS[name]
    for seed in range(5):
        batch = drawn(seed)
        for k in (3, 9):
            found = gradient(evaluate(batch, config, k, torch.float32).loss, batch)
            expected = gradient(dense(batch, weight, with_modelled_tail(batch, k) if k < 9 else batch.q), batch)
            np.testing.assert_allclose(found, expected, atol=2e-5)


# Properties


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("k", [3, 9])
def test_a_constant_advantage_gives_no_gradient_on_average(name, k):
    """The mean over mu's tokens of the gradient is 0: no drift. Without centering it is not."""
    config, _ = WEIGHTS[name]
    batch = drawn(2, tokens=1, mismatch=1.5)
    q = with_modelled_tail(batch, k) if k < 9 else batch.q
    batch = dataclasses.replace(batch, q=q, advantages=torch.ones(1, dtype=torch.float64))

    def mean(config: ObjectiveConfig) -> np.ndarray:
        each = [dataclasses.replace(batch, sampled=torch.tensor([token])) for token in range(9)]
        gradients = [gradient(evaluate(one, config, k).loss, one)[0] for one in each]
        return np.einsum("v,vw->w", q[0].numpy(), np.array(gradients))

    np.testing.assert_allclose(mean(config), 0, atol=1e-9)
    drift = np.abs(mean(config.model_copy(update={"centering": None}))).max()
    assert (drift > 1e-2) == (name != "ratio"), "the mean of pi_theta/mu times the score is 0 anyway"


@pytest.mark.parametrize("k", [1, 4, 9])
def test_without_mismatch_centering_changes_no_gradient(k):
    batch = drawn(3, mismatch=0.0)
    plain = REINFORCE.model_copy(update={"centering": None})
    found, expected = (gradient(evaluate(batch, config, k).loss, batch) for config in (REINFORCE, plain))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.abs(expected).max() > 1e-3


# Numbers by hand: a vocabulary of four


def by_hand(q: list[float], p: list[float], config: ObjectiveConfig, k: int, sampled: int = 0, a: float = 1.0):
    """Returns the outputs, and the gradient of J in the head's log-probs."""
    leaf = torch.tensor(p[:k], dtype=torch.float64).log().requires_grad_()
    own = torch.tensor([math.log(p[sampled])], dtype=torch.float64)
    inputs = LossInputs(
        logprobs=own.clone().requires_grad_(),
        old_logprobs=own,
        rollout_logprobs=torch.tensor([math.log(q[sampled])], dtype=torch.float64),
        advantages=torch.tensor([a], dtype=torch.float64),
        loss_mask=torch.ones(1, dtype=torch.bool),
        sequence_ids=torch.zeros(1, dtype=torch.int64),
        num_sequences=1,
        top_logprobs=leaf[None],
        top_rollout_logprobs=torch.tensor([q[:k]], dtype=torch.float64).log(),
    )
    outputs = policy_loss(inputs, config, Denominators(1, 1))
    outputs.loss.backward()
    return outputs, (-gradient_of(leaf)).tolist(), -gradient_of(inputs.logprobs).item()


Q, P = [0.5, 0.3, 0.15, 0.05], [0.4, 0.2, 0.3, 0.1]


@pytest.mark.parametrize(
    ("name", "k", "a", "head", "sampled"),
    [
        # f = 1: q_v - alpha p_v with alpha = 0.2 / 0.4; less it, so with the sign turned.
        ("one", 2, 1.0, [-(0.5 - 0.2), -(0.3 - 0.1)], 1.0),
        ("one", 2, -2.0, [2 * 0.3, 2 * 0.2], -2.0),
        ("one", 4, 1.0, [-0.5, -0.3, -0.15, -0.05], 1.0),
        # f = r: p_v - p_v.
        ("ratio", 2, 1.0, [0.0, 0.0], 0.8),
        # f = min(r, 1.3): r = .8, .67; on the tail 1/alpha = 2, so alpha min(2, 1.3) = .65.
        ("capped", 2, 1.0, [-(0.4 - 0.65 * 0.4), -(0.2 - 0.65 * 0.2)], 0.8),
        ("capped", 4, 1.0, [-0.4, -0.2, -0.15 * 1.3, -0.05 * 1.3], 0.8),
        # f = r within .5 to 2: all are within.
        ("band", 2, 1.0, [0.0, 0.0], 0.8),
        # .5 to 3 if A is positive; .9 to 1.2 if negative: neither the head's .8 and .67 nor the tail's 2.
        ("by sign", 2, 1.0, [0.0, 0.0], 0.8),
        ("by sign", 2, -1.0, [0.0, 0.0], 0.0),
        ("by sign", 4, 1.0, [-0.4, -0.2, -0.3, -0.1], 0.8),
    ],
)
def test_gradients_by_hand(name, k, a, head, sampled):
    outputs, found, own = by_hand(Q, P, WEIGHTS[name][0], k, a=a)
    np.testing.assert_allclose(found, head, atol=1e-12)
    assert own == pytest.approx(sampled)
    values = outputs.values.centering
    assert values.rollout_mass.item() == pytest.approx(sum(Q[:k]))
    assert values.policy_mass.item() == pytest.approx(sum(P[:k]))


def test_values_for_metrics_by_hand():
    """f = 1, head of two: m = (.5, .3 | .15, .05), its tail (.15, .05) because alpha p = .5 (.3, .1)."""
    values = by_hand(Q, P, REINFORCE, 2)[0].values.centering
    assert values.alpha.item() == pytest.approx(0.5)
    assert values.drift.item() == pytest.approx((0.1 + 0.1 + 0.15 + 0.05) / 2)
    assert values.score.item() == pytest.approx(0.6)
    assert by_hand(Q, P, WEIGHTS["capped"][0], 2)[0].values.centering.score.item() == pytest.approx(0.8 * 0.6)
    assert not any(getattr(values, field.name).requires_grad for field in dataclasses.fields(values))


# Heads at their limits


def test_a_head_of_mu_without_a_tail_of_its_own():
    """Q_H = 1, P_H < 1: mu never leaves the head, and alpha is 0 but for rounding."""
    _, head, _ = by_hand([0.7, 0.3, 0.0, 0.0], [0.4, 0.2, 0.3, 0.1], REINFORCE, 2)
    np.testing.assert_allclose(head, [-0.7, -0.3], atol=2 * LEAST_TAIL)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_head_that_pi_theta_never_leaves_has_a_bounded_alpha(name):
    """P_H = 1, Q_H < 1: alpha would be infinite."""
    outputs, head, _ = by_hand([0.4, 0.2, 0.4, 0.0], [0.7, 0.3, 0.0, 0.0], WEIGHTS[name][0], 2)
    assert np.isfinite(head).all()
    assert outputs.values.centering.alpha.item() == pytest.approx(0.4 / LEAST_TAIL)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tail_of_rounding_alone_is_no_tail(name, dtype):
    """Neither policy leaves a head of nearly all: the result is that of the exact sum, not of 0/0."""
    batch = drawn(2)
    moved = torch.cat([batch.logits.detach(), torch.full((6, 3), -60.0, dtype=torch.float64)], dim=1)
    wide = dataclasses.replace(
        batch, logits=moved.requires_grad_(), q=torch.cat([batch.q, torch.full((6, 3), 1e-26, dtype=torch.float64)], 1)
    )
    found = gradient(evaluate(wide, WEIGHTS[name][0], 9, dtype).loss, wide)[:, :9]
    expected = gradient(evaluate(batch, WEIGHTS[name][0], 9).loss, batch)
    np.testing.assert_allclose(found, expected, atol=1e-9 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("missing", [-math.inf, -1e30, -3.4028235e38, -61.0])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_missing_or_hopeless_token_counts_with_the_tail(name, missing):
    config, _ = WEIGHTS[name]
    batch = drawn(4)

    def head(k: int, missing: int) -> np.ndarray:
        log_q, ids = batch.q.log().topk(k)
        log_q = torch.cat([log_q, torch.full((6, missing), fill, dtype=torch.float64)], dim=1)
        ids = torch.cat([ids, torch.zeros(6, missing, dtype=torch.int64)], dim=1)
        n, own = 6, batch.sampled[:, None]
        inputs = LossInputs(
            logprobs=batch.log_p.gather(1, own)[:, 0],
            old_logprobs=torch.zeros(n, dtype=torch.float64),
            rollout_logprobs=batch.q.log().gather(1, own)[:, 0],
            advantages=batch.advantages,
            loss_mask=torch.ones(n, dtype=torch.bool),
            sequence_ids=torch.zeros(n, dtype=torch.int64),
            num_sequences=1,
            top_logprobs=batch.log_p.gather(1, ids),
            top_rollout_logprobs=log_q,
        )
        return gradient(policy_loss(inputs, config, Denominators(n, 1)).loss, batch)

    fill = missing
    np.testing.assert_allclose(head(3, 2), head(3, 0), atol=1e-12)


def test_the_head_must_be_there_and_fit():
    batch = drawn(1)
    inputs = LossInputs(
        logprobs=batch.log_p[:, 0],
        old_logprobs=torch.zeros(6),
        rollout_logprobs=torch.zeros(6),
        advantages=batch.advantages,
        loss_mask=torch.ones(6, dtype=torch.bool),
        sequence_ids=torch.zeros(6, dtype=torch.int64),
        num_sequences=1,
    )
    with pytest.raises(ValueError, match=r"objective\.centering: needs mu's most likely tokens"):
        policy_loss(inputs, REINFORCE, Denominators(6, 1))
    with pytest.raises(ValueError, match=r"top_logprobs: shape \(5, 3\), expected \(6, 'k'\)"):
        dataclasses.replace(inputs, top_logprobs=torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"top_rollout_logprobs: shape \(6,\), expected \(6, 'k'\)"):
        dataclasses.replace(inputs, top_rollout_logprobs=torch.zeros(6))


# Mistakes, each put into the package on purpose


def tails_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "LEAST_TAIL", 2.0)


def likely_tokens_left_to_the_tail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "LEAST_LOGPROB", -1.5)


def weights_of_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "weights", lambda log_ratio, advantages, config: torch.ones_like(log_ratio))


def weights_upside_down(patch: pytest.MonkeyPatch) -> None:
    real = module.weights
    patch.setattr(module, "weights", lambda log_ratio, *given: real(-log_ratio, *given))


def weights_whatever_the_sign(patch: pytest.MonkeyPatch) -> None:
    real = module.weights
    patch.setattr(module, "weights", lambda log_ratio, a, config: real(log_ratio, a.abs(), config))


def mean_added(patch: pytest.MonkeyPatch) -> None:
    real = module.centering

    def negative(*given: Any) -> Any:
        term, values = real(*given)
        return -term, values

    patch.setattr("megatron_rl.objectives.policy_loss.centering", negative)


def mean_without_a_gradient(patch: pytest.MonkeyPatch) -> None:
    real = module.centering

    def detached(*given: Any) -> Any:
        term, values = real(*given)
        return term.detach(), values

    patch.setattr("megatron_rl.objectives.policy_loss.centering", detached)


@pytest.mark.parametrize(
    ("mistake", "name"),
    [
        (tails_left_out, "one"),
        (likely_tokens_left_to_the_tail, "one"),
        (weights_of_one, "band"),
        (weights_upside_down, "capped"),
        (weights_whatever_the_sign, "by sign"),
        (mean_added, "one"),
        (mean_without_a_gradient, "one"),
    ],
)
def test_a_mistake_differs_from_the_dense_formula(monkeypatch, mistake, name):
    def differs() -> bool:
        config, weight = WEIGHTS[name]
        batch = drawn(8, tokens=12)
        expected = gradient(dense(batch, weight, with_modelled_tail(batch, 4)), batch)
        return bool(np.abs(gradient(evaluate(batch, config, 4).loss, batch) - expected).max() > 1e-3)

    assert not differs()
    mistake(monkeypatch)
    assert differs()
