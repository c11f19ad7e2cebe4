"""Many data-parallel leaders on many servers: independent leaders keep all servers busy. The servers are HTTP alone;
they answer after random times."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import orjson
import pytest
from sampled_groups import make_prompts
from tiny_models import VOCAB_SIZE

from megatron_rl.data.sample import Prompt
from megatron_rl.data.versions import Versions
from megatron_rl.rollout.client import RefusedError, SGLangClient
from megatron_rl.rollout.fleet import Fleet
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups
from megatron_rl.rollout.source import first_server

TOKENS = 4
SAMPLING = Sampling(8, TOKENS, 1.0, VOCAB_SIZE, Versions(0), seed=0)


class FakeServer:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.requests = 0

    async def __aenter__(self) -> FakeServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")]
        asked = orjson.loads(await reader.readexactly(length))
        self.requests += 1
        await asyncio.sleep(self._random.uniform(0.0, 0.02))
        meta = {
            "finish_reason": {"type": "length"},
            "prompt_tokens": len(asked["input_ids"]),
            "completion_tokens": TOKENS,
            "output_token_logprobs": [[-1.0, 3, None]] * TOKENS,
            "weight_versions": [{"version": "0", "start": 0, "end": TOKENS}],
        }
        content = orjson.dumps({"text": "", "output_ids": [3] * TOKENS, "meta_info": meta})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(content) + content)
        await writer.drain()
        writer.close()


@pytest.mark.parametrize(
    ("leaders", "groups", "servers", "concurrency"),
    [(32, 2, 16, 64), pytest.param(32, 3, 16, 8, marks=pytest.mark.slow)],
)
def test_no_server_is_idle_or_has_much_more_to_do_than_others(
    leaders: int, groups: int, servers: int, concurrency: int
) -> None:
    async def run() -> list[int]:
        async with AsyncExitStack() as stack:
            fakes = [await stack.enter_async_context(FakeServer(seed)) for seed in range(servers)]
            rollouts = []
            for dp in range(leaders):
                first = first_server(dp, leaders, servers)
                urls = [fake.url for fake in (*fakes[first:], *fakes[:first])]
                clients = [await stack.enter_async_context(SGLangClient(url)) for url in urls]
                sampler = Sampler(Fleet(clients), concurrency)
                rollouts.append(rollout_groups(sampler, make_prompts(groups, first=groups * dp), SAMPLING))
            for sampled in await asyncio.gather(*rollouts):
                assert all(len(group.samples) == SAMPLING.samples for group in sampled)
            return [fake.requests for fake in fakes]

    counts = asyncio.run(run())
    mean = leaders * groups * SAMPLING.samples / servers
    assert sum(counts) == mean * servers
    assert min(counts) > 0
    assert max(counts) <= 1.3 * mean


def test_a_prompt_with_unknown_tokens_ejects_no_server() -> None:
    async def run() -> Fleet:
        async with SGLangClient("http://127.0.0.1:1") as one, SGLangClient("http://127.0.0.1:2") as other:
            fleet = Fleet([one, other])
            prompts = [(0, Prompt("a", "", (VOCAB_SIZE,), "", ""))]
            with pytest.raises(RefusedError, match=f"input_ids: found .{VOCAB_SIZE}.; expected: ids in"):
                await rollout_groups(Sampler(fleet, 4), prompts, SAMPLING)
            return fleet

    assert len(asyncio.run(run()).live) == 2
