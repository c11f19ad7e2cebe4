"""The questions that a server must answer, one function each. They return what was found, or raise."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_rl.config.bounds import LARGEST_INT
from megatron_rl.models.architecture import Architecture
from megatron_rl.rollout.answers import Completion, RolloutError
from megatron_rl.rollout.client import RefusedError, SGLangClient, UnreachableError
from megatron_rl.rollout.server_needs import CannotTell, CheckFailed, Needs
from megatron_rl.routing.wire import RouteSpec

ROUNDING = 0.1
"""Nats. Rounding to bf16 makes smaller differences in the mean, and log-probs of another temperature larger ones."""
BATCH, BATCH_TOKENS = 8, 16
SAMPLES = 24
"""Tokens sampled after one prompt, to compare their log-probs."""
LONG_TOKENS = 256
DROPPED_SECONDS = 1.0
"""Seconds in which a request must end after it was aborted."""
SMALL_VOCABULARY = 32
"""Ids below it are in every model's vocabulary; another id could end the server."""


class Prober:
    """Asks one server, which holds weight version `version`."""

    def __init__(self, client: SGLangClient, needs: Needs, version: int, longest: int) -> None:
        """`longest`: tokens of prompt and response that one request may have."""
        self._client = client
        self._needs = needs
        self._version = version
        self._vocab = needs.arch.vocab_size if needs.arch else None
        tokens = max(1, min(24, longest // 4))
        self._room = longest - tokens
        self._prompt = np.random.default_rng(0).integers(0, self._vocab or SMALL_VOCABULARY, tokens).tolist()

    async def scores(self) -> str:
        """Log-probs of given ids."""
        ids = self._prompt if len(self._prompt) > 1 else self._prompt * 2
        scores = await self._client.score(ids)
        return f"finite for {len(scores)} tokens, {np.mean(scores):.2f} in the mean"

    async def speed(self) -> str:
        start = time.monotonic()
        await self._sample(1)
        latency = time.monotonic() - start
        start = time.monotonic()
        answers = await asyncio.gather(*(self._sample(min(BATCH_TOKENS, self._room), seed=n) for n in range(BATCH)))
        seconds = time.monotonic() - start
        tokens = sum(len(answer.token_ids) for answer in answers)
        return f"one token takes {1000 * latency:.0f} ms; {tokens / seconds:.0f} tokens/s for {BATCH} short requests"

    async def mu(self) -> str:
        """Compares what is reported of sampled tokens with log-probs of the same tokens at temperature 1.

        Tokens that follow one prompt have the log-probs l/T + c under temperature T, with one c for all. So differences
        between two tokens tell whether T was used.
        """
        temperature = self._needs.temperature
        answers = await asyncio.gather(*(self._sample(1, temperature=temperature, seed=n) for n in range(SAMPLES)))
        sampled = {answer.token_ids[0]: answer.logprobs[0] for answer in answers}
        scores = await asyncio.gather(*(self._client.score([*self._prompt, token]) for token in sampled))
        reported = np.array(list(sampled.values()))
        scored = np.array([each[-1] for each in scores])
        spread = np.abs(scored - scored.mean()).mean()
        if spread * max(1.0, abs(1 / temperature - 1)) < 2 * ROUNDING:
            raise CannotTell(f"{SAMPLES} sampled tokens are as likely as each other, so that nothing can be compared")
        off, off_if_original = (_gap(reported, scored, each) for each in (temperature, 1.0))
        bound = ROUNDING / min(1.0, temperature)
        if off > bound:
            what = f"log-probs of tokens sampled at temperature {temperature:g} are {off:.2f} nats off in the mean"
            if off_if_original <= ROUNDING:
                raise CheckFailed(
                    f"{what}: they are those of temperature 1; start it without SGLANG_RETURN_ORIGINAL_LOGPROB=1"
                )
            raise CheckFailed(f"{what}; start it without logit processors of its own")
        return f"those of {len(sampled)} tokens sampled at temperature {temperature:g} are of that temperature"

    async def routes(self, arch: Architecture) -> str:
        spec = RouteSpec.of(arch)
        try:
            answer = await self._sample(2, routes=spec)
        except UnreachableError:
            raise
        except RolloutError as error:
            how = (
                "start it with --enable-return-routed-experts, and on a Blackwell GPU with --moe-runner-backend triton"
            )
            if self._needs.routes is None:
                raise CannotTell(f"not returned; for routing.replay r3 {how}") from None
            raise CheckFailed(f"{_said(error, self._client)}; {how}") from None
        rows = len(self._prompt) + len(answer.token_ids) - 1
        return f"{rows} rows of {len(spec.moe_layers)} layers and {spec.top_k} experts, as the model has"

    async def pausing(self) -> str:
        """Pauses with a request in flight, empties the cache, and goes on."""
        client = self._client
        long = self._start_long()
        await asyncio.sleep(0.1)
        start = time.monotonic()
        await client.pause_generation("retract")
        try:
            waits = "a request retracted" if not long.done() else "no request was in flight any more"
            short = asyncio.create_task(self._sample(1))
            await asyncio.sleep(0.3)
            if short.done():
                raise CheckFailed(
                    "a request was answered during the pause; is the URL one of several servers' gateway?"
                )
            await client.flush_cache()
        finally:
            await client.continue_generation()
        seconds = time.monotonic() - start
        await short
        await _drop(long)
        return f"{waits}, cache emptied, continued after {seconds:.1f} s"

    async def aborting(self) -> str:
        """Drops a long request, as a run does with what it does not need any more; an idle server lets its cache be
        emptied."""
        long = self._start_long()
        await asyncio.sleep(0.05)
        await _drop(long)
        start = time.monotonic()
        while True:
            try:
                await self._client.flush_cache()
            except RefusedError:
                if time.monotonic() - start > DROPPED_SECONDS:
                    raise CheckFailed(f"a request that was aborted still runs after {DROPPED_SECONDS:g} s") from None
                await asyncio.sleep(0.1)
            else:
                return f"the server is idle {time.monotonic() - start:.1f} s after a request of many tokens was aborted"

    def _start_long(self) -> asyncio.Task[Completion]:
        return asyncio.create_task(self._sample(min(LONG_TOKENS, self._room)))

    async def disk(self) -> str:
        """Has the server look for weights in an empty directory, which it must refuse before it changes any."""
        needed = self._needs.shared
        try:
            with _empty_directory(needed) as directory:
                await self._client.update_weights_from_disk(str(directory), weight_version=self._version)
        except RolloutError as error:
            if "Cannot find any model weights" in str(error):
                return f"it looked into {directory.parent}, found no weights, and kept its own"
            if "status 400" not in str(error):
                raise
            if needed is None:
                return "it refused a directory that it does not see, and kept its own weights"
            raise CheckFailed(
                f"it does not see {directory.parent}, in which weights.route disk writes; mount the directory of "
                f"run_dir there, or set weights.route to collective ({_said(error, self._client)[:200]})"
            ) from None
        except OSError as error:
            raise CannotTell(f"no directory can be made for it: {error}") from None
        raise CheckFailed(f"it took the empty directory {directory} for weights; restart it before you use it")

    async def _sample(
        self,
        tokens: int,
        *,
        temperature: float = 1.0,
        seed: int = 0,
        routes: RouteSpec | None = None,
    ) -> Completion:
        return await self._client.generate(
            self._prompt,
            max_new_tokens=tokens,
            temperature=temperature,
            vocab_size=self._vocab or LARGEST_INT,
            versions=frozenset({self._version}),
            seed=seed,
            routes=routes,
        )


async def _drop(request: asyncio.Task[Completion]) -> None:
    """Lets the client abort the request, if it is still in flight."""
    request.cancel()
    await asyncio.wait([request])
    await asyncio.sleep(0.1)


def _gap(reported: np.ndarray, scored: np.ndarray, temperature: float) -> float:
    """Mean |difference| of reported log-probs and scored ones at the temperature, up to a constant for all tokens."""
    difference = reported - scored / temperature
    return float(np.abs(difference - np.median(difference)).mean())


def _said(error: Exception, client: SGLangClient) -> str:
    return str(error).removeprefix(client.url).lstrip(":/ ")


@contextlib.contextmanager
def _empty_directory(run_dir: Path | None) -> Iterator[Path]:
    """An empty directory for a moment, beside the future run directory or in it. Raises OSError."""
    parent = None
    if run_dir is not None:
        parent = next(path for path in [run_dir.absolute(), *run_dir.absolute().parents] if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".megatron-rl-doctor-", dir=parent) as directory:
        yield Path(directory)
