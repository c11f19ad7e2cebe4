"""Generalised advantages: the specification's numbers, the paper's double sum, and normalisation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from objective_inputs import by_the_paper

from megatron_rl.config.switches import Gae
from megatron_rl.objectives.advantages import Moments, gae, token_rewards

floats = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
pairs = st.lists(st.tuples(floats, floats), max_size=12)
fractions = st.floats(0, 1).map(lambda x: round(x, 3))


def test_gae_equals_the_numbers_of_the_specification():
    advantages, returns = gae(np.array([0.0, 0.0, 1.0]), np.array([0.2, 0.5, 0.7]), 1.0, 0.95)
    np.testing.assert_allclose(advantages, [0.76075, 0.485, 0.3], rtol=1e-12)
    np.testing.assert_allclose(returns, [0.96075, 0.985, 1.0], rtol=1e-12)
    deltas, _ = gae(np.array([0.0, 0.0, 1.0]), np.array([0.2, 0.5, 0.7]), 1.0, 0.0)
    np.testing.assert_allclose(deltas, [0.3, 0.2, 0.3], rtol=1e-12)


@given(pairs, fractions, fractions)
def test_gae_equals_the_papers_double_sum_for_any_response(pairs, gamma, gae_lambda):
    rewards, values = [r for r, _ in pairs], [v for _, v in pairs]
    advantages, returns = gae(np.array(rewards), np.array(values), gamma, gae_lambda)
    assert advantages.dtype == returns.dtype == np.float64
    np.testing.assert_allclose(advantages, by_the_paper(rewards, values, gamma, gae_lambda), atol=1e-9)
    np.testing.assert_allclose(returns, advantages + values, atol=1e-12)


@given(st.lists(floats, min_size=1, max_size=12), floats)
def test_undiscounted_advantages_are_the_reward_minus_the_value(values, reward):
    advantages, returns = gae(token_rewards(reward, np.zeros(len(values))), np.array(values), 1.0, 1.0)
    np.testing.assert_allclose(advantages, reward - np.array(values), atol=1e-9)
    np.testing.assert_allclose(returns, reward, atol=1e-9)


def test_the_last_token_gets_the_reward_and_each_token_its_penalty():
    assert token_rewards(1.0, np.array([0.1, 0.2, 0.3])).tolist() == [-0.1, -0.2, 0.7]
    assert token_rewards(1.0, np.array([])).tolist() == []
    assert gae(np.array([]), np.array([]), 1.0, 0.95)[0].tolist() == []


@pytest.mark.parametrize(("std", "freedom"), [("population", 0), ("sample", 1)])
def test_advantages_are_normalised_over_all_parts_together(std, freedom):
    rng = np.random.default_rng(0)
    parts = [rng.normal(3, 2, n) for n in (5, 0, 40, 1)]
    moments = sum((Moments.of(part) for part in parts), Moments())
    everything = np.concatenate(parts)
    expected = (everything - everything.mean()) / everything.std(ddof=freedom)
    config = Gae(std=std, gamma=1.0, gae_lambda=1.0)
    found = np.concatenate([moments.normalise(part, config) for part in parts])
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    for update, wanted in (
        ({"baseline": "none"}, everything / everything.std(ddof=freedom)),
        ({"std": "none"}, everything - everything.mean()),
        ({"std": "none", "baseline": "none"}, everything),
    ):
        np.testing.assert_allclose(moments.normalise(everything, config.model_copy(update=update)), wanted, rtol=1e-10)


@pytest.mark.parametrize("values", [[], [2.0], [0.1, 0.1, 0.1], [0.0, 0.0]])
def test_equal_advantages_are_normalised_to_zero(values):
    values = np.array(values)
    found = Moments.of(values).normalise(values, Gae(gamma=1.0, gae_lambda=1.0))
    assert found.tolist() == [0.0] * len(values)


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, -0.3])
@pytest.mark.parametrize("tokens", [3, 7, 10, 31, 100])
def test_equal_advantages_are_zero_for_any_distribution_over_ranks(value, tokens):
    """With sums of squares, a rounding error would remain here and be used as the divisor."""
    parts = [np.full(n, value) for n in (tokens, 0, 2 * tokens, 5)]
    moments = sum((Moments.of(part) for part in parts), Moments())
    assert not moments.normalise(parts[0], Gae(gamma=1.0, gae_lambda=1.0)).any()


@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_a_small_spread_on_a_large_mean_does_not_depend_on_ranks(spread):
    everything = 100 + spread * np.random.default_rng(1).normal(size=60)
    expected = (everything - everything.mean()) / everything.std(ddof=1)
    for cuts in ([], [20, 40], [1, 2, 59]):
        moments = sum((Moments.of(part) for part in np.split(everything, cuts)), Moments())
        found = moments.normalise(everything, Gae(gamma=1.0, gae_lambda=1.0))
        np.testing.assert_allclose(found, expected, atol=1e-13 * 100 / spread)
