"""Common mistakes of this field, put into the package on purpose: the check for each fails with it, and passes without
it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from objective_checks import (
    denominators_count_masked_in_tokens,
    each_group_has_its_own_advantages,
    group_advantages_are_the_specifications,
    observations_are_skipped,
    router_shift_is_the_papers,
    same_as_the_reference,
    value_loss_is_the_formula,
)
from objective_reference import DAPO, FAMILY, GRPO, GSPO, correction_of, kl_of

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.data.sample import Sample
from megatron_rl.data.schedule import Denominators
from megatron_rl.engine import packed_advantages
from megatron_rl.objectives import advantages, corrections, kl, losses, policy_loss, ratios, value
from megatron_rl.objectives.inputs import Correction
from megatron_rl.routing import shift as routing_shift

Patch = Callable[[pytest.MonkeyPatch], None]


def wrong_std(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(advantages, "DEGREES_OF_FREEDOM", {"population": 1, "sample": 0})


def one_std(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(advantages, "DEGREES_OF_FREEDOM", {"population": 0, "sample": 0})


def denominator_of_the_micro_batch(patch: pytest.MonkeyPatch) -> None:
    real = policy_loss.token_weights

    def own(tokens: Any, lengths: Any, config: Any, whole: Any) -> Any:
        return real(tokens, lengths, config, Denominators(int(lengths.sum()), int((lengths > 0).sum())))

    patch.setattr(policy_loss, "token_weights", own)


def tokens_of_the_own_response(patch: pytest.MonkeyPatch) -> None:
    """Takes the mean over prompts of one response each, as if responses were prompts."""
    real = losses._tokens_of_prompts
    patch.setattr(losses, "_tokens_of_prompts", lambda tokens, whole: real(tokens, whole) * 0 + tokens.lengths)


def prompts_of_the_micro_batch(patch: pytest.MonkeyPatch) -> None:
    real = losses.token_weights

    def own(tokens: Any, lengths: Any, config: Any, whole: Any) -> Any:
        here: dict[int, int] = {}
        for prompt, length in zip(tokens.prompts, lengths.tolist(), strict=True):
            here[prompt] = here.get(prompt, 0) + length
        return real(tokens, lengths, config, Denominators(sum(here.values()), int((lengths > 0).sum()), here))

    patch.setattr(policy_loss, "token_weights", own)


def responses_for_prompts(patch: pytest.MonkeyPatch) -> None:
    """Divides by the number of responses, not of prompts."""
    patch.setattr(Denominators, "prompts", property(lambda whole: whole.sequences))


def bands_exchanged(patch: pytest.MonkeyPatch) -> None:
    """Takes the band of negative advantages for the others, and the other way round."""
    real = corrections.banded

    def exchanged(tokens: Any, band: Any, denominator: Any) -> Correction:
        return real(dataclasses.replace(tokens, advantages=-tokens.advantages), band, denominator)

    patch.setattr(corrections, "banded", exchanged)


def one_band_for_every_sign(patch: pytest.MonkeyPatch) -> None:
    real = corrections.banded

    def positive(tokens: Any, band: Any, denominator: Any) -> Correction:
        return real(dataclasses.replace(tokens, advantages=tokens.advantages.abs()), band, denominator)

    patch.setattr(corrections, "banded", positive)


def masked_terms_leave_the_denominators(patch: pytest.MonkeyPatch) -> None:
    for module in (corrections, policy_loss):
        patch.setattr(module, "leaves_denominators", lambda config: True)


def length_with_unmasked_tokens(patch: pytest.MonkeyPatch) -> None:
    """Counts prompt, tool output and padding in |y|."""
    real = ratios.Tokens.of

    def of(inputs: Any) -> ratios.Tokens:
        lengths = torch.bincount(inputs.sequence_ids, minlength=inputs.num_sequences)
        return dataclasses.replace(real(inputs), lengths=lengths)

    patch.setattr(ratios.Tokens, "of", of)


def response_tokens_with_observations(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sample, "response_tokens", property(lambda sample: len(sample.response_ids)))


def masked_out_sequences_count(patch: pytest.MonkeyPatch) -> None:
    from megatron_rl.data import schedule

    real = schedule.Denominators
    patch.setattr(schedule, "Denominators", lambda tokens, sequences, prompt_tokens: real(tokens, 3, prompt_tokens))


def clip_of_the_other_sign(patch: pytest.MonkeyPatch) -> None:
    real = losses.clipping

    def turned(tokens: Any, config: Any) -> Any:
        found = real(tokens, config)
        low, high = found.below & (tokens.advantages > 0), found.above & (tokens.advantages < 0)
        return dataclasses.replace(found, active_low=low, active_high=high)

    patch.setattr(policy_loss, "clipping", turned)


def clip_whatever_the_sign(patch: pytest.MonkeyPatch) -> None:
    real = losses.clipping

    def both(tokens: Any, config: Any) -> Any:
        found = real(tokens, config)
        return dataclasses.replace(found, active_low=found.below, active_high=found.above)

    patch.setattr(policy_loss, "clipping", both)


def ratio_base_swapped(patch: pytest.MonkeyPatch) -> None:
    real = ratios.token_log_ratio
    swapped = {"old": "rollout", "rollout": "old"}
    for module in (policy_loss, losses, kl):
        patch.setattr(module, "token_log_ratio", lambda tokens, base: real(tokens, swapped[base]))


def ratio_upside_down(patch: pytest.MonkeyPatch) -> None:
    real = ratios.token_log_ratio
    for module in (policy_loss, losses, kl):
        patch.setattr(module, "token_log_ratio", lambda tokens, base: -real(tokens, base))


def correction_twice(patch: pytest.MonkeyPatch) -> None:
    real = policy_loss.correct

    def twice(tokens: Any, config: Any) -> Correction:
        found = real(tokens, config)
        return dataclasses.replace(found, factor=found.factor.square())

    patch.setattr(policy_loss, "correct", twice)


def correction_beside_the_ratio(patch: pytest.MonkeyPatch) -> None:
    """Multiplies a ratio that is omega already by min(omega, C)."""
    real = corrections.truncated

    def beside(tokens: Any, tis: Any, denominator: Any) -> Correction:
        factor = corrections.log_mismatch(tokens, denominator, tis.level).clamp(max=math.log(tis.high)).exp()
        return dataclasses.replace(real(tokens, tis, denominator), factor=factor)

    patch.setattr(corrections, "truncated", beside)


def mismatch_upside_down(patch: pytest.MonkeyPatch) -> None:
    real = corrections.log_mismatch
    patch.setattr(corrections, "log_mismatch", lambda *given: -real(*given))


def kl_reversed(patch: pytest.MonkeyPatch) -> None:
    def of_the_negative(estimate: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda log_ratio: estimate(-log_ratio)

    for name, estimate in kl.ESTIMATORS.items():
        patch.setitem(kl.ESTIMATORS, name, of_the_negative(estimate))


def kl_without_beta(patch: pytest.MonkeyPatch) -> None:
    real = kl.kl_terms
    patch.setattr(policy_loss, "kl_terms", lambda tokens, config, *out: real(tokens, config, *out) / config.kl.beta)


def kl_added_to_j(patch: pytest.MonkeyPatch) -> None:
    real = kl.kl_terms
    patch.setattr(policy_loss, "kl_terms", lambda *given: -real(*given))


def kl_without_a_gradient(patch: pytest.MonkeyPatch) -> None:
    real = kl.kl_terms
    patch.setattr(policy_loss, "kl_terms", lambda *given: real(*given).detach())


def mask_dropped_in_the_mean(patch: pytest.MonkeyPatch) -> None:
    """Takes the geometric mean over all positions of a sequence; masked-out positions add 0."""
    length_with_unmasked_tokens(patch)


def live_sequence_ratio(patch: pytest.MonkeyPatch) -> None:
    """Removes the stop-gradient of GSPO-token."""
    patch.setitem(
        ratios.RATIOS, "sequence-token", lambda log_ratio, tokens: ratios.sequence(log_ratio, tokens) + log_ratio
    )


def sum_for_the_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ratios.RATIOS, "sequence", ratios.sequence_product)


def mean_for_the_sum(patch: pytest.MonkeyPatch) -> None:
    """Applies TOPR's taper to the length-normalised ratio."""
    patch.setitem(ratios.RATIOS, "sequence-product", ratios.sequence)


def arithmetic_mean_over_experts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(routing_shift, "router_distance", lambda new, old: -(new - old).abs().neg().exp().mean(-1).log())


def sum_over_experts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(routing_shift, "router_distance", lambda new, old: (new - old).abs().sum(-1))


def signed_router_distance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(routing_shift, "router_distance", lambda new, old: (old - new).mean(-1))


def advantage_of_the_neighbour_token(patch: pytest.MonkeyPatch) -> None:
    real = ratios.Tokens.of
    patch.setattr(
        ratios.Tokens,
        "of",
        lambda inputs: dataclasses.replace(real(inputs), advantages=real(inputs).advantages.roll(1)),
    )


def advantage_of_the_neighbour_group(patch: pytest.MonkeyPatch) -> None:
    from megatron_rl import train

    real, seen = train.group_advantages, [[0.0, 1.0]]

    def neighbours(rewards: Any, config: Any) -> Any:
        seen.append(rewards)
        return np.resize(real(seen[-2], config), len(rewards))

    patch.setattr(train, "group_advantages", neighbours)


def baseline_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    from megatron_rl import train

    patch.setattr(train, "group_advantages", lambda rewards, config: np.array(rewards) - 10 / 8)


def gae_through_observations(patch: pytest.MonkeyPatch) -> None:
    """Runs the recursion over every position of the response, including tool output."""

    def every(packed: PackedBatch, outcomes: Any) -> Any:
        yield outcomes[0], np.arange(1, 7)

    patch.setattr(packed_advantages, "responses", every)


def value_clip_of_the_smaller(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(value.torch, "maximum", Smaller(value.torch.maximum))


class Smaller:
    """Stands in for torch.maximum, but takes the smaller of two squared errors."""

    def __init__(self, maximum: Any) -> None:
        self._maximum = maximum

    def __call__(self, left: Any, right: Any) -> Any:
        squares = bool((left >= 0).all() and (right >= 0).all())
        return torch.minimum(left, right) if squares else self._maximum(left, right)


def with_correction(config: ObjectiveConfig, **correction: Any) -> ObjectiveConfig:
    return config.model_copy(update={"correction": correction_of(**correction)})


def with_kl(kind: str) -> ObjectiveConfig:
    return GRPO.model_copy(update={"kl": kl_of(kind, beta=0.3)})


BY_SIGN = with_correction(FAMILY["mimo"], kind="icepop", low=0.6, high=1.4, negative_low=0.9, negative_high=2.0)
BYPASSED = with_correction(GRPO.model_copy(update={"denominator": "rollout"}), kind="tis", high=1.3)
TWO_BY_TWO: list[tuple[Patch, Callable[[], None]]] = [
    (wrong_std, group_advantages_are_the_specifications),
    (one_std, group_advantages_are_the_specifications),
    *[
        (denominator_of_the_micro_batch, lambda config=config: same_as_the_reference(config, parts=3))
        for config in (GRPO, DAPO, GSPO, FAMILY["dr_grpo"], FAMILY["topr"])
    ],
    *[
        (mistake, lambda: same_as_the_reference(FAMILY["mimo"], parts=3))
        for mistake in (tokens_of_the_own_response, prompts_of_the_micro_batch, responses_for_prompts)
    ],
    *[(mistake, lambda: same_as_the_reference(BY_SIGN)) for mistake in (bands_exchanged, one_band_for_every_sign)],
    (masked_terms_leave_the_denominators, lambda: same_as_the_reference(FAMILY["icepop"])),
    (length_with_unmasked_tokens, lambda: same_as_the_reference(GRPO)),
    (length_with_unmasked_tokens, lambda: same_as_the_reference(GSPO)),
    (response_tokens_with_observations, denominators_count_masked_in_tokens),
    (masked_out_sequences_count, denominators_count_masked_in_tokens),
    *[(clip_of_the_other_sign, lambda config=config: same_as_the_reference(config)) for config in (GRPO, DAPO, GSPO)],
    *[
        (clip_whatever_the_sign, lambda config=config: same_as_the_reference(config))
        for config in (GRPO, GSPO, FAMILY["minirl"], FAMILY["gmpo"])
    ],
    *[
        (mistake, lambda config=config: same_as_the_reference(config))
        for mistake in (ratio_base_swapped, ratio_upside_down)
        for config in (
            GRPO,
            GSPO,
            FAMILY["cispo"],
            FAMILY["mimo"],
            FAMILY["sapo"],
            FAMILY["minirl"],
            FAMILY["topr"],
            BYPASSED,
        )
    ],
    *[
        (correction_twice, lambda kind=kind: same_as_the_reference(with_correction(GRPO, kind=kind, high=1.3)))
        for kind in ("tis", "mis", "icepop")
    ],
    (correction_beside_the_ratio, lambda: same_as_the_reference(BYPASSED)),
    *[
        (mismatch_upside_down, lambda kind=kind: same_as_the_reference(with_correction(GRPO, kind=kind, high=1.3)))
        for kind in ("tis", "mis", "icepop")
    ],
    *[(kl_reversed, lambda kind=kind: same_as_the_reference(with_kl(kind))) for kind in ("k1", "k3")],
    *[
        (mistake, lambda kind=kind: same_as_the_reference(with_kl(kind)))
        for mistake in (kl_without_beta, kl_added_to_j, kl_without_a_gradient)
        for kind in ("k1", "k2", "k3", "unbiased")
    ],
    (mask_dropped_in_the_mean, lambda: same_as_the_reference(FAMILY["gmpo"])),
    (live_sequence_ratio, lambda: same_as_the_reference(FAMILY["gspo_token"], by_token=True)),
    (sum_for_the_mean, lambda: same_as_the_reference(GSPO)),
    (mean_for_the_sum, lambda: same_as_the_reference(FAMILY["topr"])),
    *[
        (mistake, router_shift_is_the_papers)
        for mistake in (arithmetic_mean_over_experts, sum_over_experts, signed_router_distance)
    ],
    (advantage_of_the_neighbour_token, lambda: same_as_the_reference(FAMILY["ppo"], by_token=True)),
    (advantage_of_the_neighbour_group, each_group_has_its_own_advantages),
    (baseline_of_the_batch, each_group_has_its_own_advantages),
    (gae_through_observations, observations_are_skipped),
    (value_clip_of_the_smaller, value_loss_is_the_formula),
]


@pytest.mark.parametrize(
    ("mistake", "check"), TWO_BY_TWO, ids=[f"{n}-{m.__name__}" for n, (m, _) in enumerate(TWO_BY_TWO)]
)
def test_the_check_fails_with_the_mistake_and_passes_without_it(
    monkeypatch: pytest.MonkeyPatch, mistake: Patch, check: Callable[[], None]
) -> None:
    check()
    with monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError):
            check()
    check()
