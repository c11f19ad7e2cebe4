"""Weight syncs that send changed elements alone, to a real server."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from forks import Forks
from paths import SUPPORT
from safetensors.torch import load_file, save_file
from sync_worker import change_some
from tiny_models import make_tiny_model

from megatron_rl.rollout.client import SGLangClient

pytestmark = [pytest.mark.server, pytest.mark.distributed]


def checksum_of(url: str, model: Path) -> float:
    """The server's checksum, as syncs log it, once it has loaded the model by disk."""

    async def load() -> str:
        async with SGLangClient(url, deadline=60.0) as client:
            await client.update_weights_from_disk(str(model), weight_version=0)
            return await client.weights_checksum()

    return float(int(asyncio.run(load())[:12], 16))


@pytest.mark.parametrize("layout", [pytest.param("tp=1", marks=pytest.mark.slow), "tp=2,pp=2,ep=2"])
def test_a_server_holds_the_same_weights_after_changes_as_after_a_full_load(
    forks: Forks, served: str, tmp_path: Path, layout: str
) -> None:
    model = make_tiny_model(tmp_path / "model", seed=1)
    expected = [checksum_of(served, model)]
    for _ in range(2):  # the changes that the worker makes
        tensors = load_file(model / "model.safetensors")
        elements = change_some(tensors.values())
        model = make_tiny_model(tmp_path / f"model-{len(expected)}", seed=1)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        expected.append(checksum_of(served, model))
    ranks = 4 if "," in layout else 1
    arguments = ("changes", tmp_path / "model", served, layout, tmp_path / "weights")
    done = forks.run(SUPPORT / "sync_worker.py", *arguments, ranks=ranks, together=True)
    assert done.returncode == 0, done.stderr[-9000:]
    whole, changed, unchanged, behind = map(json.loads, re.findall(r"\{[^{}]*bytes[^{}]*\}", done.stdout))
    found = [report["weights/checksum"] for report in (whole, changed, unchanged, behind)]
    assert found == [expected[0], expected[1], expected[1], expected[2]]
    assert changed["weights/changed"] == pytest.approx(1 / 16, rel=0.2)
    changed_bytes = changed["weights/changed"] * elements * 4
    assert changed["weights/bytes"] - unchanged["weights/bytes"] < 1.2 * changed_bytes
    assert unchanged["weights/changed"] == 0
    # A server with another version than the last gets all weights.
    assert "weights/changed" not in whole
    assert "weights/changed" not in behind
    # The first sync of each kind is verified.
    assert ["weights/probe_max_abs_diff" in report for report in (whole, changed, unchanged)] == [True, True, False]
