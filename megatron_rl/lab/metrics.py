"""Adds values to the metrics of optimizer steps and of rollouts, which lab/declared_updates.py and
lab/declared_rollouts.py declare.

All metrics are sums over tokens, sequences, samples or groups, so they do not depend on how these are divided into
micro-batches and ranks. Use one accumulator per optimizer step; the caller tags its report with the mini-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.sample import Group, Sample, Verdict
from megatron_rl.lab.declared_rollouts import ROLLOUTS
from megatron_rl.lab.declared_updates import BEYOND, CRITIC, ENTROPY_BINS, FINE_TUNING, LAG_BINS, POLICY, Bins
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.advantages import all_equal
from megatron_rl.objectives.inputs import LossInputs, LossValues, PolicyLossOutputs
from megatron_rl.objectives.kl import k1, k3
from megatron_rl.objectives.ratios import Tokens
from megatron_rl.objectives.value import ValueLossOutputs
from megatron_rl.rewards.shaping import is_truncated, overlong_punishment

TRAINING = POLICY.kinds()
VALUE = CRITIC.kinds()
SFT = POLICY.kinds(only=("loss", "tokens")) | FINE_TUNING.kinds() | POLICY.kinds(only=("entropy",))
ROLLOUT = ROLLOUTS.kinds()


def training_metrics(
    metrics: MetricAccumulator,
    inputs: LossInputs,
    outputs: PolicyLossOutputs,
    entropy: Tensor,
    lags: Tensor | None = None,
    *,
    mismatch: bool = True,
) -> None:
    """Adds one micro-batch to an accumulator of TRAINING.

    entropy [T] is over the full vocabulary. lags [T] int64: weight version of pi_old minus that of each token. Pass
    `mismatch` False if mu stands for pi_old; then the two are not compared.
    """
    tokens = Tokens.of(inputs)
    # A GPU waits for the number of what is selected: here, and not wherever a mask selects.
    kept, present = (mask.nonzero().squeeze(1) for mask in (inputs.loss_mask, tokens.lengths > 0))
    logprobs, old, rollout = (
        each.detach().double() for each in (tokens.logprobs, tokens.old_logprobs, tokens.rollout_logprobs)
    )
    log_rho = old - rollout
    log_s = outputs.values.log_sequence_ratio[present]
    values: dict[str, Tensor] = {
        "loss": outputs.loss,
        "tokens": tokens.lengths,
        "sequences": torch.ones_like(present),
        "entropy": entropy[kept],
        "advantage": tokens.sequence_mean(tokens.advantages.double())[present],
        "ratio": logprobs - old,
        "omega": logprobs - rollout,
        "sequence_ratio": log_s,
        "abs_log_sequence_ratio": log_s.abs(),
        **_kl("kl/old_policy", logprobs - old),
        **_fractions(outputs.values, tokens, present),
    }
    if mismatch:
        gap = _gap(log_rho)
        values |= {
            "rho": log_rho,
            **{f"rho/beyond_{tau}": gap[f"beyond_{tau}"] for tau in BEYOND},
            "abs_logprob_gap": gap["abs_logprob_gap"],
            "log_perplexity_gap": -tokens.sequence_mean(log_rho)[present],
            **{f"kl/rollout_old/{estimate}": gap[estimate] for estimate in ("k1", "k3")},
        }
        _add_gap_by_bin(metrics, gap, entropy[kept], ENTROPY_BINS)
        if lags is not None:
            _add_gap_by_bin(metrics, gap, lags[kept], LAG_BINS)
    if tokens.reference_logprobs is not None:
        values |= _kl("kl/policy_reference", tokens.reference_logprobs.double() - logprobs)
    if (centring := outputs.values.centering) is not None:
        values |= {f"centering/{field.name}": getattr(centring, field.name) for field in dataclasses.fields(centring)}
    if tokens.router_shift is not None and outputs.values.floored is not None:
        values |= {"router_shift": tokens.router_shift, "router_shift/floored": outputs.values.floored}
    metrics.add_all(values)


def _kl(name: str, log_ratio: Tensor) -> dict[str, Tensor]:
    """Returns estimates of KL(p, q) from samples of p, with log_ratio = log q - log p."""
    return {f"{name}/k1": k1(log_ratio), f"{name}/k3": k3(log_ratio)}


def _gap(log_rho: Tensor) -> dict[str, Tensor]:
    """Measures of the mismatch of mu and pi_old, [M] each."""
    size = log_rho.abs()
    beyond = {f"beyond_{tau}": size > math.log(tau) for tau in BEYOND}
    return {"abs_logprob_gap": size, "k1": k1(log_rho), "k3": k3(log_rho), **beyond}


def _add_gap_by_bin(metrics: MetricAccumulator, gap: Mapping[str, Tensor], values: Tensor, bins: Bins) -> None:
    """Adds the mismatch of the tokens whose value is in each bin, and each bin's share of the tokens; [M] each.

    Bins follow each other, from the lowest.
    """
    places = torch.stack([values >= low for low, _ in bins.values()]).sum(0)  # 0: below all bins, or not a number
    of_tokens = torch.stack([torch.ones_like(values, dtype=torch.float64), *(each.double() for each in gap.values())])
    # Not a matrix product: a number that is not finite stays in its own bin.
    rows = torch.arange(len(of_tokens), device=places.device)[:, None] * (len(bins) + 1)
    sums = of_tokens.new_zeros(len(of_tokens) * (len(bins) + 1))
    sums.index_add_(0, (rows + places).flatten(), of_tokens.flatten())
    counts, *measures = sums.view(len(of_tokens), -1)[:, 1:]
    names = [f"mismatch/{measure}/{name}" for measure in ("share", *gap) for name in bins]
    everyone = torch.full_like(counts, len(values))
    metrics.add_sums(names, torch.cat([counts, *measures]), torch.cat([everyone, counts.repeat(len(gap))]))


def _fractions(values: LossValues, tokens: Tokens, present: Tensor) -> dict[str, Tensor]:
    """Marks tokens that a clip or correction acts on, and sequences with such tokens, by metric."""
    clipping, correction = values.clipping, values.correction
    masks = {
        "clip/low/active": clipping.active_low,
        "clip/low/any": clipping.below,
        "clip/high/active": clipping.active_high,
        "clip/high/any": clipping.above,
        "clip/dual": clipping.active_dual,
        "correction/masked": correction.masked,
        "correction/truncated": correction.truncated,
    }
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if mask is not None:
            found[f"{name}/token"] = mask
            found[f"{name}/sequence"] = tokens.sequence_mean(mask.double())[present] > 0
    return found


def value_metrics(
    metrics: MetricAccumulator, values: Tensor, returns: Tensor, outcomes: Tensor, outputs: ValueLossOutputs
) -> None:
    """Adds one micro-batch to an accumulator of VALUE; values, returns and outcomes are [M], for masked-in tokens."""
    values = values.detach().double()
    metrics.add_all(
        {
            "loss": outputs.loss,
            "value": values,
            "return": returns,
            "residual": returns - values,
            "outcome": outcomes,
            "outcome_residual": outcomes - values,
            "clipped": outputs.clipped,
        }
    )


def explained_variance(report: Mapping[str, float]) -> dict[str, float]:
    """1 - Var(R - V) / Var(R) from a report of VALUE; no entry if all R are equal.

    R are the returns, which are the critic's targets, and the outcomes, which contain none of the critic's values.
    """
    explained = {}
    for name, target, residual in (("", "return", "residual"), ("/outcome", "outcome", "outcome_residual")):
        low, high, spread = (report.get(f"{target}/{what}", 0.0) for what in ("min", "max", "std"))
        # The std of equal numbers is not 0 but rounding, about 1e-8 of their size.
        if high - low > 1e-6 * max(abs(low), abs(high)):
            explained[f"explained_variance{name}"] = 1 - (report[f"{residual}/std"] / spread) ** 2
    return explained


def sft_metrics(metrics: MetricAccumulator, logprobs: Tensor, loss_mask: Tensor, loss: Tensor, entropy: Tensor) -> None:
    """Adds one micro-batch to an accumulator of SFT; logprobs, loss_mask and entropy are [T]."""
    nll, kept_entropy = -logprobs[loss_mask], entropy[loss_mask]
    metrics.add_all({"loss": loss, "tokens": loss_mask, "nll": nll, "entropy": kept_entropy})


def rollout_metrics(metrics: MetricAccumulator, groups: Sequence[Group], weight_version: int) -> None:
    """Adds judged groups to an accumulator of ROLLOUT. `weight_version` is the trainer's current version.

    Raises ValueError if a sample has no verdict.
    """
    metrics.add("prompts", torch.tensor(len(groups)))
    measured = [_measures(group, weight_version) for group in groups]
    if measured:
        values = {name: np.concatenate([np.atleast_1d(each[name]) for each in measured]) for name in measured[0]}
        metrics.add_all({name: torch.from_numpy(of_groups) for name, of_groups in values.items()})


def _measures(group: Group, weight_version: int) -> dict[str, npt.ArrayLike]:
    """Values of one judged group, by metric."""
    verdicts = [_verdict(sample) for sample in group.samples]
    judged = np.array([not verdict.lost for verdict in verdicts], dtype=bool)
    rewards = np.array([verdict.reward for verdict in verdicts])[judged]
    correct = np.array([verdict.correct for verdict in verdicts], dtype=bool)[judged]
    lengths = np.array([sample.response_tokens for sample in group.samples])
    dead = not judged.any() or all_equal(rewards)
    return {
        "samples": len(group.samples),
        "tokens": lengths,
        "reward": rewards,
        "accuracy": correct,
        "lost_verdicts": ~judged,
        "group/dead": dead,
        "group/dead/all_correct": dead and judged.any() and correct.all(),
        "group/dead/all_wrong": dead and judged.any() and not correct.any(),
        "turns": [sample.turns for sample in group.samples],
        "response_length": lengths,
        "response_length/correct": lengths[judged][correct],
        "response_length/wrong": lengths[judged][~correct],
        "truncated": [is_truncated(sample) for sample in group.samples],
        "staleness": np.concatenate([_staleness(sample, weight_version) for sample in group.samples]),
        "several_versions": [len(_generating_versions(sample)) > 1 for sample in group.samples],
    }


def overlong_metrics(
    metrics: MetricAccumulator, sampled: Sequence[Group], kept: Sequence[Group], reward: RewardConfig, longest: int
) -> None:
    """Adds the punishments of all sampled responses, and the filtered fraction of the `kept` ones, if these are on.

    `longest` is rollout.max_response_tokens.
    """
    if reward.overlong_cache is not None:
        lengths = [sample.response_tokens for group in sampled for sample in group.samples]
        punishments = [overlong_punishment(length, longest, reward.overlong_cache) for length in lengths]
        metrics.add("overlong_punishment", torch.tensor(punishments))
    if reward.overlong_filter:
        filtered = [is_truncated(sample) for group in kept for sample in group.samples]
        metrics.add("overlong_filtered", torch.tensor(filtered))


def _verdict(sample: Sample) -> Verdict:
    if sample.verdict is None:
        raise ValueError(f"prompt {sample.prompt.id!r} sample {sample.index}: no verdict; judge it before measuring it")
    return sample.verdict


def _staleness(sample: Sample, weight_version: int) -> np.ndarray:
    """[|y|]: how many weight versions each token's version is behind the trainer's."""
    versions = _generating_versions(sample)
    ages = [np.full(tokens, weight_version - version) for version, tokens in versions.items()]
    return np.concatenate(ages or [np.zeros(0, dtype=np.int64)])


def _generating_versions(sample: Sample) -> dict[int, int]:
    """Number of generated tokens by weight version, without versions that generated none."""
    tokens: dict[int, int] = {}
    for span in sample.versions:
        if generated := int(sample.loss_mask[span.start : span.end].sum()):
            tokens[span.version] = tokens.get(span.version, 0) + generated
    return tokens
