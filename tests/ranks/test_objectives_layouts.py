"""Losses, gradients and metrics do not depend on ranks, packing, micro-batches or order.

Real gloo processes compute them, from samples to reduced metrics, for any batch and objective that hypothesis draws."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from forks import Forks, Run
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from objective_inputs import AGGREGATIONS
from objective_reference import CORRECTIONS, FAMILY, TrainedSequence, kl_estimate, reference
from rank_examples import Example, Response, generalised_advantages_of, group_advantages_of, tables, top_tables, trained
from ranks_worker import LAYOUTS, WORLD, receive, send

from megatron_rl.config.switches import (
    KL,
    CorrectionConfig,
    GroupAdvantage,
    IcePop,
    Mis,
    NoCorrection,
    NoKL,
    ObjectiveConfig,
    Tis,
    UnbiasedKL,
)
from megatron_rl.data.schedule import SampleSize, ScheduleError, plan
from megatron_rl.objectives.kl import in_reward

PATIENCE = 90.0
"""Seconds to wait for an answer, including the start of the ranks; a longer wait means a deadlock."""
NAMES = sorted(set(FAMILY) - {"rspo"})
"""All presets but RSPO. Its factor needs routers, which these ranks lack; see tests/ranks/test_routing_shift.py."""
REPLICAS = 4
"""Largest number of replicas of a layout; every mini-batch has at least as many samples."""


class Ranks:
    """Processes that evaluate examples. They are restarted if an example ends them."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks
        self._run: Run | None = None
        self._connection: socket.socket | None = None

    def ask(self, question: bytes) -> dict[str, list[dict[str, Any]]]:
        run = self._run or self._start()
        assert self._connection is not None
        try:
            send(self._connection, question)
            answer = receive(self._connection)
        except OSError:
            answer = b""
        if not answer:
            self.stop()
            raise AssertionError(f"the ranks failed:\n{run.stderr[-4000:]}")
        found: dict[str, list[dict[str, Any]]] = orjson.loads(answer)
        return found

    def _start(self) -> Run:
        with socket.create_server(("localhost", 0)) as server:
            server.settimeout(PATIENCE)
            self._run = run = self._forks.begin(WORLD, "ranks_worker:serve", server.getsockname()[1])
            try:
                self._connection, _ = server.accept()
            except TimeoutError:
                self.stop()
                raise AssertionError(f"the ranks did not start:\n{run.stderr[-4000:]}") from None
            self._connection.settimeout(PATIENCE)
        return run

    def stop(self) -> None:
        """Closes the connection, on which the ranks end, and kills ranks that hang."""
        if self._connection is not None:
            self._connection.close()
        if self._run is not None:
            self._forks.end(self._run)
        self._run = self._connection = None


@pytest.fixture(scope="module")
def ranks(forks: Forks) -> Iterator[Ranks]:
    world = Ranks(forks)
    yield world
    world.stop()


# Strategies

responses = st.builds(
    Response,
    prompt_tokens=st.integers(1, 3),
    spans=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    filtered=st.sampled_from([False, False, False, True]),
    reward=st.sampled_from([0.0, 1.0, -1.0, 0.5]),
)
kls = st.one_of(
    st.just(NoKL()),
    st.builds(KL, kind=st.sampled_from(["k1", "k2", "k3"]), beta=st.just(0.3)),
    st.builds(UnbiasedKL, beta=st.just(0.3)),
    st.builds(KL, kind=st.sampled_from(["k1", "k2", "k3"]), place=st.just("reward"), beta=st.just(0.1)),
)
group_estimators = st.builds(
    GroupAdvantage,
    baseline=st.sampled_from(["mean", "leave-one-out", "none"]),
    std=st.sampled_from(["population", "sample", "none"]),
)


def by_token(correction: CorrectionConfig) -> bool:
    return isinstance(correction, IcePop) or (isinstance(correction, Tis) and correction.level == "token")


@st.composite
def objectives(draw: st.DrawFn, mini_batches: int) -> tuple[ObjectiveConfig, bool]:
    """Draws a preset with some settings changed, and train.recompute_old_logprobs. Draws no refused combination."""
    config = FAMILY[draw(st.sampled_from(NAMES))]
    update: dict[str, Any] = {"kl": draw(kls)}
    if draw(st.booleans()):
        update["aggregation"] = draw(st.sampled_from([name for name in AGGREGATIONS if name != "constant-length"]))
    elif draw(st.booleans()):
        update |= {"aggregation": "constant-length", "constant_length": 7}
    if draw(st.booleans()):
        update["correction"] = draw(st.sampled_from(CORRECTIONS))
    if draw(st.booleans()):
        update["denominator"] = draw(st.sampled_from(["old", "rollout"]))
    if config.advantage.estimator == "group" and draw(st.booleans()):
        update["advantage"] = draw(group_estimators)
    if config.centering is not None:  # which weighs tokens by a function of pi_theta/mu alone
        update["denominator"] = "rollout"
        update["correction"] = draw(st.sampled_from([NoCorrection(), *filter(by_token, CORRECTIONS)]))
    config = config.model_copy(update=update)
    recompute = draw(st.booleans())
    if mini_batches > 1 and (config.denominator == "old" or config.clip.kind == "mask"):
        recompute = True
    if config.correction.kind == "mis" and (config.denominator == "rollout" or not recompute):
        config = config.model_copy(update={"correction": NoCorrection()})
    return config, recompute


@st.composite
def examples(draw: st.DrawFn) -> Example:
    mini_batches, per_step = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    groups = []
    for _ in range(mini_batches):
        step = [draw(st.lists(responses, min_size=1, max_size=4)) for _ in range(per_step)]
        missing = max(REPLICAS - sum(map(len, step)), 0)
        step[-1] += draw(st.lists(responses, min_size=missing, max_size=missing))
        groups += step
    objective, recompute = draw(objectives(mini_batches))
    drift, mismatch = draw(st.sampled_from([0.3, 0.002, 0.0])), draw(st.sampled_from([0.5, 0.0]))
    seed = draw(st.integers(0, 10**6))
    return made(groups, mini_batches, objective, recompute, draw(st.integers(1, 60)), seed, drift, mismatch)


def made(
    groups: list[list[Response]],
    mini_batches: int,
    objective: ObjectiveConfig,
    recompute: bool = True,
    max_tokens: int = 16,
    seed: int = 0,
    drift: float = 0.3,
    mismatch: float = 0.5,
) -> Example:
    """Builds an example, with max_tokens doubled until every layout can be planned."""
    drawn = Example(
        groups_of=tuple(map(tuple, groups)),
        mini_batches=mini_batches,
        objective=objective.model_dump(),
        recompute=recompute,
        max_tokens=max_tokens,
        seed=seed,
        tables=tables(groups, seed, drift, mismatch),
        tops=top_tables(groups, seed, drift),
    )
    while not all(fits(drawn, dp, align) for dp, align in ((1, 1), (4, 1), (2, 4), (1, 8))):
        drawn = dataclasses.replace(drawn, max_tokens=2 * drawn.max_tokens)
    return drawn


def fits(drawn: Example, dp: int, align: int) -> bool:
    rows = []
    for leader in range(dp):
        for group in drawn.groups(shuffled=True, leader=leader, leaders=dp):
            for sample in group.samples:
                index = group.index * drawn.config().rollout.group_size + sample.index
                rows.append((index, group.index, len(sample.token_ids), sample.response_tokens, leader))
    rows.sort()
    sizes, home = [SampleSize(*row[:4]) for row in rows], [row[4] for row in rows]
    try:
        plan(sizes, mini_batches=drawn.mini_batches, dp=dp, max_tokens=drawn.max_tokens, align=align, home=home)
    except ScheduleError:
        return False
    return True


# Checks


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares the results of one network in one optimizer step."""
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-9, abs=1e-9)
    assert found["metrics"]["loss"] == pytest.approx(found["loss"], rel=1e-9, abs=1e-9)
    gradient = np.array(expected["gradient"])
    np.testing.assert_allclose(found["gradient"], gradient, rtol=1e-9, atol=1e-9 * np.abs(gradient).max())
    assert ("top_gradient" in found) == ("top_gradient" in expected)
    if "top_gradient" in expected:
        np.testing.assert_allclose(found["top_gradient"], expected["top_gradient"], rtol=1e-9, atol=1e-12)
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name in expected["metrics"]:
        here, there = (summed(name, each["metrics"]) for each in (found, expected))
        assert here == pytest.approx(there, rel=1e-9, abs=1e-9), name


def summed(name: str, metrics: dict[str, float]) -> float:
    """Returns the metric, or the mean square instead of a standard deviation.

    Ranks add up mean squares. Subtracting the squared mean and taking the root would lose digits.
    """
    tail, _, statistic = name.rpartition("/")
    return metrics[name] ** 2 + metrics[f"{tail}/mean"] ** 2 if statistic == "std" else metrics[name]


def sequences_of(drawn: Example) -> list[list[TrainedSequence]]:
    """Returns the reference's sequences of each mini-batch, with masked-in tokens only."""
    config = drawn.config().objective

    def penalty(response: Any) -> np.ndarray:
        if config.kl.kind == "none" or config.kl.place == "loss":
            return np.zeros(len(response.ids))
        # If pi_old is the update's own forward pass, it is not known yet: use mu, which sampled the tokens.
        sampled = response.columns["old" if drawn.recompute else "rollout"]
        return config.kl.beta * kl_estimate(config.kl.kind, response.columns["reference"], sampled)

    if config.advantage.estimator == "gae":
        advantages: Any = generalised_advantages_of(drawn, penalty)[0]
    else:
        advantages = group_advantages_of(drawn, penalty)
    return [
        [
            TrainedSequence(
                logprobs=response.columns["theta"],
                old=response.columns["old"],
                rollout=response.columns["rollout"],
                entropy=np.zeros(len(response.ids)),
                mask=np.ones(len(response.ids), dtype=bool),
                advantage=advantage,
                reference=response.columns["reference"],
                prompt=response.group,
                top=response.top,
                top_rollout=response.top_rollout,
            )
            for response, advantage in zip(step, part, strict=True)
        ]
        for step, part in zip(trained(drawn), advantages, strict=True)
    ]


def assert_is_the_formula(answer: list[dict[str, Any]], drawn: Example) -> None:
    """Compares policy results with the formula. The tolerance is 1e-6 because packed advantages are float32."""
    config, lags = drawn.config().objective, drawn.lags()
    for found, sequences, step in zip(answer, sequences_of(drawn), trained(drawn), strict=True):
        loss, gradient = reference(sequences, config)
        size = np.abs(gradient).max(initial=0)
        assert found["policy"]["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6 * max(size, 1e-3))
        by_token = np.array(found["policy"]["gradient"])
        ids = np.concatenate([response.ids for response in step])
        np.testing.assert_allclose(by_token[ids], gradient, rtol=1e-6, atol=1e-6 * size + 1e-9)
        assert not np.delete(by_token, ids).any(), "a token outside the loss mask has a gradient"
        assert_has_lags(found["policy"]["metrics"], [lags[token] for token in ids.tolist()])


def assert_has_lags(metrics: dict[str, float], lags: list[int]) -> None:
    for name, inside in (("0", {0}), ("1", {1}), ("2_3", {2, 3}), ("4_7", set())):
        if (key := f"mismatch/share/lag_{name}") in metrics:
            assert metrics[key] == pytest.approx(np.mean([lag in inside for lag in lags])), key


def assert_is_the_critics_formula(answer: list[dict[str, Any]], drawn: Example) -> None:
    def nothing(response: Any) -> np.ndarray:
        return np.zeros(len(response.ids))

    if drawn.config().critic is None or in_reward(drawn.config().objective):
        return
    _, returns = generalised_advantages_of(drawn, nothing)
    for found, targets, step in zip(answer, returns, trained(drawn), strict=True):
        tokens = sum(map(len, targets))
        losses: list[np.ndarray] = []
        gradient: dict[Any, Any] = {}
        for target, response in zip(targets, step, strict=True):
            value, old = response.columns["values"], response.columns["old_values"]
            free, held = value - target, np.clip(value, old - 0.2, old + 0.2) - target
            losses.append(np.maximum(free**2, held**2).sum() / 2)
            slope = np.where(free**2 >= held**2, free, 0) / max(tokens, 1)
            gradient |= dict(zip(response.ids.tolist(), slope.tolist(), strict=True))
        assert found["critic"]["loss"] == pytest.approx(sum(losses) / max(tokens, 1), rel=1e-9, abs=1e-9)
        assert dict(enumerate(found["critic"]["gradient"])) == pytest.approx(
            {token: gradient.get(token, 0.0) for token in range(len(found["critic"]["gradient"]))}, rel=1e-9, abs=1e-9
        )


def assert_first_is_exact(answer: list[dict[str, Any]], drawn: Example) -> None:
    """Checks that all ratios are exactly 1 and all clip fractions 0 if pi_theta is still pi_old."""
    if drawn.tables["theta"] != drawn.tables["old"] or not drawn.recompute:
        return
    for found in answer:
        metrics = found["policy"]["metrics"]
        ratios = ["ratio", "sequence_ratio"] if drawn.objective["denominator"] == "old" else ["ratio"]
        for ratio in ratios if metrics["tokens"] else []:
            assert {metrics[f"{ratio}/{name}"] for name in ("min", "p1", "p50", "p99", "max", "mean")} == {1.0}
        for name, value in metrics.items():
            if name.startswith("clip/") and (drawn.objective["denominator"] == "old"):
                assert value == 0, name


def check(ranks: Ranks, drawn: Example) -> None:
    answers = ranks.ask(drawn.to_json())
    assert answers.keys() == {"whole", "alone", *LAYOUTS}
    for name, answer in answers.items():
        for found, expected in zip(answer, answers["whole"], strict=True):
            assert found.keys() == expected.keys()
            for network in expected:
                try:
                    assert_same(found[network], expected[network])
                except AssertionError as error:
                    raise AssertionError(f"{name}, {network}: {error}") from None
        assert_first_is_exact(answer, drawn)
    assert_is_the_formula(answers["whole"], drawn)
    assert_is_the_critics_formula(answers["whole"], drawn)


@pytest.mark.distributed
@settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(examples())
def test_results_do_not_depend_on_ranks_packing_micro_batches_or_order(ranks: Ranks, drawn: Example) -> None:
    check(ranks, drawn)


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_every_preset_gives_the_same_result_in_every_layout(ranks: Ranks, name: str) -> None:
    """Hypothesis may not draw every preset."""
    check(ranks, made(two_groups(), 1, FAMILY[name]))


@pytest.mark.distributed
def test_prompts_without_their_rejected_tokens_are_the_same_in_every_layout(ranks: Ranks) -> None:
    """The ranks count the tokens that a correction leaves to each prompt, whose responses are on several of them."""
    update = {"aggregation": "prompt-mean", "correction": Mis(low=0.8, high=1.3)}
    check(ranks, made([*two_groups(), *two_groups()], 2, FAMILY["grpo"].model_copy(update=update)))


def two_groups() -> list[list[Response]]:
    shapes = [(4,), (2, 3, 3), (), (1, 1), (3, 2), (4, 1, 2)]
    return [
        [Response(1 + i % 3, spans, filtered=i == 4, reward=float(i % 3 - 1)) for i, spans in enumerate(shapes[a:b])]
        for a, b in ((0, 2), (1, 6))
    ]
