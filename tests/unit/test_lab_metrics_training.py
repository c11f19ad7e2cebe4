"""Metrics of an optimizer step: equal to NumPy formulas, and independent of how the batch is divided."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_centering import metrics as centering_metrics
from objective_papers import paper_loss
from objective_reference import (
    CORRECTIONS,
    FAMILY,
    GRPO,
    GSPO,
    OBJECTIVES,
    correction_factors,
    correction_of,
    denominators,
    kept_denominators,
    pack,
    packed_entropy,
    random_sequences,
    reference,
    split,
)

from megatron_rl.config.switches import MinClip
from megatron_rl.data.schedule import Denominators
from megatron_rl.lab.declared_updates import ENTROPY_BINS, LAG_BINS
from megatron_rl.lab.metrics import SFT, TRAINING, sft_metrics, training_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.policy_loss import policy_loss, sft_loss

ENTROPIES = {"low": (0, 0.1), "middle": (0.1, 1), "high": (1, math.inf)}
LAGS = {"0": (0, 1), "1": (1, 2), "2_3": (2, 4), "4_7": (4, 8), "8_up": (8, math.inf)}
TAILS = {"p1": 0.01, "p50": 0.5, "p99": 0.99}


def measure(micro_batches, config, whole, dtype=torch.float64):
    """Returns the accumulator of one rank over its micro-batches."""
    metrics = MetricAccumulator(TRAINING)
    for padding, sequences in enumerate(micro_batches):
        inputs = pack(sequences, dtype, padding)
        outputs = policy_loss(inputs, config, denominators(whole))
        training_metrics(metrics, inputs, outputs, packed_entropy(sequences, padding), lag_of(inputs.old_logprobs))
    return metrics


def lag_of(old_logprobs):
    """Returns made-up lags, the same for a token wherever it is packed."""
    return (old_logprobs * 1000).long().abs() % 12


def by_bin(name, values, bins, log_rho):
    rho = np.exp(log_rho)
    far = np.maximum(rho, 1 / rho)
    found = {}
    for bin_, (low, high) in bins.items():
        inside = (low <= values) & (values < high)
        found[f"mismatch/share/{name}_{bin_}"] = inside.mean()
        if inside.any():
            found |= {
                f"mismatch/abs_logprob_gap/{name}_{bin_}": np.abs(log_rho[inside]).mean(),
                f"mismatch/k1/{name}_{bin_}": -log_rho[inside].mean(),
                f"mismatch/k3/{name}_{bin_}": (rho - 1 - log_rho)[inside].mean(),
                **{f"mismatch/beyond_{tau}/{name}_{bin_}": (far > tau)[inside].mean() for tau in (2, 10)},
            }
    return found


def tail(name, values):
    return {
        f"{name}/mean": values.mean(),
        f"{name}/std": values.std(),
        f"{name}/min": values.min(),
        f"{name}/max": values.max(),
        **{f"{name}/{p}": np.quantile(values, q, method="inverted_cdf") for p, q in TAILS.items()},
    }


def weights(name, values):
    squares = (values**2).mean()
    return tail(name, values) | {f"{name}/chi2": squares - 1, f"{name}/ess": values.mean() ** 2 / squares}


def expected_metrics(sequences, config, loss):
    present = [sequence for sequence in sequences if sequence.mask.any()]
    new, old, mu, entropy = (
        [getattr(s, name)[s.mask] for s in present] for name in ("logprobs", "old", "rollout", "entropy")
    )
    base = old if config.denominator == "old" else mu
    advantage = np.array([sequence.advantage for sequence in present])
    token_advantage = np.concatenate([np.full(len(o), a) for o, a in zip(old, advantage, strict=True)])
    r = np.exp(np.concatenate(new) - np.concatenate(old))
    rho = np.exp(np.concatenate(old) - np.concatenate(mu))
    s = np.array([math.exp((n - b).mean()) for n, b in zip(new, base, strict=True)])
    judged = old if config.clip.kind == "mask" else base
    shift = [sequence.shift[sequence.mask] for sequence in present]
    floor = config.router_shift
    kept = [np.ones(len(each)) if floor is None else np.maximum(each, floor) for each in shift]
    clipped = np.concatenate(
        [CLIPPED[config.ratio](np.exp(n - b) * k) for n, b, k in zip(new, judged, kept, strict=True)]
    )
    low, high, dual = (getattr(config.clip, key, None) for key in ("low", "high", "dual"))
    if config.ratio == "geometric":
        assert low is not None
        assert high is not None
        low, high = 1 - math.exp(-low), math.exp(high) - 1
    below = clipped < (-math.inf if low is None else 1 - low)
    above = clipped > (math.inf if high is None else 1 + high)
    acts = {"low": token_advantage < 0, "high": token_advantage > 0}
    if config.clip.kind == "weight":
        acts = {side: np.ones_like(below) for side in acts}
    if config.clip.kind == "tapered":
        acts = {"low": token_advantage <= 0, "high": token_advantage <= 0}
    masks = {
        "clip/low/any": below,
        "clip/low/active": below & acts["low"],
        "clip/high/any": above,
        "clip/high/active": above & acts["high"],
    }
    if dual is not None:
        masks["clip/dual"] = (clipped > dual) & (token_advantage < 0)
    masks |= expected_correction(present, config)
    ends = np.cumsum([len(o) for o in old])
    expected = {
        "loss": loss,
        "tokens": len(r),
        "sequences": len(present),
        "kl/rollout_old/k1": -np.log(rho).mean(),
        "kl/rollout_old/k3": (rho - 1 - np.log(rho)).mean(),
        "kl/old_policy/k1": -np.log(r).mean(),
        "kl/old_policy/k3": (r - 1 - np.log(r)).mean(),
        **{f"rho/beyond_{tau}": (np.maximum(rho, 1 / rho) > tau).mean() for tau in (2, 10)},
        **by_bin("entropy", np.concatenate(entropy), ENTROPIES, np.log(rho)),
        **by_bin("lag", lag_of(torch.tensor(np.concatenate(old))).numpy(), LAGS, np.log(rho)),
        **tail("entropy", np.concatenate(entropy)),
        **tail("advantage", advantage),
        **weights("ratio", r),
        **weights("rho", rho),
        **weights("omega", r * rho),
        **weights("sequence_ratio", s),
        **tail("abs_log_sequence_ratio", np.abs(np.log(s))),
        **tail("abs_logprob_gap", np.abs(np.log(rho))),
        **tail("log_perplexity_gap", np.array([m.mean() - o.mean() for m, o in zip(mu, old, strict=True)])),
    }
    if floor is not None:
        gamma = np.concatenate(shift)
        expected |= {**tail("router_shift", gamma), "router_shift/floored": (gamma < floor).mean()}
    if config.centering is not None:
        kinds = [
            centering_metrics(s.top[s.mask], s.top_rollout[s.mask], new, mu, s.advantage, config)
            for s, new, mu in zip(present, new, mu, strict=True)
        ]
        for name in kinds[0]:
            expected |= tail(f"centering/{name}", np.concatenate([kind[name] for kind in kinds]))
    for name, mask in masks.items():
        expected[f"{name}/token"] = mask.mean()
        expected[f"{name}/sequence"] = np.mean([each.any() for each in np.split(mask, ends[:-1])])
    return expected


CLIPPED = {
    "token": lambda r: r,
    "geometric": lambda r: r,
    "sequence": lambda r: np.full(len(r), np.prod(r) ** (1 / len(r))),
    "sequence-token": lambda r: np.full(len(r), np.prod(r) ** (1 / len(r))),
    "sequence-product": lambda r: np.full(len(r), np.prod(r)),
}


def expected_correction(present, config):
    factors = np.concatenate([correction_factors(s, config, s.logprobs[s.mask]) for s in present])
    if config.correction.kind in ("mis", "icepop", "sequence-mask"):
        return {"correction/masked": np.isin(factors, np.array([None, 0.0]))}
    if config.correction.kind == "tis":
        free = config.model_copy(update={"correction": config.correction.model_copy(update={"high": math.inf})})
        uncut = np.concatenate([correction_factors(s, free, s.logprobs[s.mask]) for s in present])
        return {"correction/truncated": factors < uncut * (1 - 1e-12)}
    return {}


def assert_equal(report, expected, quantiles=0.0):
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        slack = quantiles if name.rsplit("/")[-1] in TAILS else 0.0
        assert report[name] == pytest.approx(value, rel=1e-6 + slack, abs=1e-7), name


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("denominator", ["old", "rollout"])
def test_every_metric_equals_its_formula(name, denominator):
    clip = OBJECTIVES[name].clip.model_copy(update={"dual": 1.1})
    config = OBJECTIVES[name].model_copy(update={"denominator": denominator, "clip": clip})
    sequences = random_sequences(8, [5, 0, 9, 1, 30, 3, 8, 2], drift=0.5, mismatch=1.5)
    expected = expected_metrics(sequences, config, reference(sequences, config)[0])
    assert 0 < expected["clip/high/active/token"] < expected["clip/high/any/token"]
    assert 0 < expected["clip/low/active/token"] < expected["clip/low/any/token"]
    assert expected["clip/dual/token"] > 0
    assert 0 < expected["rho/beyond_10"] < expected["rho/beyond_2"] < 1
    assert_equal(measure([sequences], config, sequences).finalize(), expected, quantiles=0.01)


@pytest.mark.parametrize("name", FAMILY)
def test_every_metric_of_a_preset_equals_its_formula(name):
    sequences = random_sequences(8, [5, 0, 9, 1, 30, 3, 8, 2], drift=0.5, mismatch=1.5)
    report = measure([sequences], FAMILY[name], sequences).finalize()
    here = [sequence.logprobs[sequence.mask] for sequence in sequences]
    loss = paper_loss(sequences, name, here, here)
    assert_equal(report, expected_metrics(sequences, FAMILY[name], loss), quantiles=0.01)


@pytest.mark.parametrize("denominator", ["old", "rollout"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_every_metric_of_a_correction_equals_its_formula(correction, denominator):
    config = GRPO.model_copy(update={"correction": correction, "denominator": denominator})
    sequences = random_sequences(8, [5, 0, 9, 1, 30, 3, 8, 2], drift=0.5, mismatch=1.5)
    metrics = MetricAccumulator(TRAINING)
    inputs = pack(sequences)
    outputs = policy_loss(inputs, config, kept_denominators(sequences, config))
    training_metrics(metrics, inputs, outputs, packed_entropy(sequences), lag_of(inputs.old_logprobs))
    report = metrics.finalize()
    assert_equal(report, expected_metrics(sequences, config, reference(sequences, config)[0]), quantiles=0.01)
    (fraction,) = [report[name] for name in report if name.startswith("correction/") and name.endswith("/token")]
    assert 0 < fraction < 1


def of_reference(sequences, **options):
    """Returns the report with mu as the reference policy, and the inputs."""
    inputs = pack(sequences)
    inputs = dataclasses.replace(inputs, reference_logprobs=inputs.rollout_logprobs)
    metrics = MetricAccumulator(TRAINING)
    outputs = policy_loss(inputs, GRPO, denominators(sequences))
    training_metrics(metrics, inputs, outputs, packed_entropy(sequences), lag_of(inputs.old_logprobs), **options)
    return metrics.finalize(), inputs


def test_kl_metrics_measure_policy_against_reference():
    report, inputs = of_reference(random_sequences(8, [5, 3]))
    log_ratio = (inputs.reference_logprobs - inputs.logprobs.detach())[inputs.loss_mask].numpy()
    assert report["kl/policy_reference/k1"] == pytest.approx(-log_ratio.mean())
    assert report["kl/policy_reference/k3"] == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).mean())


def test_no_mismatch_is_reported_if_mu_replaces_pi_old():
    report, _ = of_reference(random_sequences(8, [5, 3]), mismatch=False)
    assert not [
        name for name in report if name.startswith(("rho", "mismatch", "abs_logprob", "log_perplexity", "kl/rollout"))
    ]
    assert "omega/mean" in report


def test_a_mismatch_that_is_not_finite_stays_in_its_bin():
    sequences = random_sequences(8, [50, 30])
    inputs = pack(sequences)
    at = int(inputs.loss_mask.nonzero()[0])
    inputs.rollout_logprobs[at] = -1e4
    lags = torch.zeros(len(inputs.loss_mask), dtype=torch.int64)
    lags[at] = 1
    metrics = MetricAccumulator(TRAINING)
    training_metrics(
        metrics, inputs, policy_loss(inputs, GRPO, denominators(sequences)), packed_entropy(sequences), lags
    )
    report = metrics.finalize()
    assert report["mismatch/abs_logprob_gap/lag_1"] > 9e3
    assert not math.isfinite(report["mismatch/k3/lag_1"])
    assert math.isfinite(report["mismatch/k3/lag_0"])


@pytest.mark.parametrize("bins", [ENTROPY_BINS, LAG_BINS])
def test_bins_of_the_mismatch_follow_each_other(bins):
    lows, highs = zip(*bins.values(), strict=True)
    assert highs == (*lows[1:], math.inf)


def test_a_token_whose_entropy_is_not_a_number_is_in_no_bin():
    sequences = random_sequences(8, [50, 30])
    inputs, entropy = pack(sequences), packed_entropy(sequences)
    entropy[int(inputs.loss_mask.nonzero()[0])] = math.nan
    metrics = MetricAccumulator(TRAINING)
    training_metrics(metrics, inputs, policy_loss(inputs, GRPO, denominators(sequences)), entropy)
    report = metrics.finalize()
    shares = [report[f"mismatch/share/{name}"] for name in ENTROPY_BINS]
    assert sum(shares) == pytest.approx(1 - 1 / int(inputs.loss_mask.sum()))


def test_every_declared_metric_is_measured():
    clip = GRPO.clip.model_copy(update={"dual": 3.0})
    sequences = random_sequences(8, [50, 30])  # so many that no bin of the mismatch is empty
    report: dict[str, float] = {}
    for kind in ("tis", "icepop"):
        update = {"clip": clip, "correction": correction_of(kind, high=2.0), "router_shift": 0.9}
        report |= measure([sequences], GRPO.model_copy(update=update), sequences).finalize()
    report |= of_reference(sequences)[0]
    report |= measure([sequences], FAMILY["score_centering"], sequences).finalize()
    for name in TRAINING:
        assert name in report or f"{name}/mean" in report, name


def test_without_a_dual_clip_there_is_no_dual_fraction():
    sequences = random_sequences(8, [5, 3])
    assert not [name for name in measure([sequences], GRPO, sequences).finalize() if "dual" in name]


def test_kl_estimates_equal_the_specification():
    for p, q, k1, k3 in ((0.5, 0.4, 0.2231, 0.0231), (0.4, 0.5, -0.2231, 0.0269)):
        inputs = pack(random_sequences(0, [1]))
        mask = inputs.loss_mask
        with torch.no_grad():
            inputs.rollout_logprobs[mask] = math.log(p)
            inputs.old_logprobs[mask] = math.log(q)
            inputs.logprobs[mask] = math.log(p)
        metrics = MetricAccumulator(TRAINING)
        outputs = policy_loss(inputs, GRPO, Denominators(1, 1))
        training_metrics(metrics, inputs, outputs, torch.zeros(len(mask)))
        report = metrics.finalize()
        assert report["kl/rollout_old/k1"] == pytest.approx(k1, abs=5e-5)
        assert report["kl/rollout_old/k3"] == pytest.approx(k3, abs=5e-5)
        # The other pair has the opposite direction: from pi_old = q to pi_theta = p.
        assert report["kl/old_policy/k1"] == pytest.approx(-k1, abs=5e-5)


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 8), min_size=2, max_size=8).filter(any),
    st.sampled_from(list(OBJECTIVES)),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_metrics_do_not_depend_on_ranks_micro_batches_or_order(seed, lengths, name, ranks, micro_batches):
    config = OBJECTIVES[name]
    sequences = random_sequences(seed, lengths)
    whole = measure([sequences], config, sequences).finalize()
    merged = MetricAccumulator(TRAINING)  # starts as a rank without samples
    for share in split(sequences, ranks, seed):
        merged.merge(measure(split(share, micro_batches, seed + 1), config, sequences))
    report = merged.finalize()
    assert report.keys() == whole.keys()
    for metric, value in whole.items():
        assert report[metric] == pytest.approx(value, rel=1e-9, abs=1e-9), metric


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.sampled_from(list(OBJECTIVES)),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_metrics_of_the_first_mini_batch_are_exact(seed, lengths, name, dtype):
    config = OBJECTIVES[name].model_copy(update={"clip": MinClip(low=0.0, high=0.0)})
    sequences = random_sequences(seed, lengths, drift=0.0)
    report = measure([sequences], config, sequences, dtype).finalize()
    for statistic in ("mean", "min", "max", "p1", "p50", "p99", "ess"):
        assert report[f"ratio/{statistic}"] == report[f"sequence_ratio/{statistic}"] == 1.0
    for metric, value in report.items():
        if metric.startswith(("clip/", "kl/old_policy/")):
            assert value == 0.0, metric


def test_a_fully_masked_micro_batch_adds_nothing_to_metrics():
    sequences, nothing = random_sequences(1, [4, 2]), random_sequences(2, [0, 0])
    expected = measure([sequences], GSPO, sequences).finalize()
    assert measure([sequences, nothing], GSPO, sequences).finalize() == expected


def test_sft_metrics_by_hand():
    logprobs, mask = torch.tensor([math.nan, -1.0, -3.0]), torch.tensor([False, True, True])
    metrics = MetricAccumulator(SFT)
    loss = sft_loss(logprobs, mask, Denominators(2, 1)).loss
    sft_metrics(metrics, logprobs, mask, loss, entropy=torch.tensor([math.nan, 0.5, 1.0]))
    report = metrics.finalize()
    assert (report["loss"], report["tokens"], report["nll/max"], report["entropy/mean"]) == (
        2.0,
        2,
        3.0,
        0.75,
    )
