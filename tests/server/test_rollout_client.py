"""The client against a real server, through a proxy that damages requests and answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import pytest
from fault_proxy import Fault, FaultProxy
from tiny_models import VOCAB_SIZE

from megatron_rl.data.versions import VersionSpan
from megatron_rl.rollout import client as client_module
from megatron_rl.rollout.client import Completion, RolloutError, SGLangClient
from megatron_rl.rollout.server import free_ports

pytestmark = pytest.mark.server
PROMPT = [5, 12, 6, 14, 9]
T = TypeVar("T")


def generate(client: SGLangClient, **changes: Any) -> Coroutine[Any, Any, Completion]:
    arguments: dict[str, Any] = {
        "token_ids": PROMPT,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "vocab_size": VOCAB_SIZE,
        "versions": frozenset({0}),
    }
    return client.generate(**{**arguments, **changes})


def through(
    url: str,
    *faults: Fault,
    call: Callable[[SGLangClient], Awaitable[T]] = generate,  # type: ignore[assignment]
    deadline: float = 20.0,
) -> tuple[T | BaseException, int]:
    """Calls through a proxy with these faults. Returns the answer or the error, and the number of requests."""

    async def run() -> tuple[T | BaseException, int]:
        async with FaultProxy(url, *faults) as proxy, SGLangClient(proxy.url, deadline=deadline) as client:
            try:
                return await call(client), len(proxy.seen)
            except RolloutError as error:
                return error, len(proxy.seen)

    return asyncio.run(run())


def test_mu_is_the_whole_distribution_whatever_a_models_defaults_say(served: str) -> None:
    """generation_config.json may have a top-p, and then the log-probs would not be those of the trained policy."""

    async def run() -> dict[str, Any]:
        async with FaultProxy(served) as proxy, SGLangClient(proxy.url, deadline=20.0) as client:
            await generate(client)
            sent: dict[str, Any] = proxy.seen[0][1]["sampling_params"]
            return sent

    neutral = {"top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    neutral |= {"frequency_penalty": 0, "presence_penalty": 0}
    assert asyncio.run(run()).items() >= neutral.items()


# ---- faults that are retried


@pytest.mark.parametrize(
    "fault",
    [Fault(drop=True), Fault(lose=True), Fault(status=502), Fault(status=503), Fault(status=504)],
    ids=["dropped", "answer lost", "502", "503", "504"],
)
def test_temporary_faults_are_retried(served: str, fault: Fault) -> None:
    answer, requests = through(served, fault, fault)
    assert isinstance(answer, Completion)
    assert requests == 3


def test_the_number_of_tries_is_limited(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "MAX_TRIES", 3)
    error, requests = through(served, *[Fault(status=503)] * 10)
    assert requests == 3
    assert "status 503; tried 3 times" in str(error)


def test_a_refused_connection_is_retried_until_the_server_listens(served: str) -> None:
    """A weight update is retried too, because the server cannot have seen the request."""
    (port,) = free_ports(1)

    async def run() -> None:
        async with SGLangClient(served) as open_before:
            await open_before.abandon_weight_update()  # of a trainer that a test before has killed
        async with SGLangClient(f"http://127.0.0.1:{port}", deadline=20.0) as client:
            first = asyncio.create_task(client.begin_weight_update())
            await asyncio.sleep(0.5)
            assert not first.done()
            async with FaultProxy(served, port=port):
                await first
                await client.end_weight_update()

    asyncio.run(run())


def test_no_retry_is_made_if_the_check_finds_the_server_dead(served: str) -> None:
    def check() -> None:
        raise RuntimeError("the process has ended")

    async def run() -> int:
        async with FaultProxy(served, Fault(drop=True)) as proxy, SGLangClient(proxy.url, check=check) as client:
            with pytest.raises(RuntimeError, match="the process has ended"):
                await generate(client)
            return len(proxy.seen)

    assert asyncio.run(run()) == 1


# ---- faults that are not retried


@pytest.mark.parametrize("status", [204, 302, 400, 401, 404, 422, 500])
def test_any_other_status_is_an_error_at_once(served: str, status: int) -> None:
    error, requests = through(served, Fault(status=status))
    assert requests == 1
    assert f"/generate: status {status}" in str(error)


@pytest.mark.parametrize("fault", [Fault(drop=True), Fault(lose=True), Fault(status=503)])
def test_a_weight_update_that_the_server_may_have_seen_is_not_retried(served: str, fault: Fault) -> None:
    error, requests = through(served, fault, call=lambda client: client.begin_weight_update())
    assert isinstance(error, RolloutError)
    assert requests == 1
    if fault.lose:
        through(served, call=lambda client: client.end_weight_update())


def test_the_deadline_covers_a_slow_answer_and_all_tries_together(served: str) -> None:
    for faults in [[Fault(delay=600.0)], [Fault(status=503)] * 100]:
        start = time.monotonic()
        error, _ = through(served, *faults, deadline=1.0)
        assert time.monotonic() - start < 15.0
        assert "no answer within 1 s" in str(error)
    assert "status 503" in str(error)  # from the earlier tries


def test_the_error_for_a_refusal_contains_the_servers_message(served: str) -> None:
    error, _ = through(served, call=lambda c: c.update_weights_from_disk("/no/such/model", weight_version=1))
    assert "/update_weights_from_disk: status 400" in str(error)
    assert "/no/such/model" in str(error)


# ---- answers


def meta(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["meta_info"]


def entry(answer: dict[str, Any], position: int) -> list[Any]:
    return meta(answer)["output_token_logprobs"][position]


def set_version(answer: dict[str, Any], **changes: Any) -> object:
    return meta(answer)["weight_versions"][0].update(changes)


def split_spans(answer: dict[str, Any], end: int, start: int) -> None:
    meta(answer)["weight_versions"] = [
        {"version": "0", "start": 0, "end": end},
        {"version": "0", "start": start, "end": 6},
    ]


BAD_ANSWERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a log-prob too few": (lambda a: meta(a)["output_token_logprobs"].pop(), "output_token_logprobs: found 5 entries"),
    "a token too few": (lambda a: a["output_ids"].pop(), "output_token_logprobs: found 6 entries"),
    "no log-probs": (lambda a: meta(a).pop("output_token_logprobs"), "output_token_logprobs: "),
    "log-prob null, as SGLang sends NaN": (lambda a: entry(a, 2).__setitem__(0, None), "output_token_logprobs.2.0: "),
    "log-prob as text": (lambda a: entry(a, 2).__setitem__(0, "NaN"), "output_token_logprobs.2.0: found 'NaN'"),
    "log-prob above 0": (lambda a: entry(a, 1).__setitem__(0, 0.01), "output_token_logprobs.1.0: found 0.01"),
    "a log-prob of another token": (lambda a: entry(a, 4).__setitem__(1, 99), "output_token_logprobs.4.1: found 99"),
    "an id outside of the vocabulary": (
        lambda a: a["output_ids"].__setitem__(3, VOCAB_SIZE) or entry(a, 3).__setitem__(1, VOCAB_SIZE),
        f"output_ids: token {VOCAB_SIZE} is not in the model's vocabulary of {VOCAB_SIZE}",
    ),
    "a negative id": (
        lambda a: a["output_ids"].__setitem__(3, -1) or entry(a, 3).__setitem__(1, -1),
        "output_ids: token -1 is not in the model's vocabulary",
    ),
    "an id that is no integer": (lambda a: a["output_ids"].__setitem__(0, 5.5), "output_ids.0: found 5.5"),
    "a malformed entry": (lambda a: meta(a)["output_token_logprobs"].__setitem__(0, [-1.0]), "output_token_logprobs.0"),
    "nothing sampled": (
        lambda a: a["output_ids"].clear() or meta(a)["output_token_logprobs"].clear(),
        "output_ids: found 0 tokens",
    ),
    "the last token is not the one that stopped it": (
        lambda a: meta(a)["finish_reason"].update(type="stop", matched=-7),
        "finish_reason.matched: found -7; expected: ",
    ),
    "cut off before the length asked for": (
        lambda a: (
            a["output_ids"].pop(),
            meta(a)["output_token_logprobs"].pop(),
            set_version(a, end=5),
            meta(a).update(completion_tokens=5),
        ),
        "finish_reason: found length after 5 tokens; expected: 6, as asked for",
    ),
    "an answer to a part of the prompt": (lambda a: meta(a).update(prompt_tokens=4), "prompt_tokens: found 4; exp"),
    "an unknown finish reason": (lambda a: meta(a)["finish_reason"].update(type="tired"), "found 'tired'"),
    "a version that was not published": (
        lambda a: set_version(a, version="41"),
        "weight_versions.0.version: found '41'",
    ),
    "a version that is no number": (lambda a: set_version(a, version="default"), "found 'default'"),
    "spans that begin late": (lambda a: set_version(a, start=1), "weight_versions.0: found tokens 1 to 6"),
    "spans that end early": (lambda a: set_version(a, end=5), "weight_versions: found spans up to token 5"),
    "spans with a gap": (lambda a: split_spans(a, end=2, start=3), "weight_versions.1: found tokens 3 to 6"),
    "spans that overlap": (lambda a: split_spans(a, end=4, start=3), "weight_versions.1: found tokens 3 to 6"),
    "no spans": (lambda a: meta(a).pop("weight_versions"), "weight_versions: "),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_is_an_error_at_once(served: str, name: str) -> None:
    change, expected = BAD_ANSWERS[name]
    error, requests = through(served, Fault(change=change), call=lambda c: generate(c, max_new_tokens=6, **GREEDY))
    assert isinstance(error, RolloutError)
    assert expected in str(error)
    assert "http://127.0.0.1" in str(error)
    assert "request " in str(error)
    assert requests == 1


GREEDY = {"temperature": 0.0}  # six tokens, none of which is the end of the sequence


def test_an_unmodified_answer_is_accepted(served: str) -> None:
    answer, _ = through(served, Fault(), call=lambda c: generate(c, max_new_tokens=6, **GREEDY))
    assert isinstance(answer, Completion)
    assert len(answer.token_ids) == len(answer.logprobs) == 6
    assert answer.finish_reason == "length"
    assert answer.versions == (VersionSpan(0, 0, 6),)


@pytest.mark.parametrize(
    "raw", [lambda content: content[:-20], lambda content: content.replace(b"[-", b"[NaN,-", 1), lambda _: b""]
)
def test_an_answer_that_is_not_json_is_an_error_at_once(served: str, raw: Callable[[bytes], bytes]) -> None:
    error, requests = through(served, Fault(raw=raw))
    assert "the answer is not JSON" in str(error)
    assert requests == 1


def test_an_answer_with_a_wrong_content_type_is_an_error_at_once(served: str) -> None:
    error, requests = through(served, Fault(content_type="text/html"))
    assert "/generate: found content of type 'text/html'" in str(error)
    assert requests == 1


def test_more_tokens_than_requested_are_an_error(served: str) -> None:
    async def run() -> None:
        def ask_for_more(answer: dict[str, Any]) -> None:
            answer["output_ids"] *= 2

        async with FaultProxy(served, Fault(change=ask_for_more)) as proxy, SGLangClient(proxy.url) as client:
            with pytest.raises(RolloutError, match="output_ids: found 12 tokens; expected: 1 to 6"):
                await generate(client, **GREEDY)

    asyncio.run(run())


def test_a_log_prob_that_rounding_puts_above_0_is_read_as_0(served: str) -> None:
    answer, _ = through(served, Fault(change=lambda a: entry(a, 0).__setitem__(0, 1e-7)))
    assert isinstance(answer, Completion)
    assert answer.logprobs[0] == 0.0


@pytest.mark.parametrize("ids", [[], [VOCAB_SIZE], [3, -1]])
def test_a_prompt_that_would_kill_the_server_is_not_sent(served: str, ids: list[int]) -> None:
    error, requests = through(served, call=lambda c: generate(c, token_ids=ids))
    assert "input_ids" in str(error)
    assert requests == 0


@pytest.mark.parametrize("change", [lambda entries: entries.pop(), lambda entries: entries[2].__setitem__(1, 7)])
def test_scores_for_tokens_that_were_not_sent_are_an_error(served: str, change: Callable[[list[Any]], Any]) -> None:
    fault = Fault(change=lambda a: change(meta(a)["input_token_logprobs"]))
    error, _ = through(served, fault, call=lambda c: c.score(PROMPT))
    assert "input_token_logprobs: found ids" in str(error)


# ---- the server's state


def test_the_client_controls_weight_version_pause_and_checksum(served: str) -> None:
    async def run() -> None:
        async with SGLangClient(served, deadline=30.0) as client:
            await client.health()
            assert (await client.server_info())["tp_size"] == 1
            before = await client.weights_checksum()
            await client.update_weight_version(5)
            assert (await client.model_info())["weight_version"] == "5"
            assert await client.weights_checksum() == before
            await client.flush_cache()
            with pytest.raises(RolloutError, match="expected: one that was published"):
                await generate(client)
            await client.pause_generation("retract")
            waiting = asyncio.create_task(generate(client, versions={5}))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            await client.continue_generation()
            assert (await waiting).versions[0].version == 5

    asyncio.run(run())


def test_a_response_sampled_during_an_update_has_a_span_for_each_weight_version(served: str) -> None:
    async def run(delay: float) -> Completion:
        async with SGLangClient(served, deadline=30.0) as client:
            await client.update_weight_version(0)
            answer = asyncio.create_task(generate(client, max_new_tokens=400, versions={0, 1}, **GREEDY))
            await asyncio.sleep(delay)
            await client.pause_generation("in_place")
            await client.update_weight_version(1)
            await client.continue_generation()
            return await answer

    # On a busy machine an update may come before the first token, or after the last one.
    answers = (asyncio.run(run(delay)) for delay in (0.2, 0.4, 0.8, 0.1, 1.6))
    answer = next(each for each in answers if len(each.versions) > 1)
    first, second = answer.versions
    assert (first.version, first.start, second.version, second.end) == (0, 0, 1, len(answer.token_ids))
    assert 0 < first.end == second.start
