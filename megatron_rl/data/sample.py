"""Prompts, samples and groups: the data that flows from the rollout to the schedule. Plain NumPy, no torch.

A Sample is only appended to: `Sample.start(prompt, index)`, then `extend(...)` once per span of tokens. The fields of a
span are checked against each other when it is appended, not at training time.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_rl.data.versions import VersionSpan

if TYPE_CHECKING:  # workers of verifiers import this module without pydantic and safetensors
    from megatron_rl.data.top_tokens import TopTokens
    from megatron_rl.data.trace import RoutingTrace

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One question, its reference answer, and the verifier that judges responses."""

    id: str  # unique in its data set; names the prompt in files and errors
    text: str
    token_ids: tuple[int, ...]
    answer: str  # the reference answer, as text
    verifier: str  # name of the function in megatron_rl.rewards that judges a response
    record: dict[str, Any] | None = field(default=None, compare=False)
    """All fields of the record as JSON has them, if the verifier asks for them. Not in saved rollouts."""


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one response. `correct` is for accuracy; `reward` may be shaped."""

    reward: float
    correct: bool
    lost: bool = False  # the verifier failed: the sample has no reward and is not trained on


LOST = Verdict(0.0, False, lost=True)


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt with one response.

    token_ids [n] int32, prompt and response; loss_mask [n] bool, True where the policy generated the token;
    rollout_logprobs [n] float32, log mu of each generated token, 0 where loss_mask is False.
    """

    prompt: Prompt
    index: int  # position of the sample in its group
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    rollout_logprobs: npt.NDArray[np.float32]
    versions: tuple[VersionSpan, ...] = ()
    finish_reason: FinishReason | None = None
    verdict: Verdict | None = None
    response: str | None = None  # the graded text; for people who read saved rollouts
    trace: RoutingTrace | None = None  # routes of the engine that sampled; covers the first trace.rows tokens
    top_tokens: TopTokens | None = None  # of mu, at each token of the response; for score centering

    @classmethod
    def start(cls, prompt: Prompt, index: int) -> Sample:
        n = len(prompt.token_ids)
        return cls(
            prompt=prompt,
            index=index,
            token_ids=np.asarray(prompt.token_ids, dtype=np.int32),
            loss_mask=np.zeros(n, dtype=np.bool_),
            rollout_logprobs=np.zeros(n, dtype=np.float32),
        )

    def extend(self, token_ids: list[int], logprobs: list[float] | None, weight_version: int) -> Sample:
        """Appends a span. `logprobs` is None for tokens that the policy did not generate (tool output).

        Raises ValueError if the lengths differ, or if a log-prob is positive or not finite.
        """
        where = f"prompt {self.prompt.id!r} sample {self.index}"
        if logprobs is not None:
            if len(logprobs) != len(token_ids):
                raise ValueError(f"{where}: {len(token_ids)} token ids but {len(logprobs)} log-probs")
            values = np.asarray(logprobs, dtype=np.float32)
            if not np.isfinite(values).all() or (values > 0).any():
                bad = int(np.flatnonzero(~np.isfinite(values) | (values > 0))[0])
                raise ValueError(f"{where}: log-prob {values[bad]} at response token {bad} is not a finite value <= 0")
        else:
            values = np.zeros(len(token_ids), dtype=np.float32)
        start, end = len(self.token_ids), len(self.token_ids) + len(token_ids)
        return dataclasses.replace(
            self,
            token_ids=np.concatenate([self.token_ids, np.asarray(token_ids, dtype=np.int32)]),
            loss_mask=np.concatenate([self.loss_mask, np.full(len(token_ids), logprobs is not None)]),
            rollout_logprobs=np.concatenate([self.rollout_logprobs, values]),
            versions=(*self.versions, VersionSpan(weight_version, start, end)),
        )

    def with_trace(self, trace: RoutingTrace) -> Sample:
        """The sample with a routing trace. Raises ValueError if the trace has more rows than the sample has tokens."""
        if trace.rows > len(self.token_ids):
            raise ValueError(
                f"prompt {self.prompt.id!r} sample {self.index}: a routing trace of {trace.rows} rows for "
                f"{len(self.token_ids)} tokens"
            )
        return dataclasses.replace(self, trace=trace)

    def with_top_tokens(self, top_tokens: TopTokens) -> Sample:
        """The sample with mu's most likely tokens. Raises ValueError unless they are those of each response token."""
        if len(top_tokens) != len(self.response_ids):
            raise ValueError(
                f"prompt {self.prompt.id!r} sample {self.index}: top tokens of {len(top_tokens)} tokens for a response "
                f"of {len(self.response_ids)}"
            )
        return dataclasses.replace(self, top_tokens=top_tokens)

    @property
    def response_ids(self) -> npt.NDArray[np.int32]:
        return self.token_ids[len(self.prompt.token_ids) :]

    @property
    def last_turn_ids(self) -> npt.NDArray[np.int32]:
        """What the policy generated last: the response, unless an environment answered parts of it."""
        others = np.flatnonzero(~self.loss_mask)
        return self.token_ids[others[-1] + 1 if len(others) else 0 :]

    @property
    def turns(self) -> int:
        """How often the policy generated tokens and then stopped."""
        return int(np.count_nonzero(np.diff(self.loss_mask.astype(np.int8), prepend=0) == 1))

    @property
    def response_tokens(self) -> int:
        """|y|: number of masked-in tokens, the response length in every formula."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, eq=False)
class Group:
    """The samples of one prompt. Groups may differ in size."""

    index: int  # position of the prompt in the rollout batch of all data-parallel ranks
    prompt: Prompt
    samples: tuple[Sample, ...] = field(default=())
