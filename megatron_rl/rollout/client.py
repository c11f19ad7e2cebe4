"""The client of SGLang's HTTP API. Every call has a deadline, and every answer is checked.

A refused or broken connection and the statuses 429, 502, 503 and 504 are retried within the deadline, after as long as
the server says. Any other status, and an answer that contradicts itself, raises RolloutError at once. Weight updates
are retried only if the server cannot have seen them, because a second update would wait for a broadcast that is already
over. A server is told when nobody waits for its answer any more.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import httpx
import orjson
import tenacity

from megatron_rl.ranks.activity import Activity
from megatron_rl.rollout.answers import Completion, RolloutError, read_completion, read_score
from megatron_rl.rollout.deadlines import Deadlines
from megatron_rl.rollout.retries import HEALING_STATUS, Healing, seconds_of, told, wait_of
from megatron_rl.rollout.sglang_launch import ABANDONED
from megatron_rl.rollout.transport import IDLE_SECONDS, Connections
from megatron_rl.routing.wire import RouteSpec

MAX_TRIES = 8
CONNECT_SECONDS = 10.0
ABORT_SECONDS = 2.0

MemoryTag = Literal["weights", "kv_cache"]
_Body = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None


class RefusedError(RolloutError):
    """The server will not do what it was asked, and another one would not either: a status from 400 to 499."""


class UnreachableError(RolloutError):
    """The server could not be reached or gave no answer, after all retries."""


class SGLangClient:
    """Client of one server. Use it as an async context manager, or call `close`. Make all calls from one event loop."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline: float = 600.0,
        max_tries: int | None = None,
        idle_seconds: float = IDLE_SECONDS,
        check: Callable[[], None] = lambda: None,
        activity: Activity | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        """`deadline` is in seconds for one call, all its tries included; for generation, without the pauses that
        `deadlines` knows. `max_tries` defaults to MAX_TRIES.
        `idle_seconds`: how long an idle connection is kept; shorter than the server keeps it. `check` is
        called before each retry; it raises if a retry is useless, for example if the server's process has died.
        `activity` hears of requests and answers."""
        self.url = url.rstrip("/")
        self.deadline = deadline
        self.deadlines = deadlines or Deadlines()
        self._max_tries = max_tries
        self._api_key = api_key
        self._check = check
        self._aborts: set[asyncio.Task[None]] = set()
        self._activity = activity or Activity()
        self._http = httpx.AsyncClient(
            base_url=self.url,
            transport=Connections(idle_seconds),
            headers={"Content-Type": "application/json", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # the deadline bounds the rest
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._aborts:
            await asyncio.wait(self._aborts)
        await self._http.aclose()

    # ---- generation

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        vocab_size: int,
        versions: Container[int],
        seed: int | None = None,
        routes: RouteSpec | None = None,
        top_k: int = 0,
        stop: Sequence[int] = (),
    ) -> Completion:
        """Samples from the whole distribution of logits / temperature. Raises RolloutError.

        Temperature 0 is greedy; then the log-probs are untempered and are not mu. `versions` are the weight versions
        that the trainer has published.

        `seed`, in [0, 2**63), counts on a CPU, and on a GPU if the server runs with --enable-deterministic-inference.
        Then requests of one prompt with equal seeds all sample the same response.

        `routes` asks for the experts that each token visited; the server must have been started to return them. `top_k`
        asks for that many of mu's most likely tokens where each token was sampled; at most the vocabulary. Tokens of
        `stop` end the response, as the model's own do.
        """
        outside = [i for i in token_ids if not 0 <= i < vocab_size]
        if outside or not token_ids:  # an id without an embedding ends the scheduler, and with it the server
            raise RefusedError(f"{self.url}: input_ids: found {outside[:3]}; expected: ids in [0, {vocab_size})")
        sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "sampling_seed": seed,
            "skip_special_tokens": True,
            "stop_token_ids": list(stop),
            # mu must be the distribution of logits / temperature, whatever the defaults of the server or the model.
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
        }
        body = {"input_ids": list(token_ids), "sampling_params": sampling, "return_logprob": True}
        if routes is not None:
            body |= {"return_routed_experts": True, "routed_experts_start_len": 0}
        if top_k:
            # Arrays in base64, which are a quarter as long as lists of numbers.
            flat = ("return_flat_raw_output_top_logprobs", "return_flat_raw_top_logprobs_b64")
            body |= {"top_logprobs_num": top_k, **dict.fromkeys(flat, True)}
        answer = await self._generate(body)
        return read_completion(
            answer,
            where=self._request_name(answer),
            prompt_tokens=len(token_ids),
            max_new_tokens=max_new_tokens,
            vocab_size=vocab_size,
            versions=versions,
            routes=routes,
            top_k=top_k,
        )

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Untempered log-probs of tokens 1 and later, given the tokens before them. Raises RolloutError."""
        sampling = {"max_new_tokens": 0, "temperature": 0.0}
        answer = await self._call(
            "/generate",
            # From position 0: SGLang omits log-probs of tokens in the prefix cache unless asked for them.
            {
                "input_ids": list(token_ids),
                "sampling_params": sampling,
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        return read_score(answer, where=self._request_name(answer), token_ids=token_ids)

    async def _generate(self, body: Mapping[str, Any]) -> Any:
        """Sends a request under a name of its own, and aborts it if its answer is not awaited to the end."""
        names: list[str] = []

        def named() -> dict[str, Any]:  # anew for each try: the server may still know the one before
            names.append(uuid.uuid4().hex)
            return {**body, "rid": names[-1]}

        try:
            return await self._call("/generate", named)
        except (asyncio.CancelledError, UnreachableError):
            self._aborts.add(task := asyncio.ensure_future(self._abort(names)))
            task.add_done_callback(self._aborts.discard)
            raise

    async def _abort(self, names: Sequence[str]) -> None:
        with contextlib.suppress(RolloutError, Healing, TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                for name in names:
                    await self._once("POST", "/abort_request", orjson.dumps({"rid": name}))

    async def abort_requests(self) -> None:
        """Ends all requests in flight with their next token. Raises RolloutError."""
        await self._send("POST", "/abort_request", {"rid": "", "abort_all": True}, once=False)

    async def pause_generation(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """abort ends the requests in flight; retract and in_place keep them, without and with their KV cache."""
        await self._call("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        await self._call("/continue_generation", {})

    # ---- weights

    async def begin_weight_update(self) -> None:
        await self._call("/begin_weight_update", {}, once=True)

    async def end_weight_update(self) -> None:
        await self._call("/end_weight_update", {}, once=True)

    async def abandon_weight_update(self) -> None:
        """Ends an update that another trainer began and did not finish, if there is one."""
        try:
            await self._call("/end_weight_update", {"rid": ABANDONED}, once=True)
        except RolloutError as error:
            if "no weight-update session is open" not in str(error):
                raise

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
        """Returns once all `world_size` ranks have joined."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        await self._call("/init_weights_update_group", body, once=True)

    async def destroy_weights_update_group(self, *, group_name: str) -> None:
        await self._call("/destroy_weights_update_group", {"group_name": group_name}, once=True)

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
    ) -> None:
        """Returns once a tensor of bytes was broadcast; GPUs have loaded it. Cached prefixes and the version stay."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._call("/update_weights_from_distributed", body, once=True)

    async def update_weights_from_disk(self, model_path: str, *, weight_version: int) -> None:
        body = {"model_path": model_path, "weight_version": str(weight_version), "flush_cache": True}
        await self._call("/update_weights_from_disk", body)

    async def load_custom(self, *, loader: str, named_tensors: bytes, weight_version: int) -> None:
        """Has the server's `--custom-weight-loader` of this name load what SGLang unpickles, in each of its ranks."""
        tp_size = (await self.server_info())["tp_size"]
        body = {"load_format": loader, "flush_cache": True, "weight_version": str(weight_version)}
        await self._from_tensor([named_tensors] * tp_size, body)

    async def update_weights_from_tensor(self, *, payloads: Sequence[bytes]) -> None:
        """Loads a flattened bucket that each of the server's ranks unpickles from its own payload; its tensor is in
        memory that they share with the sender. Cached prefixes and weight version stay."""
        await self._from_tensor(payloads, {"load_format": "flattened_bucket", "flush_cache": False})

    async def _from_tensor(self, payloads: Sequence[bytes], settings: Mapping[str, Any]) -> None:
        encoded = [base64.b64encode(payload).decode() for payload in payloads]
        body = {"serialized_named_tensors": encoded, **settings}
        await self._call("/update_weights_from_tensor", body, once=True)

    async def update_weight_version(self, version: int | str) -> None:
        """Changes only the version; requests in flight continue. Ours are numbers; a new server has another."""
        await self._call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    async def weights_checksum(self) -> str:
        """One hash over all parameters of all ranks of the server."""
        answer = await self._call("/weights_checker", {"action": "checksum"})
        try:
            return str(answer["per_engine_checksum"])
        except (KeyError, TypeError):
            raise RolloutError(f"{self.url}/weights_checker: no per_engine_checksum in the answer") from None

    # ---- memory

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Frees memory of a GPU, of which the values are lost; the addresses stay. Call `pause_generation` first."""
        await self._call("/release_memory_occupation", {"tags": tags}, once=True)

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Takes memory again that was released. SGLang 0.5.23 ends if it holds it."""
        await self._call("/resume_memory_occupation", {"tags": tags}, once=True)

    # ---- state

    async def health(self) -> None:
        """Returns once the server has generated a token, after about a second. Raises RolloutError."""
        await self._send("GET", "/health", None, once=False)

    async def server_info(self) -> dict[str, Any]:
        """The server's settings, such as tp_size."""
        return await self._call("/server_info", None)

    async def model_info(self) -> dict[str, Any]:
        """The model's path and weight_version, among others."""
        return await self._call("/model_info", None)

    async def flush_cache(self, seconds: int = 0) -> None:
        """Empties the prefix cache. Raises RefusedError if requests are in flight after so many seconds."""
        await self._send("POST", f"/flush_cache?timeout={seconds}", {}, once=False)

    # ---- transport

    def _request_name(self, answer: Any) -> str:
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        return f"{self.url}: request {meta.get('id', '?') if isinstance(meta, dict) else '?'}"

    async def _call(self, path: str, body: _Body, *, once: bool = False) -> Any:
        """Sends GET without a body, else POST, and returns the answer's JSON. `once` allows no retry after a send."""
        answered = await self._send("GET" if body is None else "POST", path, body, once)
        kind = answered.headers.get("Content-Type", "none")
        if kind.partition(";")[0].strip().lower() != "application/json":
            found = f"found content of type {self._told(kind)!r:.80}: {self._told(answered.text)[:200]!r}"
            raise RolloutError(f"{self.url}{path}: {found}; expected: application/json")
        try:
            answer = orjson.loads(answered.content)
        except orjson.JSONDecodeError as error:
            content = self._told(answered.text)[:200]
            raise RolloutError(f"{self.url}{path}: the answer is not JSON ({error}): {content!r}") from None
        if isinstance(answer, dict) and answer.get("success") is False:
            raise RolloutError(f"{self.url}{path}: refused: {self._told(str(answer.get('message')))}")
        return answer

    async def _send(self, method: str, path: str, body: _Body, once: bool) -> httpx.Response:
        failures: list[str] = []

        async def attempt() -> httpx.Response:
            content = body() if callable(body) else body
            return await self._once(method, path, None if content is None else orjson.dumps(content))

        def note(state: tenacity.RetryCallState) -> None:
            failures.append(str(state.outcome.exception()) if state.outcome else "")
            self._check()

        def heals(error: BaseException) -> bool:
            return isinstance(error, Healing) and not (once and error.reached)

        retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(heals),
            stop=tenacity.stop_after_attempt(self._max_tries or MAX_TRIES),
            wait=wait_of,
            before_sleep=note,
            reraise=True,
        )
        try:
            generates = path == "/generate"
            async with self.deadlines.within(self.deadline) if generates else asyncio.timeout(self.deadline):
                with self._activity.owed_by(self.url):
                    return await retry(attempt)
        except Healing as error:
            self._check()
            raise UnreachableError(f"{self.url}{path}: {error}; tried {len(failures) + 1} times") from None
        except TimeoutError:
            before = f"; failures before: {', '.join(failures)}" if failures else ""
            raise UnreachableError(f"{self.url}{path}: no answer within {self.deadline:g} s{before}") from None

    async def _once(self, method: str, path: str, content: bytes | None) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, content=content)
        except httpx.DecodingError as error:
            raise RolloutError(f"{self.url}{path}: the answer is damaged: {error}") from None
        except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            raise RolloutError(f"{self.url}{path}: cannot be asked: {error}") from None
        except httpx.TransportError as error:
            refused = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
            raise Healing(told(error), reached=not refused) from None
        if answer.status_code in HEALING_STATUS:
            wait = seconds_of(answer.headers.get("Retry-After", ""))
            raise Healing(f"status {answer.status_code}", reached=True, wait=wait)
        if answer.status_code != 200:
            kind = RefusedError if 400 <= answer.status_code < 500 else RolloutError
            raise kind(f"{self.url}{path}: status {answer.status_code}: {self._told(answer.text)[:500]}")
        return answer

    def _told(self, text: str) -> str:
        """The server's message without the key, which it may have repeated."""
        return text.replace(self._api_key, "***") if self._api_key else text
