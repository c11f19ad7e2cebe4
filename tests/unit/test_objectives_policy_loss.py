"""GRPO, DAPO, GSPO, GSPO-token: numbers by hand, a float64 reference, and invariances of the loss."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objective_inputs import AGGREGATIONS, SEEDS, SOME_LENGTHS, gradient_of, loss_and_gradient, one_response, token_keys
from objective_reference import (
    DAPO,
    FAMILY,
    GRPO,
    GSPO,
    GSPO_TOKEN,
    OBJECTIVES,
    pack,
    random_sequences,
    reference,
    split,
)

from megatron_rl.config.switches import MinClip, ObjectiveConfig, UnbiasedKL
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.policy_loss import policy_loss, sft_loss

# Numbers worked out by hand


def test_the_gspo_ratio_equals_the_specification():
    unclipped = GSPO.model_copy(update={"clip": MinClip(low=0.5, high=0.5)})
    outputs = policy_loss(one_response([1.10, 0.95, 1.30, 0.90], 1.0), unclipped, Denominators(4, 1))
    assert outputs.loss.item() == pytest.approx(-1.0515, abs=5e-5)
    assert outputs.values.log_sequence_ratio.exp().item() == pytest.approx(1.0515, abs=5e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.5, 1.0, 1.28, 0.0),  # above the band, good: bounded at 1 + high
        (1.5, -1.0, -1.5, -1.5),  # above the band, bad: the gradient must still push down
        (0.5, 1.0, 0.5, 0.5),  # below the band, good: the gradient must still push up
        (0.5, -1.0, -0.8, 0.0),  # below, bad: bounded at 1 - low
        (1.1, 2.0, 2.2, 2.2),
        (0.9, -2.0, -1.8, -1.8),
        (5.0, -1.0, -3.0, 0.0),  # beyond the dual clip of 3
        (5.0, 1.0, 1.28, 0.0),
    ],
)
def test_the_clip_depends_on_the_sign_of_the_advantage(ratio, advantage, objective, slope):
    config = DAPO.model_copy(update={"clip": MinClip(low=0.2, high=0.28, dual=3.0)})
    inputs = one_response([ratio], advantage)
    outputs = policy_loss(inputs, config, Denominators(1, 1))
    outputs.loss.backward()
    assert -outputs.loss.item() == pytest.approx(objective)
    assert -gradient_of(inputs.logprobs).item() == pytest.approx(slope)
    clipping = outputs.values.clipping
    assert clipping.active_dual is not None
    assert clipping.above.item() == (ratio > 1.28)
    assert clipping.below.item() == (ratio < 0.8)
    assert clipping.active_high.item() == (ratio > 1.28 and advantage > 0)
    assert clipping.active_low.item() == (ratio < 0.8 and advantage < 0)
    assert clipping.active_dual.item() == (ratio == 5.0 and advantage < 0)


def test_aggregations_of_two_responses_by_hand():
    # All ratios are 1, so a term is its advantage. Responses of 1 and 3 tokens have advantages 1 and -2.
    sequences = [
        dataclasses.replace(sequence, logprobs=sequence.old, advantage=advantage)
        for sequence, advantage in zip(random_sequences(0, [1, 3]), [1.0, -2.0], strict=True)
    ]
    expected = {
        "token-mean": (1 - 6) / 4,
        "prompt-mean": (1 - 2) / 2,
        "seq-mean-token-mean": (1 - 2) / 2,
        "seq-mean-token-sum": (1 - 6) / 2,
        "constant-length": (1 - 6) / (2 * 10),
    }
    for aggregation, objective in expected.items():
        config = ObjectiveConfig.model_validate({"aggregation": aggregation, "constant_length": 10})
        outputs, _ = loss_and_gradient(sequences, config)
        assert -outputs.loss.item() == pytest.approx(objective), aggregation


def test_the_mean_over_prompts_by_hand():
    # All ratios are 1. Prompt 7 has responses of 1 and 3 tokens, prompt 2 one of 2 tokens, and prompt 5 none.
    made = zip(random_sequences(0, [1, 3, 2, 0]), [1.0, -2.0, 0.5, 9.0], [7, 7, 2, 5], strict=True)
    sequences = [dataclasses.replace(s, logprobs=s.old, advantage=a, prompt=p) for s, a, p in made]
    outputs, gradient = loss_and_gradient(sequences, ObjectiveConfig(aggregation="prompt-mean"))
    assert -outputs.loss.item() == pytest.approx(((1 - 6) / 4 + 0.5) / 2)
    np.testing.assert_allclose(-gradient, [1 / 8] + [-2 / 8] * 3 + [0.5 / 4] * 2)


def test_the_mean_over_prompts_needs_the_prompts():
    config, inputs = ObjectiveConfig(aggregation="prompt-mean"), one_response([1.0, 1.0], 1.0)
    with pytest.raises(ValueError, match=r"objective\.aggregation: prompt-mean needs the sequences' prompts"):
        policy_loss(dataclasses.replace(inputs, prompts=None), config, Denominators(2, 1, {0: 2}))
    with pytest.raises(ValueError, match=r"objective\.aggregation: prompt-mean needs the sequences' prompts"):
        policy_loss(inputs, config, Denominators(2, 1))
    with pytest.raises(ValueError, match="prompts: 2, expected one for each of 1 sequences"):
        dataclasses.replace(inputs, prompts=[0, 1])


def test_sft_loss_is_the_mean_over_masked_in_tokens():
    logprobs = torch.tensor([float("nan"), -1.0, -3.0, -5.0], requires_grad=True)
    mask = torch.tensor([False, True, True, False])
    parts = [sft_loss(logprobs[a:b], mask[a:b], Denominators(2, 1)).loss for a, b in ((0, 2), (2, 4))]
    whole = torch.stack(parts).sum()
    whole.backward()
    assert whole.item() == 2.0
    assert gradient_of(logprobs).tolist() == [0.0, -0.5, -0.5, 0.0]
    assert sft_loss(logprobs[:1], mask[:1], Denominators(0, 0)).loss.item() == 0


# The float64 reference


@pytest.mark.parametrize("denominator", ["old", "rollout"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_equal_the_reference(name, aggregation, denominator):
    config = OBJECTIVES[name].model_copy(
        update={"aggregation": aggregation, "denominator": denominator, "constant_length": 5}
    )
    clipped = 0
    for seed in range(4):
        sequences = random_sequences(seed, [3, 0, 5, 1, 7, 2])
        outputs, gradient = loss_and_gradient(sequences, config, padding=3)
        loss, expected = reference(sequences, config)
        assert outputs.loss.item() == pytest.approx(loss, abs=1e-10)
        np.testing.assert_allclose(gradient, expected, atol=1e-8)
        single, single_gradient = loss_and_gradient(sequences, config, torch.float32)
        assert single.loss.dtype == torch.float32
        assert single.loss.item() == pytest.approx(loss, abs=1e-6)
        np.testing.assert_allclose(single_gradient, expected, atol=1e-6)
        clipped += int((outputs.values.clipping.active_low | outputs.values.clipping.active_high).sum())
    assert 0 < clipped < 4 * 18, "the comparison must cover clipped and free tokens"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dual_clip_equals_the_reference(name):
    clip = OBJECTIVES[name].clip.model_copy(update={"dual": 1.1})
    config = OBJECTIVES[name].model_copy(update={"clip": clip})
    dual = 0
    for seed in range(10, 14):
        sequences = random_sequences(seed, [4, 2, 6, 3])
        outputs, gradient = loss_and_gradient(sequences, config)
        loss, expected = reference(sequences, config)
        assert outputs.loss.item() == pytest.approx(loss, abs=1e-10)
        np.testing.assert_allclose(gradient, expected, atol=1e-8)
        dual += int(outputs.values.clipping.active_dual.sum())
    assert dual


@given(SEEDS, SOME_LENGTHS, st.sampled_from(list(OBJECTIVES)), st.sampled_from(AGGREGATIONS))
def test_any_batch_equals_the_reference(seed, lengths, name, aggregation):
    config = OBJECTIVES[name].model_copy(update={"aggregation": aggregation, "constant_length": 9})
    sequences = random_sequences(seed, lengths)
    outputs, gradient = loss_and_gradient(sequences, config)
    loss, expected = reference(sequences, config)
    assert outputs.loss.item() == pytest.approx(loss, abs=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


# Invariances


@given(SEEDS, SOME_LENGTHS, st.sampled_from(list(OBJECTIVES)), st.sampled_from(AGGREGATIONS), st.integers(1, 4))
def test_results_do_not_depend_on_order_or_micro_batches(seed, lengths, name, aggregation, parts):
    config = OBJECTIVES[name].model_copy(update={"aggregation": aggregation, "constant_length": 9})
    sequences = random_sequences(seed, lengths)
    whole, gradient = loss_and_gradient(sequences, config)
    wanted = dict(zip(token_keys(sequences), gradient, strict=True))
    total = 0.0
    got: dict[tuple[int, int], float] = {}
    for padding, micro_batch in enumerate(split(sequences, parts, seed)):
        outputs, part = loss_and_gradient(micro_batch, config, padding=padding, whole=sequences)
        total += outputs.loss.item()
        got |= dict(zip(token_keys(micro_batch), part, strict=True))
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key] == pytest.approx(value, abs=1e-12)


def test_denominators_of_single_micro_batches_would_change_the_loss():
    # The test above must catch micro-batches with their own denominators, which give another loss.
    sequences = random_sequences(3, [2, 6, 4])
    whole, _ = loss_and_gradient(sequences, GRPO)
    alone = sum(loss_and_gradient([sequence], GRPO)[0].loss.item() for sequence in sequences)
    assert abs(alone - whole.loss.item()) > 1e-3


@given(SEEDS, SOME_LENGTHS)
def test_token_mean_equals_sequence_mean_only_at_equal_lengths(seed, lengths):
    sequences = random_sequences(seed, lengths)
    free = DAPO.model_copy(update={"clip": MinClip(low=0.99, high=99.0)})  # so that every token has a gradient
    by_token, token_gradient = loss_and_gradient(sequences, free)
    by_sequence, sequence_gradient = loss_and_gradient(
        sequences, free.model_copy(update={"aggregation": "seq-mean-token-mean"})
    )
    equal = len({length for length in lengths if length}) == 1
    assert np.allclose(token_gradient, sequence_gradient, rtol=1e-9, atol=0) == equal
    if equal:
        assert by_token.loss.item() == pytest.approx(by_sequence.loss.item(), abs=1e-12)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_all_objectives_have_the_same_gradient_on_policy_at_equal_lengths(seed, length, count):
    sequences = random_sequences(seed, [length] * count, drift=0.0)
    gradients = [loss_and_gradient(sequences, config)[1] for config in OBJECTIVES.values()]
    assert np.abs(gradients[0]).max() > 0
    for gradient in gradients[1:]:
        np.testing.assert_allclose(gradient, gradients[0], atol=1e-12)


@given(SEEDS, SOME_LENGTHS, st.sampled_from(AGGREGATIONS))
def test_gspo_token_equals_gspo_in_value_clip_and_gradient(seed, lengths, aggregation):
    update = {"aggregation": aggregation, "constant_length": 9}
    sequences = random_sequences(seed, lengths)
    gspo, gradient = loss_and_gradient(sequences, GSPO.model_copy(update=update))
    by_token, token_gradient = loss_and_gradient(sequences, GSPO_TOKEN.model_copy(update=update))
    assert by_token.loss.item() == gspo.loss.item()
    for name in ("below", "above", "active_low", "active_high"):
        assert torch.equal(getattr(by_token.values.clipping, name), getattr(gspo.values.clipping, name))
    np.testing.assert_allclose(token_gradient, gradient, atol=1e-12)


def test_the_gspo_gradient_equals_the_paper():
    # mean_i s_i A_i (1/|y_i|) sum_t grad log pi, here with a clip that never acts.
    sequences = random_sequences(5, [4, 2, 7])
    config = GSPO.model_copy(update={"clip": MinClip(low=0.9, high=9.0)})
    _, gradient = loss_and_gradient(sequences, config)
    expected = []
    for sequence in sequences:
        log_ratio = (sequence.logprobs - sequence.old)[sequence.mask]
        share = np.exp(log_ratio.mean()) * sequence.advantage / len(log_ratio) / len(sequences)
        expected += [-share] * len(log_ratio)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


# Edges


@given(SEEDS, SOME_LENGTHS, st.sampled_from(list(OBJECTIVES)), st.sampled_from([torch.float32, torch.float64]))
def test_the_first_mini_batch_is_exact(seed, lengths, name, dtype):
    config = OBJECTIVES[name].model_copy(update={"clip": MinClip(low=0.0, high=0.0)})
    sequences = random_sequences(seed, lengths, drift=0.0)
    outputs, gradient = loss_and_gradient(sequences, config, dtype)
    clipping = outputs.values.clipping
    assert (outputs.values.log_sequence_ratio == 0).all()
    for mask in (clipping.below, clipping.above, clipping.active_low, clipping.active_high):
        assert not mask.any()
    # Ratio 1 exactly: the loss is the weighted sum of the advantages, and every token has a gradient.
    assert (gradient != 0).all()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_fully_masked_batch_gives_zero(name, aggregation):
    config = OBJECTIVES[name].model_copy(update={"aggregation": aggregation, "constant_length": 9})
    inputs = pack(random_sequences(1, [0, 0]))
    outputs = policy_loss(inputs, config, Denominators(0, 0))
    outputs.loss.backward()
    assert outputs.loss.item() == 0
    assert (gradient_of(inputs.logprobs) == 0).all()


def test_a_masked_out_sequence_changes_nothing():
    sequences = random_sequences(2, [3, 0, 4])
    with_it, gradient = loss_and_gradient(sequences, GRPO)
    without_it, expected = loss_and_gradient([sequences[0], sequences[2]], GRPO)
    assert with_it.loss.item() == without_it.loss.item()
    assert (gradient == expected).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_clipped_ratio_that_overflows_has_no_gradient(name):
    inputs = one_response([1.0, 1.0], 1.0, torch.float32)
    inputs = dataclasses.replace(inputs, old_logprobs=torch.full((2,), -500.0))
    outputs = policy_loss(inputs, OBJECTIVES[name], Denominators(2, 1))
    outputs.loss.backward()
    clip = OBJECTIVES[name].clip
    assert isinstance(clip, MinClip)
    assert clip.high is not None
    assert -outputs.loss.item() == pytest.approx(1 + clip.high)
    assert gradient_of(inputs.logprobs).tolist() == [0.0, 0.0]


def test_the_gradient_flows_only_through_the_policy():
    # The gradient must remain if an engine passes its own forward pass as pi_old.
    inputs = one_response([1.0, 0.5], 1.0)
    policy_loss(dataclasses.replace(inputs, old_logprobs=inputs.logprobs), GRPO, Denominators(2, 1)).loss.backward()
    assert gradient_of(inputs.logprobs).tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("config", [*FAMILY.values(), GRPO], ids=str)
def test_only_the_policys_log_probs_get_a_gradient(config):
    kl = UnbiasedKL(beta=0.1)
    inputs = pack(random_sequences(3, [4, 2, 5], mismatch=0.3))
    others = (
        "old_logprobs",
        "rollout_logprobs",
        "advantages",
        "reference_logprobs",
        "router_shift",
        "top_rollout_logprobs",
    )
    attached = {name: getattr(inputs, name) for name in others}
    attached["reference_logprobs"] = inputs.rollout_logprobs - 0.1
    attached["router_shift"] = torch.full_like(inputs.logprobs, 0.9)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in attached.items()}
    inputs = dataclasses.replace(inputs, **leaves)
    whole = Denominators(11, 3, {0: 4, 1: 7})
    policy_loss(inputs, config.model_copy(update={"kl": kl}), whole).loss.backward()
    assert gradient_of(inputs.logprobs).any()
    assert {name: leaf.grad for name, leaf in leaves.items()} == dict.fromkeys(others)


def test_values_for_metrics_are_detached():
    outputs, _ = loss_and_gradient(random_sequences(2, [3, 4]), GSPO)
    assert not outputs.values.log_sequence_ratio.requires_grad


# Errors


def test_the_error_names_an_input_with_a_wrong_shape_or_dtype():
    inputs = one_response([1.0, 1.0], 1.0)
    with pytest.raises(ValueError, match=r"advantages: shape \(3,\), expected that of logprobs, \(2,\)"):
        dataclasses.replace(inputs, advantages=torch.zeros(3))
    with pytest.raises(ValueError, match=r"loss_mask: dtype torch.int64, expected torch.bool"):
        dataclasses.replace(inputs, loss_mask=torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 2), (-1, -2), (5, -1)])
def test_impossible_denominators_are_an_error(tokens, sequences):
    with pytest.raises(ValueError, match="denominators"):
        Denominators(tokens, sequences)


def test_constant_length_aggregation_requires_its_constant():
    config = ObjectiveConfig(aggregation="constant-length")
    with pytest.raises(ValueError, match=r"objective\.constant_length: not set"):
        policy_loss(one_response([1.0], 1.0), config, Denominators(1, 1))


def test_zero_advantages_give_no_gradient():
    sequence = dataclasses.replace(random_sequences(4, [3])[0], advantage=0.0)
    outputs, gradient = loss_and_gradient([sequence], GSPO)
    assert outputs.loss.item() == 0
    assert not gradient.any()
