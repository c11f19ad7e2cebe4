"""Metrics of a rollout, compared with values counted by hand."""

import dataclasses

import pytest

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.lab.metrics import ROLLOUT, overlong_metrics, rollout_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.rewards.shaping import filter_overlong, shape_rewards


def sample(prompt, index, length, reward, correct, finish="stop", version=3):
    grown = Sample.start(prompt, index).extend([7] * length, [-0.5] * length, version)
    return dataclasses.replace(grown, finish_reason=finish, verdict=Verdict(reward, correct))


def group(index, *answers):
    """Makes a group; each answer is (length, reward, correct, finish reason)."""
    prompt = Prompt(f"p{index}", "2+2=", (1, 2, 3), "4", "math")
    return Group(index, prompt, tuple(sample(prompt, i, *answer) for i, answer in enumerate(answers)))


MIXED = group(0, (4, 1.0, True, "stop"), (10, -0.5, False, "length"), (2, 0.0, False, "stop"))
SOLVED = group(1, (3, 1.0, True, "stop"), (5, 1.0, True, "stop"))
HOPELESS = group(2, (10, 0.0, False, "length"), (1, 0.0, False, "stop"))
SHAPED = group(3, (6, 1.0, True, "stop"), (7, 0.7, True, "stop"))  # all correct, but the rewards differ


def measure(*groups, weight_version=3):
    metrics = MetricAccumulator(ROLLOUT)
    rollout_metrics(metrics, groups, weight_version)
    return metrics


def test_rollout_metrics_by_hand():
    report = measure(MIXED, SOLVED, HOPELESS, SHAPED).finalize()
    assert (report["prompts"], report["samples"], report["tokens"]) == (4, 9, 48)
    assert report["accuracy"] == pytest.approx(5 / 9)
    assert report["truncated"] == pytest.approx(2 / 9)
    assert (report["group/dead"], report["group/dead/all_correct"], report["group/dead/all_wrong"]) == (
        0.5,
        0.25,
        0.25,
    )
    assert report["reward/mean"] == pytest.approx(4.2 / 9)
    assert (report["reward/min"], report["reward/max"]) == (-0.5, 1.0)
    assert report["response_length/mean"] == pytest.approx(48 / 9)
    assert (report["response_length/p50"], report["response_length/max"]) == (5, 10)
    assert report["response_length/correct/mean"] == pytest.approx(25 / 5)
    assert report["response_length/wrong/mean"] == pytest.approx(23 / 4)


def test_a_group_of_one_sample_counts_as_dead():
    report = measure(group(0, (4, 1.0, True, "stop"))).finalize()
    assert report["group/dead/all_correct"] == 1
    assert "response_length/wrong/mean" not in report


def test_staleness_counts_generated_tokens_by_their_own_version():
    prompt = Prompt("p", "2+2=", (1, 2, 3), "4", "math")
    grown = (
        Sample.start(prompt, 0)
        .extend([7] * 3, [-0.5] * 3, weight_version=2)
        .extend([8] * 5, None, weight_version=2)  # tool output, which no version generated
        .extend([7] * 1, [-0.5], weight_version=5)
    )
    grown = dataclasses.replace(grown, finish_reason="stop", verdict=Verdict(1.0, True))
    report = measure(Group(0, prompt, (grown,)), weight_version=6).finalize()
    assert report["staleness/mean"] == (4 * 3 + 1 * 1) / 4
    assert (report["staleness/min"], report["staleness/max"]) == (1, 4)
    assert report["tokens"] == report["response_length/max"] == 4


def test_a_response_is_of_several_versions_only_if_these_generated_tokens():
    prompt = Prompt("p", "2+2=", (1, 2, 3), "4", "math")
    begun = Sample.start(prompt, 0).extend([7], [-0.5], weight_version=2)
    made = (
        begun.extend([7], [-0.5], weight_version=2),
        begun.extend([8], None, weight_version=3),  # tool output
        begun.extend([8], None, weight_version=3).extend([7], [-0.5], weight_version=4),
        begun.extend([7], [-0.5], weight_version=3),
    )
    judged = tuple(dataclasses.replace(each, finish_reason="stop", verdict=Verdict(1.0, True)) for each in made)
    assert measure(Group(0, prompt, judged)).finalize()["several_versions"] == 2 / 4


def test_metrics_do_not_depend_on_ranks_or_order():
    whole = measure(MIXED, SOLVED, HOPELESS, SHAPED).finalize()
    merged = MetricAccumulator(ROLLOUT)
    for share in ([SHAPED], [], [HOPELESS, MIXED], [SOLVED]):
        merged.merge(measure(*share))
    assert merged.finalize() == pytest.approx(whole, rel=1e-12)


def test_an_empty_response_is_counted():
    prompt = Prompt("p", "2+2=", (1, 2, 3), "4", "math")
    empty = dataclasses.replace(Sample.start(prompt, 0), finish_reason="stop", verdict=Verdict(0.0, False))
    report = measure(Group(0, prompt, (empty,))).finalize()
    assert (report["samples"], report["tokens"], report["response_length/max"]) == (1, 0, 0)


def test_the_error_names_a_sample_without_a_verdict():
    unjudged = dataclasses.replace(MIXED.samples[1], verdict=None)
    with pytest.raises(ValueError, match="prompt 'p0' sample 1: no verdict"):
        measure(dataclasses.replace(MIXED, samples=(unjudged,)))


def overlong(reward, sampled, kept):
    metrics = MetricAccumulator(ROLLOUT)
    overlong_metrics(metrics, sampled, kept, reward, longest=10)
    report = metrics.finalize()
    return {name: value for name, value in report.items() if name.startswith("overlong")}


def test_punishments_cover_all_samples_and_filtering_only_trained_ones():
    sampled = [MIXED, SOLVED, HOPELESS]
    found = overlong(RewardConfig(overlong_cache=8, overlong_filter=True), sampled, [MIXED])
    # Lengths 4, 10, 2; 3, 5; 10, 1; the first 2 tokens are not punished.
    assert found["overlong_punishment/mean"] == pytest.approx(-(2 + 8 + 0 + 1 + 3 + 8 + 0) / 8 / 7)
    assert (found["overlong_punishment/min"], found["overlong_punishment/max"]) == (-1, 0)
    assert found["overlong_filtered"] == pytest.approx(1 / 3)


def test_metrics_of_disabled_features_are_absent():
    assert overlong(RewardConfig(), [MIXED], [MIXED]) == {}
    assert "overlong_filtered" not in overlong(RewardConfig(overlong_cache=8), [MIXED], [MIXED])
    assert overlong(RewardConfig(overlong_cache=8, overlong_filter=True), [], []) == {}


def test_masked_out_and_empty_responses_are_shaped_filtered_and_measured():
    """One group has one empty response; all responses of the other are filtered."""
    prompt = Prompt("p", "2+2=", (1, 2, 3), "4", "math")
    empty = dataclasses.replace(Sample.start(prompt, 0), finish_reason="length", verdict=Verdict(0.0, False))
    reward = RewardConfig(correct=1.0, wrong=-1.0, overlong_cache=4, overlong_filter=True)
    cut = group(1, (10, 0.0, False, "length"), (10, 1.0, True, "length"))
    shaped = shape_rewards([Group(0, prompt, (empty,)), cut], reward, longest=10)
    gone = filter_overlong(shaped, reward)
    assert [s.response_tokens for g in gone for s in g.samples] == [0, 0, 0]
    report = measure(*gone).finalize()
    assert (report["samples"], report["tokens"], report["truncated"]) == (3, 0, 1)
    assert (report["reward/min"], report["reward/max"]) == (-2, 0)
    assert report["group/dead"] == 0.5
    assert overlong(reward, gone, gone)["overlong_filtered"] == 1
