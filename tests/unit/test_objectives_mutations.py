"""Each mistake that this field makes, put into the package on purpose: the check that guards against it goes red with
it, and green without."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from objective_reference import (
    DAPO,
    FAMILY,
    GRPO,
    GSPO,
    correction_of,
    kept_denominators,
    kl_of,
    pack,
    random_sequences,
    reference,
    split,
)
from test_objectives_gae import by_the_paper
from test_objectives_value import by_the_formula, inputs_of

from megatron_rl.config.switches import Gae, GroupAdvantage, ObjectiveConfig
from megatron_rl.data.packing import PackedBatch
from megatron_rl.data.packing import pack as pack_samples
from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.schedule import Denominators, SampleSize, plan
from megatron_rl.engine import packed_advantages
from megatron_rl.engine.distribute import Outcome
from megatron_rl.objectives import advantages, corrections, kl, losses, policy_loss, ratios, value
from megatron_rl.objectives.inputs import Correction
from megatron_rl.routing import shift as routing_shift
from megatron_rl.routing.replay import Tap

LENGTHS = [3, 0, 5, 1, 7, 2]


# The checks


def same_as_the_reference(config: ObjectiveConfig, *, parts: int = 1, by_token: bool = False) -> None:
    """Loss and gradient of a mini-batch, in so many micro-batches, are the float64 reference's."""
    for seed in range(3):
        sequences = random_sequences(seed, LENGTHS, mismatch=0.8, by_token=by_token)
        shift = np.random.default_rng(seed)
        sequences = [dataclasses.replace(s, reference=s.old + 0.4 * shift.normal(size=len(s.old))) for s in sequences]
        whole = kept_denominators(sequences, config)
        micro_batches = [sequences] if parts == 1 else split(sequences, parts, seed)
        total, gradient = 0.0, []
        for micro_batch in micro_batches:
            inputs = pack(micro_batch)
            references = torch.tensor(np.concatenate([s.reference for s in micro_batch]))  # type: ignore[misc]
            inputs = dataclasses.replace(inputs, reference_logprobs=references)
            loss = policy_loss.policy_loss(inputs, config, whole).loss
            loss.backward()
            total += loss.item()
            gradient.append(inputs.logprobs.grad[inputs.loss_mask].numpy())  # type: ignore[index]
        ordered = [sequence for micro_batch in micro_batches for sequence in micro_batch]
        expected, slopes = reference(ordered, config)
        assert total == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(np.concatenate(gradient), slopes, atol=1e-7)


def group_advantages_are_the_specifications() -> None:
    for std, right, wrong in (("population", 2.6458, -0.3780), ("sample", 2.4749, -0.3536)):
        config = GroupAdvantage(std=std)
        found = advantages.group_advantages([1.0] + [0.0] * 7, config)
        np.testing.assert_allclose(found, [right] + [wrong] * 7, atol=5e-5)


def each_group_has_its_own_advantages() -> None:
    """From the rewards of a rollout batch, as training numbers them and as a KL in the reward has them made again."""
    from types import SimpleNamespace

    from megatron_rl import train

    rewards = [[0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [2.0, 5.0]]
    groups = [
        Group(
            g,
            made.prompt,
            tuple(dataclasses.replace(made, index=i, verdict=Verdict(r, True)) for i, r in enumerate(rs)),
        )
        for g, rs in enumerate(rewards)
        for made in [with_observations()]
    ]
    objective = ObjectiveConfig(advantage=GroupAdvantage(std="none"))
    config: Any = SimpleNamespace(objective=objective, rollout=SimpleNamespace(group_size=4))
    samples = train.with_advantages(groups, config)
    wanted = [reward - np.mean(rs) for rs in rewards for reward in rs]
    assert [sample.advantage for sample in samples] == pytest.approx(wanted)


def with_observations() -> Sample:
    sample = Sample.start(Prompt("", "", (1, 2), "", ""), 0)
    return sample.extend([3, 4], [-1.0] * 2, 0).extend([5, 6, 7], None, 0).extend([8], [-1.0], 0)


def observations_are_skipped() -> None:
    """The generalised advantages of a response with a tool's output in its middle are those of its own tokens alone."""
    packed = pack_samples([with_observations()], [0.0])
    config = Gae(gamma=0.9, gae_lambda=0.8)
    values = np.arange(packed.tokens) / 7
    estimate = packed_advantages._estimate(packed, [Outcome(0, 0, 1.0)], values, None, config)
    at = [1, 2, 6]  # one before each token that was generated
    expected = by_the_paper([0, 0, 1.0], values[at], 0.9, 0.8)
    np.testing.assert_allclose(estimate.advantages[at], expected, atol=1e-12)
    assert np.count_nonzero(estimate.advantages) == 3


def value_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    values, old, returns = rng.normal(size=(3, 20))
    found = value.value_loss(inputs_of(values, old, returns), 0.2, Denominators(20, 1)).loss
    assert found.item() == pytest.approx(by_the_formula(values, old, returns, [True] * 20, 0.2), abs=1e-12)


def denominators_count_masked_in_tokens() -> None:
    """With observations in two samples and one that is masked out, the plan's denominators are the masks'."""
    made = with_observations()
    samples = [made, made, dataclasses.replace(made, loss_mask=np.zeros_like(made.loss_mask))]
    sizes = [SampleSize(i, 0, len(s.token_ids), s.response_tokens) for i, s in enumerate(samples)]
    (step,) = plan(sizes, mini_batches=1, dp=1, max_tokens=100).steps
    assert step.denominators == Denominators(tokens=6, sequences=2)


def router_shift_is_the_papers() -> None:
    """gamma = exp(-mean over layers of the mean over pi_old's experts of |delta log p|) [2510.23027]."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 2, 5, 8))  # layers, rows, experts
    used = np.argsort(-old, axis=-1)[..., :3]
    shift = routing_shift.RouterShift([5], torch.device("cpu"))
    for scores, observe in ((old, shift.keep), (new, shift.compare)):
        for layer in range(2):
            ids = torch.tensor(used[layer])
            observe(0, Tap(0, layer, layer, 8, False), torch.tensor(scores[layer]), ids, ids)
    p, q = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in (old, new))
    moved = np.abs(np.log(np.take_along_axis(q / p, used, -1)))
    np.testing.assert_allclose(torch.exp(-shift.distances[0] / 2), np.exp(-moved.mean(-1).mean(0)), rtol=1e-5)


# The mistakes


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


def length_with_unmasked_tokens(patch: pytest.MonkeyPatch) -> None:
    """|y| is the length of prompt and response, tool output and padding."""
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
    patch.setattr(schedule, "Denominators", lambda tokens, sequences: real(tokens, 3))


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
    """min(omega, C) times a ratio that is omega already."""
    real = corrections.truncated

    def beside(tokens: Any, tis: Any, denominator: Any) -> Correction:
        factor = corrections.log_mismatch(tokens, denominator, tis.level).clamp(max=math.log(tis.high)).exp()
        return dataclasses.replace(real(tokens, tis, denominator), factor=factor)

    patch.setattr(corrections, "truncated", beside)


def mismatch_upside_down(patch: pytest.MonkeyPatch) -> None:
    real = corrections.log_mismatch
    patch.setattr(corrections, "log_mismatch", lambda *given: -real(*given))


def kl_reversed(patch: pytest.MonkeyPatch) -> None:
    for name, estimate in kl.ESTIMATORS.items():
        patch.setitem(kl.ESTIMATORS, name, lambda log_ratio, estimate=estimate: estimate(-log_ratio))


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
    """The geometric mean is over all positions of a sequence, of which those without a token add 0."""
    length_with_unmasked_tokens(patch)


def live_sequence_ratio(patch: pytest.MonkeyPatch) -> None:
    """GSPO-token without its stop-gradient."""
    patch.setitem(
        ratios.RATIOS, "sequence-token", lambda log_ratio, tokens: ratios.sequence(log_ratio, tokens) + log_ratio
    )


def sum_for_the_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ratios.RATIOS, "sequence", ratios.sequence_product)


def mean_for_the_sum(patch: pytest.MonkeyPatch) -> None:
    """TOPR's taper of the length-normalised ratio."""
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
    """The recursion runs over every position of the response, tool output included."""

    def every(packed: PackedBatch, outcomes: Any) -> Any:
        yield outcomes[0], np.arange(1, 7)

    patch.setattr(packed_advantages, "_responses", every)


def value_clip_of_the_smaller(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(value.torch, "maximum", Smaller(value.torch.maximum))


class Smaller:
    """torch.maximum, but the smaller of two squared errors."""

    def __init__(self, maximum: Any) -> None:
        self._maximum = maximum

    def __call__(self, left: Any, right: Any) -> Any:
        squares = bool((left >= 0).all() and (right >= 0).all())
        return torch.minimum(left, right) if squares else self._maximum(left, right)


def with_correction(config: ObjectiveConfig, **correction: Any) -> ObjectiveConfig:
    return config.model_copy(update={"correction": correction_of(**correction)})


def with_kl(kind: str) -> ObjectiveConfig:
    return GRPO.model_copy(update={"kl": kl_of(kind, beta=0.3)})


BYPASSED = with_correction(GRPO.model_copy(update={"denominator": "rollout"}), kind="tis", high=1.3)
TWO_BY_TWO: list[tuple[Patch, Callable[[], None]]] = [
    (wrong_std, group_advantages_are_the_specifications),
    (one_std, group_advantages_are_the_specifications),
    *[
        (denominator_of_the_micro_batch, lambda config=config: same_as_the_reference(config, parts=3))
        for config in (GRPO, DAPO, GSPO, FAMILY["dr_grpo"], FAMILY["topr"])
    ],
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
        for config in (GRPO, GSPO, FAMILY["cispo"], FAMILY["sapo"], FAMILY["minirl"], FAMILY["topr"], BYPASSED)
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
def test_the_check_goes_red_with_the_mistake_and_is_green_without(
    monkeypatch: pytest.MonkeyPatch, mistake: Patch, check: Callable[[], None]
) -> None:
    check()
    with monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError):
            check()
    check()
