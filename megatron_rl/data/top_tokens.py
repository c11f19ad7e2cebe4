"""The most likely tokens of the policy that sampled, at each token of a response. Plain NumPy, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from megatron_rl.errors import UserError

ROUNDING = 1e-3
"""By how much the probabilities of a row may exceed 1, and the sampled token's log-prob differ from its entry."""


class TopTokensError(UserError, ValueError):
    """Arrays that are not the most likely tokens of a response. Names the row, what was found and what was expected."""


@dataclass(frozen=True, eq=False)
class TopTokens:
    """mu's k most likely tokens where each token of a response was sampled: 8 k bytes a token.

    ids [n, k] int32; logprobs [n, k] float32, log mu, at the sampling temperature. A token that is missing has log-prob
    -inf and id 0. All tokens of a row are missing if the policy did not generate the row's token.

    Raises TopTokensError if shapes or dtypes do not fit, or a row has a log-prob above 0, an id twice or below 0, or a
    probability above 1.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        found = (self.ids.dtype, self.ids.shape, self.logprobs.dtype, self.logprobs.shape)
        if self.ids.ndim != 2 or found != (np.int32, self.ids.shape, np.float32, self.ids.shape) or not self.k:
            raise TopTokensError(
                f"found ids {self.ids.dtype} {list(self.ids.shape)} and log-probs {self.logprobs.dtype} "
                f"{list(self.logprobs.shape)}; expected int32 and float32, [tokens, k] both"
            )
        self._check(np.isnan(self.logprobs) | (self.logprobs > 0), "log-probs of at most 0")
        present = np.isfinite(self.logprobs)
        self._check(present & (self.ids < 0), "ids of at least 0")
        ordered = np.sort(np.where(present, self.ids.astype(np.int64), -1 - np.arange(self.k)), axis=1)
        self._check(np.diff(ordered, axis=1) == 0, "different ids")
        mass = np.exp(self.logprobs, dtype=np.float64).sum(-1, keepdims=True)
        self._check(mass > 1 + ROUNDING, "probabilities of at most 1 in sum")

    @property
    def k(self) -> int:
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, other: TopTokens) -> TopTokens:
        return TopTokens(np.concatenate([self.ids, other.ids]), np.concatenate([self.logprobs, other.logprobs]))

    def after_missing(self, rows: int) -> TopTokens:
        """These rows after rows of tokens that the policy did not generate."""
        ids, logprobs = np.zeros((rows, self.k), np.int32), np.full((rows, self.k), -np.inf, np.float32)
        return TopTokens(ids, logprobs).append(self)

    def check_vocabulary(self, size: int) -> None:
        """Raises TopTokensError if an id is not in the vocabulary."""
        self._check(np.isfinite(self.logprobs) & (self.ids >= size), f"ids in [0, {size})")

    def check_sampled(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Raises TopTokensError if the sampled token of a row has another log-prob than its entry in the row."""
        if len(self) != len(token_ids):
            raise TopTokensError(f"found {len(self)} rows; expected {len(token_ids)}, one for each token")
        own = np.isfinite(self.logprobs) & (self.ids == np.asarray(token_ids, dtype=np.int64)[:, None])
        wrong = own & (np.abs(self.logprobs - np.asarray(logprobs, dtype=np.float32)[:, None]) > ROUNDING)
        self._check(wrong, "the sampled token's log-prob, as in its own entry")

    def _check(self, bad: npt.NDArray[np.bool_], expected: str) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad.any(axis=1))[0])
            ids, logprobs = self.ids[row, :4].tolist(), self.logprobs[row, :4].tolist()
            raise TopTokensError(f"token {row}: found ids {ids}..., log-probs {logprobs}...; expected {expected}")

    def to_bytes(self) -> bytes:
        return safetensors.numpy.save(
            {"ids": np.ascontiguousarray(self.ids), "logprobs": np.ascontiguousarray(self.logprobs)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> TopTokens:
        """Reads the bytes of `to_bytes`. Raises TopTokensError for any other bytes."""
        try:
            arrays = safetensors.numpy.load(data)
            ids, logprobs = arrays["ids"], arrays["logprobs"]
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TopTokensError(f"found {len(data)} bytes that are no top tokens ({error!r:.200})") from None
        return cls(ids, logprobs)
