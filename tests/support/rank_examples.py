"""Rollout batches that hypothesis draws for tests on several ranks, and their float64 NumPy reference. Without torch.

Every token of an example has a unique id, so a table from ids to numbers can replace a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.top_tokens import TopTokens

WEIGHT_VERSION = 3
"""Of pi_old; the responses are of this version and of those before it."""
TOP_K, TOP_VOCABULARY = 3, 6
"""Of the tokens among which mu's most likely ones are."""


@dataclass(frozen=True)
class Response:
    """Lengths of a response's spans, alternately generated and observed. With `filtered`, all tokens are masked out."""

    prompt_tokens: int
    spans: tuple[int, ...]
    filtered: bool
    reward: float

    @property
    def mask(self) -> np.ndarray:
        """[n] loss mask of prompt and response."""
        turns = [np.full(length, number % 2 == 0 and not self.filtered) for number, length in enumerate(self.spans)]
        return np.concatenate([np.zeros(self.prompt_tokens, dtype=bool), *turns])


@dataclass(frozen=True)
class Example:
    groups_of: tuple[tuple[Response, ...], ...]
    mini_batches: int
    objective: dict[str, Any]
    recompute: bool
    """train.recompute_old_logprobs"""
    max_tokens: int
    seed: int
    """Seed of the order of samples and groups, and of the leaders that hold them."""
    tables: dict[str, list[float | None]]
    """Numbers by token id; None outside the loss mask."""
    tops: dict[str, list[list[Any]]]
    """Rows by token id, for mu's most likely tokens where it was sampled: `ids` [TOP_K], `rollout` [TOP_K], log mu of
    them (None if missing), and `theta` [TOP_VOCABULARY], log pi_theta (None outside the loss mask)."""

    def to_json(self) -> bytes:
        return orjson.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> Example:
        fields = orjson.loads(data)
        groups = [tuple(Response(**each) for each in group) for group in fields.pop("groups_of")]
        return cls(groups_of=tuple(groups), **fields)

    def config(self) -> Any:
        """Returns the part of a Config that the called functions read."""
        objective = ObjectiveConfig.model_validate(self.objective)
        return SimpleNamespace(
            objective=objective,
            rollout=SimpleNamespace(group_size=max(map(len, self.groups_of))),
            train=SimpleNamespace(mini_batches=self.mini_batches, recompute_old_logprobs=self.recompute),
            critic=SimpleNamespace(clip=0.2) if objective.advantage.estimator == "gae" else None,
        )

    def token_ids(self) -> list[list[np.ndarray]]:
        """Returns the token ids of each response of each group."""
        ends = np.cumsum([len(response.mask) for group in self.groups_of for response in group])
        ids = iter(np.split(np.arange(ends[-1]), ends[:-1]))
        return [[next(ids) for _ in group] for group in self.groups_of]

    def groups(self, *, shuffled: bool = False, leader: int = 0, leaders: int = 1) -> list[Group]:
        """Returns the groups that a leader holds.

        With `shuffled`, groups get new numbers within their mini-batch, samples get new numbers within their group, and
        the order changes.
        """
        rng = np.random.default_rng(self.seed)
        ids = self.token_ids()
        per_step = len(self.groups_of) // self.mini_batches
        made = []
        for step in range(self.mini_batches):
            numbers = rng.permutation(per_step) if shuffled else np.arange(per_step)
            for place, number in enumerate(numbers):
                source = step * per_step + place
                order = rng.permutation(len(ids[source])) if shuffled else np.arange(len(ids[source]))
                members = [
                    self._sample(self.groups_of[source][i], ids[source][i], index) for index, i in enumerate(order)
                ]
                made.append(Group(step * per_step + int(number), members[0].prompt, tuple(members)))
        homes = rng.integers(0, leaders, len(made))
        if shuffled:
            made = [made[i] for i in rng.permutation(len(made))]
        return [group for group, home in zip(made, homes, strict=True) if home == leader]

    def _sample(self, response: Response, ids: np.ndarray, index: int) -> Sample:
        n = response.prompt_tokens
        sample = Sample.start(Prompt("", "", tuple(ids[:n].tolist()), "", ""), index)
        rollout = np.array(self.tables["rollout"], dtype=np.float64)
        for number, length in enumerate(response.spans):
            span = ids[n : n + length]
            generated = number % 2 == 0 and not response.filtered
            version = (int(ids[0]) + number) % (WEIGHT_VERSION + 1)
            sample = sample.extend(span.tolist(), rollout[span].tolist() if generated else None, version)
            n += length
        sample = sample.with_top_tokens(self.top_tokens(ids[response.prompt_tokens :]))
        return dataclasses.replace(sample, verdict=Verdict(response.reward, response.reward > 0))

    def lags(self) -> dict[int, int]:
        """Returns how many weight versions before pi_old's each token of the responses was generated."""
        samples = [sample for group in self.groups() for sample in group.samples]
        return {
            int(token): WEIGHT_VERSION - span.version
            for sample in samples
            for span in sample.versions
            for token in sample.token_ids[span.start : span.end]
        }

    def top_tokens(self, ids: np.ndarray) -> TopTokens:
        """Returns mu's most likely tokens where each of the tokens `ids` was sampled."""
        logprobs = np.array(self.tops["rollout"], dtype=np.float64)[ids].reshape(-1, TOP_K)
        return TopTokens(
            np.array(self.tops["ids"], dtype=np.int32)[ids].reshape(-1, TOP_K),
            np.where(np.isnan(logprobs), -np.inf, logprobs).astype(np.float32),
        )


def tables(groups: list[list[Response]], seed: int, drift: float, mismatch: float) -> dict[str, list[float | None]]:
    """Draws log-probs of the four policies, and a critic's values.

    All are multiples of 2**-10: exact in float32, and so far from clip bounds that no finite difference crosses one.
    """
    mask = np.concatenate([response.mask for group in groups for response in group])
    rng = np.random.default_rng(seed)

    def normal(scale: float) -> np.ndarray:
        return np.round(scale * rng.normal(size=len(mask)) * 1024) / 1024

    old = -np.abs(normal(1.0))
    old_values = normal(0.5)
    numbers = {
        "old": old,
        "theta": old + normal(drift),
        "rollout": np.minimum(old + normal(mismatch), 0),
        "reference": old + normal(0.4),
        "old_values": old_values,
        "values": old_values + normal(0.3),
    }
    return {
        name: [float(value) if inside else None for value, inside in zip(each, mask, strict=True)]
        for name, each in numbers.items()
    }


def top_tables(groups: list[list[Response]], seed: int, drift: float) -> dict[str, list[list[Any]]]:
    """Draws mu's most likely tokens; every fourth token has one that is missing."""
    mask = np.concatenate([response.mask for group in groups for response in group])
    rng = np.random.default_rng([seed, 1])
    n = len(mask)
    ids = rng.permuted(np.tile(np.arange(TOP_VOCABULARY), (n, 1)), axis=1)[:, :TOP_K]
    rollout = -1.25 - np.round(np.abs(rng.normal(size=(n, TOP_K))) * 1024) / 1024
    theta = -2.5 - drift * rng.random(size=(n, TOP_VOCABULARY))
    np.put_along_axis(theta, ids, rollout + np.round(drift * rng.normal(size=(n, TOP_K)) * 256) / 1024, axis=1)
    rows = [[float(value) for value in row] for row in rollout]
    for row in rows[::4]:
        row[-1] = None  # type: ignore[call-overload]
    theta_rows = [row.tolist() if inside else [None] * TOP_VOCABULARY for row, inside in zip(theta, mask, strict=True)]
    return {"ids": ids.tolist(), "rollout": rows, "theta": theta_rows}


@dataclass(frozen=True, eq=False)
class Trained:
    """The masked-in tokens of a response, for the formulas; arrays are [|y|]."""

    group: int
    ids: np.ndarray
    reward: float
    columns: dict[str, np.ndarray]
    top: np.ndarray
    """[|y|, TOP_K] log pi_theta of mu's most likely tokens."""
    top_rollout: np.ndarray
    """[|y|, TOP_K] log mu of them."""


def trained(example: Example) -> list[list[Trained]]:
    """Returns all responses of each mini-batch; `old` is pi_old under the example's settings."""
    numbers = {name: np.array(each, dtype=np.float64) for name, each in example.tables.items()}
    if not example.recompute:
        numbers["old"] = numbers["theta" if example.mini_batches == 1 else "rollout"]
    steps: list[list[Trained]] = [[] for _ in range(example.mini_batches)]
    per_step = len(example.groups_of) // example.mini_batches
    for group, (responses, ids) in enumerate(zip(example.groups_of, example.token_ids(), strict=True)):
        for response, each in zip(responses, ids, strict=True):
            kept = each[response.mask]
            columns = {name: values[kept] for name, values in numbers.items()}
            likely = example.top_tokens(kept)
            theta = np.array(example.tops["theta"], dtype=np.float64)[kept]
            top = np.take_along_axis(theta, likely.ids.astype(np.int64), axis=1)
            trained = Trained(group, kept, response.reward, columns, top, likely.logprobs.astype(np.float64))
            steps[group // per_step].append(trained)
    return steps


Penalty = Callable[[Trained], np.ndarray]


def group_advantages_of(example: Example, penalty: Penalty) -> list[list[float]]:
    """Returns (R - b)/std of each response in its group, by mini-batch. R is reduced by its penalties."""
    config = example.config().objective.advantage
    steps = trained(example)
    rewards: dict[int, list[float]] = {}
    for response in (response for step in steps for response in step):
        rewards.setdefault(response.group, []).append(response.reward - penalty(response).sum())
    found = {}
    for group, values in rewards.items():
        mean, n = np.mean(values), len(values)
        others = [(sum(values) - value) / max(n - 1, 1) for value in values]
        baselines: dict[str, list[Any]] = {"mean": [mean] * n, "leave-one-out": others, "none": [0.0] * n}
        spread = 1.0 if config.std == "none" else np.std(values, ddof=int(config.std == "sample" and n > 1))
        dead = max(values) - min(values) < 1e-9 and (config.baseline, config.std) != ("none", "none")
        found[group] = [
            0.0 if dead else (r - b) / spread for r, b in zip(values, baselines[config.baseline], strict=True)
        ]
    queues = {group: iter(values) for group, values in found.items()}
    return [[next(queues[response.group]) for response in step] for step in steps]


def generalised_advantages_of(
    example: Example, penalty: Penalty
) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Returns advantages, normalised over all tokens of the batch, and returns; [|y|] by mini-batch and response."""
    config = example.config().objective.advantage
    decay = config.gamma * config.gae_lambda
    raw: list[list[np.ndarray]] = []
    returns: list[list[np.ndarray]] = []
    for step in trained(example):
        raw.append([])
        returns.append([])
        for response in step:
            values, n = response.columns["old_values"], len(response.ids)
            rewards = -penalty(response)
            rewards[-1:] += response.reward
            deltas = rewards + config.gamma * np.append(values[1:], 0.0)[:n] - values
            advantages = np.array([sum(decay ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)])
            raw[-1].append(advantages)
            returns[-1].append(advantages + values)
    everything = np.concatenate([each for step in raw for each in step])
    spread = np.std(everything, ddof=1) if len(everything) > 1 else 0.0
    if spread < 1e-9:
        return [[np.zeros(len(each)) for each in step] for step in raw], returns
    return [[(each - everything.mean()) / spread for each in step] for step in raw], returns
