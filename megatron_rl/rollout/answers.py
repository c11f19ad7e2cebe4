"""Checks a server's answer to /generate field by field before anything is trained on it. Pure functions.

SGLang's conventions, seen on 0.5.23: if an end-of-sequence token was sampled, output_ids ends with it and the log-probs
include it, but `text` omits it. Log-probs are of logits / temperature. Weight versions are strings; ours are decimal
numbers, and their spans count output tokens. A log-prob that is not a number arrives as null.
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
from pydantic import BaseModel, Field, StrictFloat, StrictInt, StrictStr

from megatron_rl.data.sample import FinishReason
from megatron_rl.data.top_tokens import TopTokens
from megatron_rl.data.trace import RoutingTrace, TraceError
from megatron_rl.data.versions import VersionSpan, first_spans
from megatron_rl.data.vocabulary import unknown_token
from megatron_rl.errors import UserError
from megatron_rl.routing.wire import SERVER_FLAG, RouteSpec, read_routes

ROUNDING = 1e-6
"""Largest log-prob that counts as 0: SGLang takes the log of a probability that fp32 may round to just above 1."""

VERSION = re.compile("0|[1-9][0-9]{0,17}")

# The trainer keeps log-probs in fp32, in which a lower one would become -inf.
_LogProb = Annotated[StrictFloat, Field(ge=float(np.finfo(np.float32).min), le=ROUNDING, allow_inf_nan=False)]
# (log-prob, token id, text or null)
_Entry = tuple[_LogProb, StrictInt, Any]


class RolloutError(UserError):
    """A server's answer cannot be used. Names server, request and field, what was found and what was expected."""


@dataclass(frozen=True)
class Completion:
    """One checked answer. If an end-of-sequence token was sampled, it is the last of token_ids."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # by sampled token, at the sampling temperature
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]  # over token_ids
    text: str
    trace: RoutingTrace | None = (
        None  # of prompt and completion, without the last token; None: not asked for, or aborted
    )
    top_tokens: TopTokens | None = None  # at each token; None: not asked for, or aborted
    speculative: bool = False  # whether some passes of the server may have sampled several tokens

    def without_last(self) -> Completion:
        """The answer without its last token, and without the row of the pass that sampled it."""
        count, trace, top = len(self.token_ids) - 1, self.trace, self.top_tokens
        return dataclasses.replace(
            self,
            token_ids=self.token_ids[:-1],
            logprobs=self.logprobs[:-1],
            versions=first_spans(self.versions, count),
            trace=None if trace is None else trace.head(trace.rows - 1),
            top_tokens=None if top is None else TopTokens(top.ids[:-1], top.logprobs[:-1]),
        )


class _Finish(BaseModel):
    type: Literal["stop", "length", "abort"]
    matched: Any = None  # the token that ended a "stop"


class _TokenSpan(BaseModel):
    version: StrictStr
    start: StrictInt
    end: StrictInt


class _Meta(BaseModel):
    """A request that is aborted while it waits has an answer without the fields that default to nothing here."""

    finish_reason: _Finish
    prompt_tokens: StrictInt | None = None
    completion_tokens: StrictInt | None = None
    output_token_logprobs: list[_Entry] = []
    weight_versions: list[_TokenSpan] = []
    num_retractions: StrictInt = 0
    routed_experts: StrictStr | None = None
    spec_verify_ct: StrictInt = 0  # passes of speculative decoding
    # SGLang's output_top_logprobs as arrays [rows, k], little-endian
    output_top_logprobs_shape: tuple[StrictInt, StrictInt] | None = None
    output_top_logprobs_val_flat_b64: StrictStr | None = None
    output_top_logprobs_idx_flat_b64: StrictStr | None = None


class _Answer(BaseModel):
    text: StrictStr
    output_ids: list[StrictInt]
    meta_info: _Meta


class _ScoreMeta(BaseModel):
    prompt_tokens: StrictInt
    input_token_logprobs: list[tuple[Any, StrictInt, Any]] = Field(min_length=1)


class _Score(BaseModel):
    meta_info: _ScoreMeta


def read_completion(
    answer: Any,
    *,
    where: str,
    prompt_tokens: int,
    max_new_tokens: int,
    vocab_size: int,
    versions: Container[int],
    routes: RouteSpec | None = None,
    top_k: int = 0,
) -> Completion:
    """Reads and checks one answer.

    `where` names server and request in errors. `versions` are the weight versions that the trainer has published. Pass
    `routes` if the request asked for routes, and `top_k` if it asked for that many likely tokens. Raises RolloutError.
    Only an aborted answer may be empty or lack routes or likely tokens.
    """
    checked: _Answer = _parse(_Answer, answer, where)
    ids, meta = checked.output_ids, checked.meta_info
    reason, entries = meta.finish_reason, meta.output_token_logprobs
    least = 0 if reason.type == "abort" else 1
    if not least <= len(ids) <= max_new_tokens:
        raise _bad(where, "output_ids", f"{len(ids)} tokens", f"{least} to {max_new_tokens}")
    if len(entries) != len(ids):
        raise _bad(where, "output_token_logprobs", f"{len(entries)} entries", f"{len(ids)}, as in output_ids")
    unknown = unknown_token(ids, vocab_size)
    if unknown:
        raise RolloutError(f"{where}: output_ids: {unknown}")
    for position, (token, (_, scored, _)) in enumerate(zip(ids, entries, strict=True)):
        if scored != token:
            raise _bad(where, f"output_token_logprobs.{position}.1", repr(scored), f"{token}, as in output_ids")
    if reason.type != "abort":
        _check_end(reason, meta, ids, prompt_tokens, max_new_tokens, where)
    spans = _spans(meta.weight_versions, len(ids), versions, where)
    logprobs = tuple(min(logprob, 0.0) for logprob, _, _ in entries)
    return Completion(
        token_ids=tuple(ids),
        logprobs=logprobs,
        finish_reason=reason.type,
        versions=spans,
        text=checked.text,
        trace=None if routes is None else _trace(meta, routes, prompt_tokens, spans, where),
        top_tokens=_top_tokens(meta, ids, logprobs, top_k, vocab_size, where) if top_k else None,
        speculative=meta.spec_verify_ct > 0,
    )


def _check_end(
    reason: _Finish, meta: _Meta, ids: Sequence[int], prompt_tokens: int, max_new_tokens: int, where: str
) -> None:
    """Raises RolloutError unless the response answers the whole prompt and ended as it claims."""
    if meta.prompt_tokens != prompt_tokens:
        raise _bad(where, "prompt_tokens", str(meta.prompt_tokens), f"{prompt_tokens}, as sent")
    if meta.completion_tokens != len(ids):
        raise _bad(where, "completion_tokens", str(meta.completion_tokens), f"{len(ids)}, as in output_ids")
    if reason.type == "length" and len(ids) != max_new_tokens:
        # The server cut the response off. It would look like a finished one, and no reward would check its length.
        expected = (
            f"{max_new_tokens}, as asked for; is the server's context or its KV cache (max_total_tokens) smaller?"
        )
        raise _bad(where, "finish_reason", f"length after {len(ids)} tokens", expected)
    if reason.type == "stop" and (type(reason.matched) is not int or ids[-1] != reason.matched):
        # We send no stop strings, but SGLang reports one if logits are not numbers. The last token must be the matched
        # one, or nothing would teach the policy to stop.
        expected = f"{ids[-1]}, the last of output_ids"
        raise _bad(where, "finish_reason.matched", f"{reason.matched!r:.80}", expected)


def _trace(
    meta: _Meta, routes: RouteSpec, prompt: int, versions: Sequence[VersionSpan], where: str
) -> RoutingTrace | None:
    if meta.finish_reason.type == "abort" and (meta.routed_experts is None or not versions):
        return None
    if meta.routed_experts is None:
        raise _bad(where, "routed_experts", "none", f"routes; was the server started with {SERVER_FLAG}?")
    try:
        return read_routes(
            meta.routed_experts, routes, prompt=prompt, versions=versions, retracted=meta.num_retractions > 0
        )
    except TraceError as error:
        raise RolloutError(f"{where}: routed_experts: {error}") from None


def _top_tokens(
    meta: _Meta, ids: Sequence[int], logprobs: Sequence[float], k: int, vocab_size: int, where: str
) -> TopTokens | None:
    field = "output_top_logprobs"
    shape, values, tokens = (
        meta.output_top_logprobs_shape,
        meta.output_top_logprobs_val_flat_b64,
        meta.output_top_logprobs_idx_flat_b64,
    )
    if shape is None or values is None or tokens is None:
        if meta.finish_reason.type == "abort":
            return None
        raise _bad(
            where, field, "none", f"the {k} likeliest tokens as flat arrays; is the server SGLang 0.5.23 or later?"
        )
    if shape != (len(ids), k):
        raise _bad(where, f"{field}_shape", str(list(shape)), f"[{len(ids)}, {k}]")
    try:
        data = [base64.b64decode(each, validate=True) for each in (tokens, values)]
        found = TopTokens(
            np.frombuffer(data[0], dtype="<i4").reshape(shape).astype(np.int32),
            _without_rounding(np.frombuffer(data[1], dtype="<f4").reshape(shape).astype(np.float32)),
        )
        found.check_vocabulary(vocab_size)
        found.check_sampled(ids, logprobs)
    except ValueError as error:
        raise RolloutError(f"{where}: {field}: {error}") from None
    return found


def _without_rounding(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.where((logprobs > 0) & (logprobs <= ROUNDING), np.float32(0), logprobs)


def read_score(answer: Any, *, where: str, token_ids: Sequence[int]) -> list[float]:
    """Log-probs of tokens 1 and later of the prompt `token_ids`; the first token has none. Raises RolloutError."""
    meta = _parse(_Score, answer, where).meta_info
    if meta.prompt_tokens != len(token_ids):
        raise _bad(where, "prompt_tokens", str(meta.prompt_tokens), f"{len(token_ids)}, as sent")
    entries = meta.input_token_logprobs
    found = [token for _, token, _ in entries]
    # SGLang reports the vocabulary's last id as 0 here, but the log-prob belongs to the right token.
    if len(found) != len(token_ids) or any(f not in (t, 0) for f, t in zip(found, token_ids, strict=True)):
        raise _bad(where, "input_token_logprobs", f"ids {found[:8]}...", f"{list(token_ids)[:8]}..., as sent")
    scored = _parse(_Scored, {"input_token_logprobs": entries[1:]}, where)
    return [min(logprob, 0.0) for logprob, _, _ in scored.input_token_logprobs]


class _Scored(BaseModel):
    input_token_logprobs: list[_Entry]


def _spans(spans: Sequence[_TokenSpan], tokens: int, versions: Container[int], where: str) -> tuple[VersionSpan, ...]:
    """Reads the spans; they must be consecutive and cover all tokens."""
    end = 0
    for number, span in enumerate(spans):
        field = f"weight_versions.{number}"
        if span.start != end or span.end < span.start:
            raise _bad(where, field, f"tokens {span.start} to {span.end}", f"a span that starts at {end}")
        if not VERSION.fullmatch(span.version) or int(span.version) not in versions:
            raise _bad(where, f"{field}.version", f"{span.version!r:.80}", f"one that was published: {versions}")
        end = span.end
    if end != tokens:
        raise _bad(where, "weight_versions", f"spans up to token {end}", f"up to {tokens}")
    return tuple(VersionSpan(int(s.version), s.start, s.end) for s in spans if s.end > s.start)


def _parse(model: type[Any], answer: Any, where: str) -> Any:
    try:
        return model.model_validate(answer)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"] if part != "meta_info") or "the answer"
        raise _bad(where, field, f"{first['input']!r:.80}", first["msg"]) from None


def _bad(where: str, field: str, found: str, expected: str) -> RolloutError:
    return RolloutError(f"{where}: {field}: found {found}; expected: {expected}")
