"""Losses, gradients and metrics on real gloo ranks: the same however a batch is cut up, and the papers' own.

hypothesis draws batches with groups of unequal size, responses of several turns, of no token and masked out, an
objective with its corrections and KL, and how they are cut; four ranks that stay alive answer for each layout.
"""

from __future__ import annotations

import functools
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from objective_papers import PAPERS, paper_loss
from objective_reference import CORRECTIONS, FAMILY, TrainedSequence, differentiated
from ranks_worker import LAYOUTS, receive, send
from rl_runs import environment, torchrun

from megatron_rl.config.schema import KLConfig, ObjectiveConfig
from megatron_rl.objectives.advantages import group_advantages

pytestmark = pytest.mark.distributed

KLS = [
    KLConfig(),
    KLConfig(kind="k3", beta=0.3),
    KLConfig(kind="unbiased", beta=0.3),
    KLConfig(kind="k1", place="reward", beta=0.2),
]
turns = st.lists(st.integers(0, 5), min_size=0, max_size=3)


@pytest.fixture(scope="module")
def ranks() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = subprocess.Popen(
            torchrun(4, str(Path(__file__).parent / "ranks_worker.py"), str(port)), env=environment()
        )
        server.settimeout(120)
        connection, _ = server.accept()
        yield connection
        connection.close()
        assert process.wait(timeout=60) == 0


def ask(ranks: socket.socket, layout: str, example: dict[str, Any]) -> Any:
    send(ranks, {"layout": layout, "example": example})
    return receive(ranks)


@st.composite
def batches(draw: st.DrawFn, name: str | None = None, corrected: bool = True) -> dict[str, Any]:
    """A rollout batch with all that its policies say of it, an objective, and the numbers of the plan."""
    objective = FAMILY[name or draw(st.sampled_from(sorted(FAMILY)))]
    if corrected:
        update: dict[str, Any] = {"kl": draw(st.sampled_from(KLS))}
        if objective.denominator == "old":
            update["correction"] = draw(st.sampled_from([objective.correction, *CORRECTIONS]))
        objective = objective.model_copy(update=update)
    mini_batches = draw(st.integers(1, 2))
    groups = draw(st.lists(st.lists(turns, min_size=1, max_size=4), min_size=mini_batches, max_size=4))
    assume(len(groups) % mini_batches == 0)
    block = len(groups) // mini_batches
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    for start in range(0, len(groups), block):  # four ranks need four samples
        while sum(map(len, groups[start : start + block])) < 4:
            groups[start].append([3])
    samples = []
    for number, group in enumerate(groups):
        rewards = rng.integers(0, 2, len(group)).astype(float).tolist()
        advantages = [0.0] * len(group)
        if objective.advantage.estimator == "group":
            advantages = group_advantages(rewards, objective.advantage).astype(np.float32).tolist()
        for lengths, reward, advantage in zip(group, rewards, advantages, strict=True):
            samples.append(response(rng, len(samples), number, lengths, reward, advantage))
    return {
        "objective": objective.model_dump(),
        "samples": [samples[i] for i in rng.permutation(len(samples))],
        "mini_batches": mini_batches,
        "max_tokens": draw(st.sampled_from([16, 40, 400])),
    }


def response(
    rng: np.random.Generator, index: int, group: int, lengths: list[int], reward: float, advantage: float
) -> dict[str, Any]:
    prompt = rng.integers(2, 99, rng.integers(1, 6)).tolist()
    spans = [rng.integers(2, 99, n).tolist() for n in lengths]
    mask = np.array([False] * len(prompt) + [turn % 2 == 0 for turn, n in enumerate(lengths) for _ in range(n)])
    n = len(mask)
    mu = -rng.exponential(1.0, n).astype(np.float32).astype(np.float64)
    mu_turns, at = [], len(prompt)
    for count in lengths:
        mu_turns.append(mu[at : at + count].tolist())
        at += count
    old = mu + 0.3 * rng.normal(size=n)
    tables = {
        "theta": old + 0.3 * rng.normal(size=n),
        "old": old,
        "reference": old + 0.4 * rng.normal(size=n),
        "value": rng.normal(size=n),
        "shift": rng.uniform(0.6, 1.0, n),  # RSPO's factor, for which there are no routers here
    }
    return {
        "index": index,
        "group": group,
        "prompt": prompt,
        "turns": spans,
        "mu": mu_turns,
        "reward": reward,
        "advantage": advantage,
        # What is said of a token stands one position before it.
        "tables": {key: np.append(values[1:], 0.0).tolist() for key, values in tables.items()},
        "mask": mask.tolist(),
        "all_mu": mu.tolist(),
    }


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], layout: str) -> None:
    assert len(found) == len(expected)
    for mine, wanted in zip(found, expected, strict=True):
        assert mine["denominators"] == wanted["denominators"], layout
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=1e-9, abs=1e-10), layout
        # Every token once, whichever rank had it.
        assert [row[:2] for row in mine["gradients"]] == [row[:2] for row in wanted["gradients"]], layout
        np.testing.assert_allclose(
            [row[2] for row in mine["gradients"]], [row[2] for row in wanted["gradients"]], rtol=1e-9, atol=1e-10
        )
        assert mine["metrics"].keys() == wanted["metrics"].keys(), layout
        for name, value in wanted["metrics"].items():
            # The spread of equal values is a rounding error, and its root is not small.
            bound = 1e-6 if name.endswith("/std") else 1e-9
            assert mine["metrics"][name] == pytest.approx(value, rel=bound, abs=bound), (layout, name)


slowly = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))


def cut_up_in_every_way(ranks: socket.socket, example: dict[str, Any]) -> None:
    expected = ask(ranks, "one rank", {**example, "max_tokens": 4000})
    ordered = sorted(example["samples"], key=lambda sample: sample["index"])
    again = ask(ranks, "one rank", {**example, "samples": ordered})
    assume("error" not in again)
    assert_same(again, expected, "one rank, other packing and order")
    for layout in list(LAYOUTS)[1:]:
        found = ask(ranks, layout, example)
        if "error" not in found:
            assert_same(found, expected, layout)


@slowly
@given(example=batches())
def test_layout_packing_micro_batches_and_order_do_not_matter(ranks: socket.socket, example: dict[str, Any]) -> None:
    cut_up_in_every_way(ranks, example)


@settings(slowly, max_examples=12)
@given(example=batches("ppo"))
def test_nor_do_they_for_advantages_of_a_critic(ranks: socket.socket, example: dict[str, Any]) -> None:
    cut_up_in_every_way(ranks, example)


@slowly
@given(data=st.data())
def test_on_ranks_the_loss_is_the_papers(ranks: socket.socket, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(set(PAPERS) - {"ppo"})))  # ppo's advantages are by token
    example = data.draw(batches(name, corrected=False))
    layout = data.draw(st.sampled_from(list(LAYOUTS)[1:]))
    found = ask(ranks, layout, example)
    assume("error" not in found)
    groups = max(sample["group"] for sample in example["samples"]) + 1
    block = groups // example["mini_batches"]
    for number, mine in enumerate(found):
        samples = [s for s in example["samples"] if s["group"] // block == number]
        samples.sort(key=lambda sample: sample["index"])
        sequences = [as_sequence(sample) for sample in samples]
        if not any(sequence.mask.any() for sequence in sequences):
            assert mine["loss"] == 0
            continue
        loss, gradient = differentiated(sequences, functools.partial(paper_loss, sequences, name))
        assert mine["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
        np.testing.assert_allclose([row[2] for row in mine["gradients"]], gradient, rtol=1e-6, atol=1e-6)


def as_sequence(sample: dict[str, Any]) -> TrainedSequence:
    """For the references, which have what is said of a token at the token."""
    columns = {key: np.append(np.nan, values[:-1]) for key, values in sample["tables"].items()}
    return TrainedSequence(
        logprobs=columns["theta"],
        old=columns["old"],
        rollout=np.array(sample["all_mu"]),
        entropy=np.zeros(len(sample["mask"])),
        mask=np.array(sample["mask"], dtype=bool),
        shift=columns["shift"],
        advantage=sample["advantage"],
    )


@slowly
@given(example=batches(), layout=st.sampled_from(list(LAYOUTS)))
def test_on_policy_every_ratio_is_exactly_one(ranks: socket.socket, example: dict[str, Any], layout: str) -> None:
    """The first mini-batch: pi_theta is pi_old, to the last bit."""
    for sample in example["samples"]:
        sample["tables"]["old"] = sample["tables"]["theta"]
    objective = ObjectiveConfig.model_validate(example["objective"])
    found = ask(ranks, layout, example)
    assume("error" not in found)
    for mine in found:
        metrics = mine["metrics"]
        if not mine["gradients"]:
            continue
        for name in ("ratio", "sequence_ratio") if objective.denominator == "old" else ("ratio",):
            assert metrics[f"{name}/min"] == metrics[f"{name}/max"] == 1.0
        if objective.denominator == "old":
            assert not any(value for name, value in metrics.items() if name.startswith("clip/"))
