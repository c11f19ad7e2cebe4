"""Requests that a killed trainer has left on a server are ended."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from megatron_rl.rollout import abandon
from megatron_rl.rollout.client import SGLangClient

pytestmark = pytest.mark.server


def test_requests_of_ranks_that_ask_again_are_ended_too(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abandon, "FLUSH_SECONDS", 1)

    async def ask(others: httpx.AsyncClient) -> list[str]:
        sampling = {"max_new_tokens": 450, "ignore_eos": True}
        reasons = []
        for _ in range(2):
            answer = await others.post("/generate", json={"input_ids": [5, 6, 7], "sampling_params": sampling})
            reasons.append(answer.json()["meta_info"]["finish_reason"]["type"])
        return reasons

    async def run() -> list[list[str]]:
        async with (
            httpx.AsyncClient(base_url=served, timeout=120.0) as others,
            SGLangClient(served, deadline=60.0) as client,
        ):
            asked = [asyncio.ensure_future(ask(others)) for _ in range(64)]
            await asyncio.sleep(1.0)
            await abandon.abandon_requests(client)
            return await asyncio.gather(*asked)

    assert ["abort", "abort"] in asyncio.run(run())
