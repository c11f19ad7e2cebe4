"""Checks of objectives against independent formulas; they raise AssertionError."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from objective_inputs import by_the_formula, by_the_paper, inputs_of
from objective_reference import kept_denominators, pack, random_sequences, reference, split
from taps import make_tap

from megatron_rl.config.switches import Gae, GroupAdvantage, ObjectiveConfig
from megatron_rl.data.packing import pack as pack_samples
from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.schedule import Denominators, SampleSize, plan
from megatron_rl.engine import packed_advantages
from megatron_rl.engine.distribute import Outcome
from megatron_rl.objectives import advantages, policy_loss, value
from megatron_rl.routing import shift as routing_shift

LENGTHS = [3, 0, 5, 1, 7, 2]


def same_as_the_reference(config: ObjectiveConfig, *, parts: int = 1, by_token: bool = False) -> None:
    """Compares loss and gradient of a mini-batch in `parts` micro-batches with the float64 reference."""
    for seed in range(3):
        sequences = random_sequences(seed, LENGTHS, mismatch=0.8, by_token=by_token)
        shift = np.random.default_rng(seed)
        sequences = [dataclasses.replace(s, reference=s.old + 0.4 * shift.normal(size=len(s.old))) for s in sequences]
        whole = kept_denominators(sequences, config)
        micro_batches = [sequences] if parts == 1 else split(sequences, parts, seed)
        total, gradient = 0.0, []
        for micro_batch in micro_batches:
            inputs = pack(micro_batch)
            references = torch.tensor(np.concatenate([s.reference for s in micro_batch]))
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
        config = GroupAdvantage.model_validate({"std": std})
        found = advantages.group_advantages([1.0] + [0.0] * 7, config)
        np.testing.assert_allclose(found, [right] + [wrong] * 7, atol=5e-5)


def each_group_has_its_own_advantages() -> None:
    """Compares each group's advantages, as first computed and as recomputed with KL in the reward."""
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
    """Generalised advantages of a response with tool output in the middle depend only on generated tokens."""
    packed = pack_samples([with_observations()], [0.0])
    config = Gae(gamma=0.9, gae_lambda=0.8)
    values = np.arange(packed.tokens) / 7
    estimate = packed_advantages._estimate(packed, [Outcome(0, 0, 1.0)], values, None, config)
    at = [1, 2, 6]  # one position before each generated token
    expected = by_the_paper([0, 0, 1.0], values[at], 0.9, 0.8)
    np.testing.assert_allclose(estimate.advantages[at], expected, atol=1e-12)
    assert np.count_nonzero(estimate.advantages) == 3


def value_loss_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    values, old, returns = rng.normal(size=(3, 20))
    found = value.value_loss(inputs_of(values, old, returns), 0.2, Denominators(20, 1)).loss
    assert found.item() == pytest.approx(by_the_formula(values, old, returns, [True] * 20, 0.2), abs=1e-12)


def denominators_count_masked_in_tokens() -> None:
    """The plan's denominators count the loss mask: two samples have observations, and one is masked out."""
    made = with_observations()
    samples = [made, made, dataclasses.replace(made, loss_mask=np.zeros_like(made.loss_mask))]
    sizes = [SampleSize(i, 0, len(s.token_ids), s.response_tokens) for i, s in enumerate(samples)]
    (step,) = plan(sizes, mini_batches=1, dp=1, max_tokens=100).steps
    assert step.denominators == Denominators(tokens=6, sequences=2, prompt_tokens={0: 6})


def router_shift_is_the_papers() -> None:
    """gamma = exp(-mean over layers of the mean over pi_old's experts of |delta log p|) [2510.23027]."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 2, 5, 8))  # layers, rows, experts
    used = np.argsort(-old, axis=-1)[..., :3]
    shift = routing_shift.RouterShift([5], torch.device("cpu"))
    for scores, observe in ((old, shift.keep), (new, shift.compare)):
        for layer in range(2):
            ids = torch.tensor(used[layer])
            observe(0, make_tap(8, layer=layer, column=layer), torch.tensor(scores[layer]), ids, ids)
    p, q = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in (old, new))
    moved = np.abs(np.log(np.take_along_axis(q / p, used, -1)))
    np.testing.assert_allclose(torch.exp(-shift.distances[0] / 2), np.exp(-moved.mean(-1).mean(0)), rtol=1e-5)
