"""Group advantages: the specification's numbers, and properties of any group."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.config.switches import GroupAdvantage
from megatron_rl.objectives.advantages import all_equal, group_advantages

POPULATION = GroupAdvantage(std="population")
SAMPLE = GroupAdvantage(std="sample")
MEAN_ONLY = GroupAdvantage(std="none")
LEAVE_ONE_OUT = GroupAdvantage(baseline="leave-one-out", std="none")
REWARDS_ALONE = GroupAdvantage(baseline="none", std="none")


def test_rewards_that_differ_only_by_rounding_count_as_equal():
    for group in ([0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0], [-1e-10, -2e-10], [1e-200, 0.0], [0.1 + 0.2, 0.3]):
        for config in (POPULATION, SAMPLE, MEAN_ONLY, LEAVE_ONE_OUT):
            assert not group_advantages(group, config).any(), (group, config)
    assert group_advantages([1e-8, 0.0], POPULATION).tolist() == [1, -1]


rewards = st.lists(st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("config", "correct", "right", "wrong"),
    [
        (POPULATION, 1, 2.6458, -0.3780),
        (POPULATION, 4, 1.0, -1.0),
        (POPULATION, 7, 0.3780, -2.6458),
        (SAMPLE, 1, 2.4749, -0.3536),
        (SAMPLE, 4, 0.9354, -0.9354),
        (MEAN_ONLY, 2, 0.75, -0.25),
        (LEAVE_ONE_OUT, 2, 6 / 7, -2 / 7),
    ],
)
def test_advantages_of_a_group_of_eight_by_hand(config, correct, right, wrong):
    advantages = group_advantages([1.0] * correct + [0.0] * (8 - correct), config)
    assert advantages.dtype == np.float64
    np.testing.assert_allclose(advantages, [right] * correct + [wrong] * (8 - correct), atol=5e-5)


@pytest.mark.parametrize(
    "config", [POPULATION, SAMPLE, MEAN_ONLY, LEAVE_ONE_OUT, GroupAdvantage(baseline="none", std="sample")]
)
@pytest.mark.parametrize("group", [[1.0], [0.0], [0.1] * 3, [-1.0] * 8, [0.1 + 0.2, 0.3]])
def test_a_group_of_equal_rewards_has_zero_advantages(config, group):
    assert all_equal(np.array(group))
    assert (group_advantages(group, config) == 0).all()


def test_without_baseline_and_std_advantages_are_a_copy_of_the_rewards():
    group = np.array([1.0, 1.0])
    advantages = group_advantages(group, REWARDS_ALONE)
    advantages[0] = 5.0
    assert group.tolist() == [1.0, 1.0]


def test_a_small_but_real_difference_is_normalised_in_float64():
    advantages = group_advantages([1000.0, 1000.0 + 1e-4], POPULATION)
    np.testing.assert_allclose(advantages, [-1, 1], rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("config", [SAMPLE, LEAVE_ONE_OUT, REWARDS_ALONE])
def test_the_error_names_a_non_finite_reward(bad, config):
    with pytest.raises(ValueError, match=f"response 2 .* has reward {bad}"):
        group_advantages([0.0, 1.0, bad], config)


def test_an_empty_group_is_an_error():
    with pytest.raises(ValueError, match=r"found shape \(0,\)"):
        group_advantages([], SAMPLE)


@settings(deadline=None)
@given(rewards, st.sampled_from([POPULATION, SAMPLE]))
def test_normalised_advantages_have_mean_zero_and_unit_spread(group, config):
    advantages = group_advantages(group, config)
    assert abs(advantages.mean()) < 1e-6
    if not all_equal(np.array(group)):
        assert abs(advantages.std(ddof=0 if config.std == "population" else 1) - 1) < 1e-9


@settings(deadline=None)
@given(rewards)
def test_leave_one_out_subtracts_the_mean_of_the_other_rewards(group):
    if len(group) > 1 and not all_equal(np.array(group)):
        expected = [reward - np.mean(group[:i] + group[i + 1 :]) for i, reward in enumerate(group)]
        np.testing.assert_allclose(group_advantages(group, LEAVE_ONE_OUT), expected, atol=1e-9)


@settings(deadline=None)
@given(
    rewards,
    st.sampled_from(["mean", "leave-one-out", "none"]),
    st.sampled_from(["population", "sample", "none"]),
)
def test_advantages_are_finite_for_any_group(group, baseline, std):
    """No group gives NaN, including groups of a single response or of equal rewards."""
    advantages = group_advantages(group, GroupAdvantage(baseline=baseline, std=std))
    assert advantages.shape == (len(group),)
    assert np.isfinite(advantages).all()


@settings(deadline=None)
@given(rewards, st.sampled_from([POPULATION, SAMPLE, MEAN_ONLY, LEAVE_ONE_OUT]), st.randoms(use_true_random=False))
def test_advantages_do_not_depend_on_order_or_a_constant_shift(group, config, random):
    order = list(range(len(group)))
    random.shuffle(order)
    advantages = group_advantages(group, config)
    moved = group_advantages([group[i] + 7.0 for i in order], config)
    np.testing.assert_allclose(moved, advantages[order], atol=1e-6)
