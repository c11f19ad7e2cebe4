"""SGLang's HTTP API as the trainer speaks it: every call has a deadline, every answer is checked.

What can heal is tried again within the deadline: a refused, broken or timed-out connection, and 502, 503, 504. Nothing
else is: a 4xx, or an answer that does not hold together, raises RolloutError at once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import orjson
import tenacity

from megatron_rl.data.sample import FinishReason, VersionSpan
from megatron_rl.errors import UserError

MAX_TRIES = 8
HEALING_STATUS = frozenset({502, 503, 504})
ROUNDING = 1e-6
"""A log-prob may exceed 0 by so much in fp32; it is then taken for 0."""


class RolloutError(UserError):
    """A server's answer that cannot be used; names server, request, field, what was found and expected."""


class _Healing(Exception):
    """A failure worth another try."""


@dataclass(frozen=True)
class Completion:
    """One checked answer. The end-of-sequence token, where one was sampled, is the last of token_ids."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the sampled tokens, at the sampling temperature
    finish_reason: FinishReason
    versions: tuple[VersionSpan, ...]  # over token_ids
    text: str


class SGLangClient:
    """One server. Use as an async context manager, or call `close`."""

    def __init__(
        self, url: str, *, api_key: str | None = None, deadline: float = 600.0, connections: int = 512
    ) -> None:
        """deadline: seconds for one call, all tries together."""
        self.url = url.rstrip("/")
        self.deadline = deadline
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # ---- generation

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        vocab_size: int,
        versions: frozenset[int],
    ) -> Completion:
        """Samples from the whole distribution at logits / temperature (0: greedy): no top-p, no top-k, so that the
        returned log-probs are those of mu. `versions` are the weight versions that the trainer has published."""
        sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "skip_special_tokens": True,
        }
        answer = await self._post(
            "/generate",
            {"input_ids": list(token_ids), "sampling_params": sampling, "return_logprob": True},
        )
        return self._completion(answer, vocab_size, versions)

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Untempered log-probs of tokens 1.. given those before."""
        # With a cached prefix SGLang would not compute the log-probs of its tokens; asking from 0 makes it.
        answer = await self._post(
            "/generate",
            {
                "input_ids": list(token_ids),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        found = self._field(answer, "meta_info", "input_token_logprobs")
        ids = [entry[1] for entry in found]
        # SGLang 0.5.23 reports the vocabulary's last id as 0 here; the log-prob is the right token's.
        if len(ids) != len(token_ids) or any(i not in (sent, 0) for i, sent in zip(ids, token_ids, strict=True)):
            raise self._bad(answer, "input_token_logprobs", f"ids {ids[:8]}...", "the ids that were sent")
        return self._checked_logprobs(answer, "input_token_logprobs", [entry[0] for entry in found[1:]])

    # ---- weights

    async def begin_weight_update(self) -> None:
        await self._control("/begin_weight_update")

    async def end_weight_update(self) -> None:
        await self._control("/end_weight_update")

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        await self._control(
            "/init_weights_update_group",
            {
                "master_address": master_address,
                "master_port": master_port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    async def destroy_weights_update_group(self, *, group_name: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": group_name})

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        load_format: str | None,
        flush_cache: bool,
        weight_version: int | None,
    ) -> None:
        """Answers once the weights have been broadcast and loaded."""
        await self._control(
            "/update_weights_from_distributed",
            {
                "names": list(names),
                "dtypes": list(dtypes),
                "shapes": [list(shape) for shape in shapes],
                "group_name": group_name,
                "load_format": load_format,
                "flush_cache": flush_cache,
                "weight_version": None if weight_version is None else str(weight_version),
            },
        )

    async def update_weights_from_disk(self, model_path: str, *, weight_version: int) -> None:
        await self._control(
            "/update_weights_from_disk",
            {"model_path": model_path, "weight_version": str(weight_version), "flush_cache": True},
        )

    async def weights_checksum(self) -> str:
        """One hash over all parameters of all the server's ranks."""
        answer = await self._control("/weights_checker", {"action": "checksum"})
        return str(self._field(answer, "per_engine_checksum"))

    # ---- state

    async def server_info(self) -> dict[str, Any]:
        return await self._get("/server_info")

    async def model_info(self) -> dict[str, Any]:
        return await self._get("/model_info")

    async def flush_cache(self) -> None:
        await self._request("POST", "/flush_cache", {})

    # ---- checks

    def _completion(self, answer: Any, vocab_size: int, versions: frozenset[int]) -> Completion:
        ids = self._field(answer, "output_ids")
        entries = self._field(answer, "meta_info", "output_token_logprobs")
        reason = self._field(answer, "meta_info", "finish_reason", "type")
        if reason not in ("stop", "length", "abort"):
            raise self._bad(answer, "finish_reason", repr(reason), "stop, length or abort")
        if len(ids) != len(entries):
            raise self._bad(answer, "output_token_logprobs", f"{len(entries)} entries", f"{len(ids)}, as output_ids")
        if [entry[1] for entry in entries] != ids:
            raise self._bad(answer, "output_token_logprobs", "other token ids", "those of output_ids")
        outside = [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]
        if outside:
            raise self._bad(answer, "output_ids", repr(outside[0]), f"ids in [0, {vocab_size})")
        logprobs = self._checked_logprobs(answer, "output_token_logprobs", [entry[0] for entry in entries])
        spans = self._spans(answer, len(ids), versions)
        return Completion(tuple(ids), tuple(logprobs), reason, spans, str(answer.get("text", "")))

    def _checked_logprobs(self, answer: Any, field: str, values: Sequence[Any]) -> list[float]:
        for position, value in enumerate(values):
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value > ROUNDING:
                raise self._bad(answer, f"{field}[{position}]", repr(value), "a finite log-prob <= 0")
        return [min(float(value), 0.0) for value in values]

    def _spans(self, answer: Any, tokens: int, versions: frozenset[int]) -> tuple[VersionSpan, ...]:
        spans = []
        end = 0
        for entry in self._field(answer, "meta_info", "weight_versions"):
            if entry["start"] != end or entry["end"] < end:
                raise self._bad(answer, "weight_versions", repr(entry), f"a span that starts at {end}")
            end = entry["end"]
            version = entry["version"]
            if not str(version).isdigit() or int(version) not in versions:
                raise self._bad(answer, "weight_versions", repr(version), f"one of {sorted(versions)}")
            if entry["end"] > entry["start"]:
                spans.append(VersionSpan(int(version), entry["start"], entry["end"]))
        if end != tokens:
            raise self._bad(answer, "weight_versions", f"spans up to {end}", f"up to {tokens}")
        return tuple(spans)

    def _field(self, answer: Any, *path: str) -> Any:
        value = answer
        for key in path:
            if not isinstance(value, dict) or key not in value:
                raise self._bad(answer, ".".join(path), "no such field", "it to be there")
            value = value[key]
        return value

    def _bad(self, answer: Any, field: str, found: str, expected: str) -> RolloutError:
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        request = meta.get("id", "?") if isinstance(meta, dict) else "?"
        return RolloutError(f"{self.url}: request {request}: {field}: found {found}, expected {expected}")

    # ---- transport

    async def _control(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Tried once: a second weight update would wait for a broadcast that has already been made."""
        answer = self._json(path, await self._request("POST", path, body or {}, tries=1))
        if isinstance(answer, dict) and answer.get("success") is False:
            raise RolloutError(f"{self.url}{path}: refused: {answer.get('message')}")
        return answer

    async def _get(self, path: str) -> dict[str, Any]:
        return self._json(path, await self._request("GET", path, None))

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._json(path, await self._request("POST", path, body))

    def _json(self, path: str, content: bytes) -> Any:
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            raise RolloutError(f"{self.url}{path}: the answer is not JSON ({error}): {content[:200]!r}") from None

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None, tries: int = MAX_TRIES) -> bytes:
        retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Healing),
            stop=tenacity.stop_after_attempt(tries),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10.0),
            reraise=True,
        )
        try:
            async with asyncio.timeout(self.deadline):
                return await retry(self._once, method, path, body)
        except _Healing as error:
            raise RolloutError(f"{self.url}{path}: {error}; tried {tries} times") from None
        except TimeoutError:
            raise RolloutError(f"{self.url}{path}: no answer within the deadline of {self.deadline:g} s") from None

    async def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        content = None if body is None else orjson.dumps(body)
        try:
            answer = await self._http.request(
                method, path, content=content, headers={"Content-Type": "application/json"}
            )
        except httpx.TransportError as error:
            raise _Healing(f"{type(error).__name__} {error}".strip()) from None
        if answer.status_code in HEALING_STATUS:
            raise _Healing(f"status {answer.status_code}")
        if answer.status_code >= 400:
            raise RolloutError(f"{self.url}{path}: status {answer.status_code}: {answer.text[:500]}")
        return answer.content
