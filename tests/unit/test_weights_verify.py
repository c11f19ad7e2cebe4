"""How a weight sync detects wrong weights and waits for servers, tested without a server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_rl.config.schema import WeightsConfig
from megatron_rl.data.versions import VersionSpan
from megatron_rl.models.architecture import read_architecture
from megatron_rl.rollout.answers import Completion, RolloutError
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.deadlines import Deadlines
from megatron_rl.weights.all_servers import AllServers, WeightSyncError, wait_for
from megatron_rl.weights.collective import CollectiveRoute, _cut, _listen, _open_sockets
from megatron_rl.weights.directory import DiskRoute
from megatron_rl.weights.sync import bound_of, checksum
from megatron_rl.weights.verify import Asked, SampledAnswer, ask_servers, check_checksums, verify

RNG = np.random.default_rng(0)
EXPECTED = [-3.0 * RNG.random(9).astype(np.float32) for _ in range(2)]
SAMPLED = [-2.0 * RNG.random(9).astype(np.float32) for _ in range(2)]
RESPONSE = 6  # of the nine tokens


def asked(scored: float = 0.0, sampled: float = 0.0, one_token: float = 0.0, **changes: Any) -> Asked:
    """Answers of two servers. The second differs by these amounts, on all tokens or on one sampled token."""
    answers = []
    for url, off, logprobs in (("a", 0.0, SAMPLED[0]), ("b", sampled, SAMPLED[1])):
        served = (logprobs[-RESPONSE:] - off).tolist()
        served[0] -= one_token
        answers.append(SampledAnswer(url, [0] * 10, served))
    scores = {"a": [e.tolist() for e in EXPECTED], "b": [(e - scored).tolist() for e in EXPECTED]}
    return Asked(
        **{
            "scores": scores,
            "answers": answers,
            "checksums": {"a": "x", "b": "x"},
            "forms": {"a": (1, "float32"), "b": (1, "float32")},
            "are_exact": True,
            **changes,
        }
    )


def check(found: Asked, bound: float = 0.1, temperature: float = 1.0) -> None:
    verify(found, EXPECTED, SAMPLED, bound, temperature)


def test_differences_from_rounding_pass() -> None:
    check(asked())
    check(asked(scored=0.09, sampled=0.09))
    check(asked(one_token=0.4))  # in bf16 one token may go to other experts
    check(asked(scored=9e-6, sampled=9e-6), bound=1e-5)
    check(asked(sampled=0.19), temperature=0.5)  # dividing logits by .5 doubles their rounding


@pytest.mark.parametrize(
    ("found", "bound", "message"),
    [
        (asked(scored=0.3), 0.1, "b: log-probs of the probe differ from the trainer's by up to 0.3"),
        (asked(scored=float("nan")), 0.1, "b: log-probs of the probe differ"),
        (asked(scored=2e-5), 1e-5, "b: log-probs of the probe differ"),
        (asked(sampled=1.06), 0.1, "b: log-probs of what it sampled at rollout.temperature 1 differ .* the mean"),
        (asked(sampled=float("nan")), 0.1, "b: log-probs of what it sampled"),
        (asked(sampled=2e-5), 1e-5, "b: log-probs of what it sampled"),
        (asked(checksums={"a": "x", "b": "y"}), 0.1, "servers hold different weights, by checksum"),
    ],
)
def test_the_error_names_a_server_with_larger_differences(found: Asked, bound: float, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        check(found, bound)


def test_a_hot_temperature_does_not_tighten_the_bound() -> None:
    check(asked(sampled=0.09), temperature=2.0)


def test_the_default_bound_allows_bf16_servers_with_an_fp32_engine() -> None:
    unset = WeightsConfig()
    assert (bound_of(unset, exact=True), bound_of(unset, exact=False)) == (1e-5, 0.1)
    assert bound_of(WeightsConfig(verify_bound=0.3), exact=True) == 0.3


@pytest.mark.parametrize("form", [(2, "float32"), (1, "bfloat16")])
def test_checksums_are_compared_among_servers_with_the_same_tp_and_dtype(form: tuple[int, str]) -> None:
    """SGLang's checksum of equal weights depends on tensor parallelism and dtype."""
    check(asked(checksums={"a": "x", "b": "y"}, forms={"a": (1, "float32"), "b": form}))
    with pytest.raises(WeightSyncError, match="different weights"):
        check(asked(checksums={"a": "x", "b": "y"}, forms={"a": form, "b": form}))


def test_the_error_names_the_key_that_allows_coarser_kernels() -> None:
    for found in (asked(scored=0.3), asked(sampled=0.3)):
        with pytest.raises(WeightSyncError, match=r"raise weights\.verify_bound"):
            check(found)


class Served:
    """A client with only the methods that a verification calls; its first `aborts` answers are aborted and empty."""

    url, deadline = "http://a:1", 10.0

    def __init__(self, aborts: int = 0, **info: Any) -> None:
        self.deadlines = Deadlines()
        self.aborts, self.info = aborts, {"tp_size": 1, "dtype": "float32", "device": "cpu", **info}

    async def generate(self, token_ids: Sequence[int], **given: Any) -> Completion:
        self.aborts -= 1
        if self.aborts >= 0:
            return Completion((), (), "abort", (), "")
        return Completion((5,), (-1.0,), "stop", (VersionSpan(1, 0, 1),), "")

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return [-1.0] * (len(token_ids) - 1)

    async def weights_checksum(self) -> str:
        return "x"

    async def server_info(self) -> dict[str, Any]:
        return self.info


def ask(served: Served, directory: Path) -> Asked:
    return asyncio.run(ask_servers([served], read_architecture(directory), 1.0, 1))  # type: ignore[list-item]


def test_every_server_samples_for_the_verification(tiny_model_dir: Path) -> None:
    servers = [Served() for _ in range(6)]
    for number, server in enumerate(servers):
        server.url = f"http://a:{number}"
    found = asyncio.run(ask_servers(servers, read_architecture(tiny_model_dir), 1.0, 1))  # type: ignore[arg-type]
    assert {answer.url for answer in found.answers} == {server.url for server in servers}


def test_aborted_answers_are_retried_until_the_error_names_the_server(tiny_model_dir: Path) -> None:
    assert [answer.logprobs for answer in ask(Served(aborts=2), tiny_model_dir).answers] == [[-1.0]] * 4
    with pytest.raises(RolloutError, match=r"^http://a:1: .*the server aborted it 3 times"):
        ask(Served(aborts=99), tiny_model_dir)


@pytest.mark.parametrize(
    ("info", "exact"), [({}, True), ({"device": "cuda"}, False), ({"dtype": "bfloat16"}, False), ({"tp_size": 2}, True)]
)
def test_only_fp32_on_a_cpu_is_exact(tiny_model_dir: Path, info: dict[str, Any], exact: bool) -> None:
    found = ask(Served(**info), tiny_model_dir)
    assert found.are_exact is exact
    assert found.forms == {"http://a:1": (info.get("tp_size", 1), info.get("dtype", "float32"))}


class Holds:
    """A client of a server with these weights."""

    def __init__(self, url: str, checksum: str) -> None:
        self.url, self.checksum = url, checksum

    async def weights_checksum(self) -> str:
        return self.checksum

    async def server_info(self) -> dict[str, Any]:
        return {"tp_size": 1, "dtype": "float32"}


def test_servers_that_differ_after_a_sync_are_an_error() -> None:
    loop = BackgroundLoop()
    alike, other = [Holds(url, 16 * "a") for url in ("http://a:1", "http://b:1")], Holds("http://c:1", 16 * "c")
    assert checksum(AllServers(alike, loop, 60.0)) == int(12 * "a", 16)  # type: ignore[arg-type]
    with pytest.raises(WeightSyncError, match="servers hold different weights, by checksum"):
        checksum(AllServers([*alike, other], loop, 60.0))  # type: ignore[list-item]
    loop.close()


# ---- waiting


def test_a_refusal_ends_the_wait_for_the_other_servers() -> None:
    waiting, refused = Future[None](), Future[None]()
    refused.set_exception(RolloutError("http://b:1/x: status 400: no"))
    start = time.monotonic()
    with pytest.raises(WeightSyncError, match="weight sync: http://b:1/x: status 400: no"):
        wait_for([waiting, refused], 60.0, ["a", "b"])
    assert time.monotonic() - start < 30.0


def test_the_error_names_a_server_that_does_not_answer() -> None:
    done, waiting = Future[None](), Future[None]()
    done.set_result(None)
    with pytest.raises(WeightSyncError, match=r"no answer within weights.timeout, 0\.1 s, from http://b:1$"):
        wait_for([done, waiting], 0.1, ["http://a:1", "http://b:1"])


class Refusing:
    """A client with only the methods that joining a group calls."""

    url = "http://127.0.0.1:1"

    async def abandon_weight_update(self) -> None: ...

    async def server_info(self) -> dict[str, Any]:
        return {"tp_size": 1}

    async def init_weights_update_group(self, **given: Any) -> None:
        assert given["master_address"] == "127.0.0.1"
        raise RolloutError(f"{self.url}/init_weights_update_group: status 400: no such backend")


def test_a_server_that_refuses_to_join_is_an_error_at_once() -> None:
    """Otherwise our own rank would wait until weights.timeout."""
    loop = BackgroundLoop()
    servers = AllServers([Refusing()], loop, 60.0)  # type: ignore[list-item]
    routes = [CollectiveRoute(servers, torch.device("cpu")) for _ in range(2)]
    start = time.monotonic()
    for route in routes:
        with pytest.raises(WeightSyncError, match="init_weights_update_group: status 400: no such backend"):
            route.push([], 1)
        route.close()
    assert time.monotonic() - start < 30.0
    assert routes[0]._name != routes[1]._name
    loop.close()


class Joining(Refusing):
    """Notes where it was to join, and refuses once all have been told."""

    def __init__(self, number: int, tp: int, told: dict[int, tuple[int, int]]) -> None:
        self.url, self.tp = f"http://127.0.0.1:{number}", tp
        self.number, self.told = number, told

    async def server_info(self) -> dict[str, Any]:
        return {"tp_size": self.tp}

    async def init_weights_update_group(self, **given: Any) -> None:
        self.told[self.number] = given["rank_offset"], given["world_size"]
        await asyncio.sleep(0.2)
        raise RolloutError("no")


def test_the_ranks_of_several_servers_follow_each_other() -> None:
    """Rank 0 is the trainer's."""
    loop = BackgroundLoop()
    told: dict[int, tuple[int, int]] = {}
    clients: Any = [Joining(number, tp, told) for number, tp in ((1, 2), (2, 4), (3, 1))]
    with pytest.raises(WeightSyncError):
        CollectiveRoute(AllServers(clients, loop, 60.0), torch.device("cpu")).push([], 1)
    loop.close()
    assert told == {1: (1, 8), 2: (3, 8), 3: (7, 8)}


@pytest.mark.parametrize(
    ("addresses", "address"), [(["127.0.0.1"] * 2, "127.0.0.1"), (["127.0.0.1", "192.0.2.1"], "0.0.0.0")]
)
def test_the_rendezvous_listens_only_on_addresses_that_servers_need(addresses: list[str], address: str) -> None:
    """The rendezvous accepts commands from anyone who can reach it."""
    store = _listen(addresses, 3, timedelta(seconds=60))
    found = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.laddr.port == store.port and not c.raddr]
    assert found == [address]


class Reads:
    url = "http://127.0.0.1:1"

    async def update_weights_from_disk(self, model_path: str, *, weight_version: int) -> None:
        assert Path(model_path, "model.safetensors").is_file()


def disk_route(loop: BackgroundLoop, directory: Path, model: Path) -> DiskRoute:
    servers = AllServers([Reads()], loop, 60.0)  # type: ignore[list-item]
    return DiskRoute(servers, directory, model, torch.float32)


def test_a_run_resumed_from_an_older_step_keeps_the_versions_it_just_wrote(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    loop = BackgroundLoop()
    route = disk_route(loop, tmp_path, tiny_model_dir)
    weights = [list(load_file(tiny_model_dir / "model.safetensors").items())]
    kept = []
    for version in (5, 6, 7, 3, 4):
        assert route.push(weights, version).bytes > 100_000
        kept.append(sorted(int(path.name.removeprefix("version-")) for path in tmp_path.iterdir()))
    assert kept == [[5], [5, 6], [6, 7], [3], [3, 4]]
    loop.close()


def test_an_old_weight_version_that_cannot_be_removed_does_not_end_the_run(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **keywords: Any) -> None:
        raise OSError("stale file handle")

    loop = BackgroundLoop()
    route = disk_route(loop, tmp_path, tiny_model_dir)
    weights = [list(load_file(tiny_model_dir / "model.safetensors").items())]
    route.push(weights, 1)
    monkeypatch.setattr("os.rmdir", fails)
    assert route.push(weights, 3).bytes > 100_000
    loop.close()


def test_only_the_connected_sockets_of_the_group_are_closed() -> None:
    """Tried with gloo: closing these wakes a rank in a broadcast, and the listening socket must stay open."""
    before = _open_sockets()
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as one:
        other, _ = listening.accept()
        sockets = dict(_open_sockets().items() - before.items())
        assert len(sockets) == 3
        with other:
            reused = dict.fromkeys(sockets, "socket:[0]")
            _cut(reused)
            one.settimeout(5.0)
            other.sendall(b"x")
            assert one.recv(1) == b"x"
            _cut(sockets)
            assert one.recv(1) == b""
        with socket.create_connection(listening.getsockname(), timeout=5.0):
            listening.accept()[0].close()


@pytest.mark.parametrize(
    ("checksums", "odd"),
    [({"a": "x", "b": "y", "c": "x"}, ["b"]), ({"a": "x", "b": "y"}, []), ({"a": "x", "b": "y", "c": "z"}, [])],
)
def test_servers_that_differ_from_more_than_half_are_at_fault(checksums: dict[str, str], odd: list[str]) -> None:
    with pytest.raises(WeightSyncError) as caught:
        check_checksums(checksums, dict.fromkeys(checksums, (1, "float32")))
    assert caught.value.urls == odd
