"""Each guard of the objectives goes red when what it guards is broken: mutations of the real functions, one at a time.

The guards are the tests themselves, called with one of their cases: green first, and then with the mutation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import test_objectives_advantages
import test_objectives_corrections
import test_objectives_family
import test_objectives_gae
import test_objectives_kl
import test_objectives_losses
import test_objectives_value
import torch
from critic_samples import samples
from objective_reference import CORRECTIONS

from megatron_rl.config.schema import AdvantageConfig
from megatron_rl.data.packing import pack
from megatron_rl.data.schedule import Denominators
from megatron_rl.engine import advantages as late
from megatron_rl.engine.distribute import Outcome
from megatron_rl.objectives import advantages, kl, losses, policy, ratios
from megatron_rl.objectives.value import ValueLossOutputs

Patch = Callable[[pytest.MonkeyPatch], None]
SAMPLE = AdvantageConfig(std="sample")


@dataclass(frozen=True)
class Mutation:
    name: str
    patch: Patch
    guard: Callable[[], Any]


def replaced(module: Any, name: str, mutate: Callable[[Any], Any]) -> Patch:
    """`mutate` makes the wrong function of the right one."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, mutate(getattr(module, name)))


def of_the_paper(preset: str) -> Callable[[], None]:
    return lambda: test_objectives_family.test_loss_and_gradient_are_the_papers(preset, 0.5)


def in_parts(preset: str) -> Callable[[], None]:
    test = test_objectives_family.test_order_packing_and_micro_batches_do_not_matter.hypothesis.inner_test
    return lambda: test(3, [3, 0, 5, 1, 4], preset, 3)


def per_micro_batch(right: Any) -> Any:
    def wrong(tokens: Any, lengths: Any, config: Any, denominators: Any) -> Any:
        own = Denominators(int(lengths.sum()), int((lengths > 0).sum()))
        return right(tokens, lengths, config, own)

    return wrong


def counting_observations(right: Any) -> Any:
    def wrong(cls: Any, inputs: Any) -> Any:
        counts = torch.bincount(inputs.sequence_ids, minlength=inputs.num_sequences)
        return dataclasses.replace(right(inputs), lengths=counts)

    return classmethod(wrong)


def all_sequences(right: Any) -> Any:
    def wrong(tokens: Any, lengths: Any, config: Any, denominators: Any) -> Any:
        return right(tokens, lengths, config, Denominators(max(denominators.tokens, len(lengths)), len(lengths)))

    return wrong


def other_side(right: Any) -> Any:
    def wrong(tokens: Any, config: Any) -> Any:
        found = right(tokens, config)
        good = tokens.advantages > 0
        return dataclasses.replace(found, active_low=found.below & good, active_high=found.above & ~good)

    return wrong


def swapped_base(right: Any) -> Any:
    return lambda tokens, denominator: right(tokens, {"old": "rollout", "rollout": "old"}[denominator])


def twice(right: Any) -> Any:
    def wrong(tokens: Any, config: Any) -> Any:
        found = right(tokens, config)
        return dataclasses.replace(found, factor=found.factor.square())

    return wrong


def applied_to_omega(right: Any) -> Any:
    """omega is in the ratio already; here it is applied once more."""
    return lambda tokens, config: right(tokens, config.model_copy(update={"denominator": "old"}))


def reversed_kl(right: Any) -> Any:
    return lambda log_ratio: right(-log_ratio)


def by_a_mean_of_squares(right: Any) -> Any:
    return lambda self, values: right(self, values.square()).sqrt() * 0.5


def smaller_of_both(right: Any) -> Any:
    def wrong(inputs: Any, clip: float | None, denominators: Denominators) -> ValueLossOutputs:
        plain, clipped = right(inputs, None, denominators), right(inputs, clip, denominators)
        return ValueLossOutputs(torch.minimum(plain.loss, clipped.loss), clipped.clipped)

    return wrong


def backwards_sum(right: Any) -> Any:
    return lambda rewards, values, gamma, gae_lambda: right(rewards[::-1], values, gamma, gae_lambda)


def everything_counts(right: Any) -> Any:
    def wrong(packed: Any, outcomes: Any) -> Iterator[Any]:
        for outcome, start, end in zip(outcomes, packed.cu_seqlens[:-1], packed.cu_seqlens[1:], strict=True):
            yield outcome, np.arange(start, end)

    return wrong


def kl_of(kind: str) -> Callable[[], None]:
    return lambda: test_objectives_kl.test_kl_in_the_loss_is_the_formula(kind, "grpo", "old")


def observations_are_no_steps() -> None:
    """gae over the masked-in tokens alone, of responses with observations in their middle."""
    config = AdvantageConfig(estimator="gae", gamma=0.9, gae_lambda=0.8)
    responses = samples()
    packed = pack(responses, [0.0] * len(responses))
    values = np.random.default_rng(0).normal(size=packed.tokens)
    outcomes = [Outcome(i, i, float(i)) for i in range(len(responses))]
    found = late._estimate(packed, outcomes, values, None, config)
    for number in range(len(responses)):
        at = np.flatnonzero(packed.loss_mask & (packed.sequence_ids == number))
        rewards = [0.0] * (len(at) - 1) + [float(number)]
        wanted = test_objectives_gae.by_the_paper(rewards, values[at].tolist(), 0.9, 0.8)
        np.testing.assert_allclose(found.advantages[at], wanted, atol=1e-9)
        np.testing.assert_allclose(found.returns[at], wanted + values[at], atol=1e-9)
        np.testing.assert_allclose(found.outcomes[at], number * 0.9 ** np.arange(len(at) - 1, -1, -1), atol=1e-9)
    assert not found.advantages[~packed.loss_mask].any()


def correction_case(kind: str, denominator: str) -> Callable[[], None]:
    (first, *_) = (each for each in CORRECTIONS if each.kind == kind)

    def guard() -> None:
        test = test_objectives_corrections.test_loss_and_gradient_equal_the_reference
        test(first, "grpo", denominator)

    return guard


MUTATIONS = [
    Mutation(
        "std of the wrong kind",
        lambda m: m.setattr(advantages, "DEGREES_OF_FREEDOM", {"population": 1, "sample": 0}),
        lambda: test_objectives_advantages.test_of_eight_so_many_are_correct(SAMPLE, 1, 2.4749, -0.3536),
    ),
    Mutation(
        "std of the wrong kind, over tokens",
        lambda m: m.setattr(advantages, "DEGREES_OF_FREEDOM", {"population": 1, "sample": 0}),
        lambda: test_objectives_gae.test_normalised_over_all_parts_together("sample", 1),
    ),
    Mutation(
        "denominators of each micro-batch, mean over tokens",
        replaced(policy, "token_weights", per_micro_batch),
        in_parts("dapo"),
    ),
    Mutation(
        "denominators of each micro-batch, mean over sequences",
        replaced(policy, "token_weights", per_micro_batch),
        in_parts("gspo"),
    ),
    *(
        Mutation(
            f"lengths that count observations: {name}",
            replaced(ratios.Tokens, "of", counting_observations),
            of_the_paper(name),
        )
        for name in ("grpo", "gspo", "gmpo")
    ),
    Mutation(
        "sequences without a token counted", replaced(policy, "token_weights", all_sequences), of_the_paper("grpo")
    ),
    Mutation("the clip's sides by the wrong sign", replaced(policy, "clipping", other_side), of_the_paper("grpo")),
    Mutation(
        "the clip's sides by the wrong sign, by hand",
        replaced(policy, "clipping", other_side),
        lambda: test_objectives_losses.test_clip_by_sign_of_the_advantage(1.5, 1.0, 1.28, 0.0),
    ),
    Mutation("the mask's sides by the wrong sign", replaced(policy, "clipping", other_side), of_the_paper("minirl")),
    Mutation("ratio against mu for pi_old", replaced(policy, "token_log_ratio", swapped_base), of_the_paper("gspo")),
    Mutation("ratio against pi_old for mu", replaced(policy, "token_log_ratio", swapped_base), of_the_paper("minirl")),
    Mutation("clip judged by the other ratio", replaced(losses, "token_log_ratio", swapped_base), of_the_paper("grpo")),
    *(
        Mutation(f"{kind} applied twice", replaced(policy, "correct", twice), correction_case(kind, "old"))
        for kind in ("tis", "mis", "icepop")
    ),
    *(
        Mutation(
            f"{kind} of a ratio that holds it",
            replaced(policy, "correct", applied_to_omega),
            correction_case(kind, "rollout"),
        )
        for kind in ("tis", "icepop")
    ),
    *(
        Mutation(
            f"{kind} reversed",
            lambda m, kind=kind: m.setitem(kl.ESTIMATORS, kind, reversed_kl(kl.ESTIMATORS[kind])),
            kl_of(kind),
        )
        for kind in ("k1", "k3")  # k2 is the same both ways
    ),
    Mutation(
        "KL without its beta",
        replaced(policy, "kl_terms", lambda right: lambda tokens, config: right(tokens, config) / config.kl.beta),
        kl_of("k3"),
    ),
    Mutation(
        "KL that is rewarded",
        replaced(policy, "kl_terms", lambda right: lambda tokens, config: -right(tokens, config)),
        kl_of("k2"),
    ),
    Mutation(
        "a mean of the wrong kind over a response",
        replaced(ratios.Tokens, "sequence_mean", by_a_mean_of_squares),
        of_the_paper("gspo"),
    ),
    Mutation(
        "value clip by the smaller error",
        replaced(test_objectives_value, "value_loss", smaller_of_both),
        lambda: test_objectives_value.test_clip_by_hand(0.5, 1.0, 0.32, 0.0, True),
    ),
    Mutation(
        "rewards at the wrong end",
        replaced(test_objectives_gae, "gae", backwards_sum),
        test_objectives_gae.test_numbers_of_the_specification,
    ),
    Mutation(
        "observations as steps of gae",
        replaced(late, "_responses", everything_counts),
        observations_are_no_steps,
    ),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_turns_its_guard_red(mutation: Mutation) -> None:
    mutation.guard()
    with pytest.MonkeyPatch.context() as patch:
        mutation.patch(patch)
        with pytest.raises(AssertionError):
            mutation.guard()
    mutation.guard()
