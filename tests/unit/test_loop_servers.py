"""How a run connects to its rollout servers and disconnects. Nothing is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from megatron_rl.config.schema import Config
from megatron_rl.data.versions import Versions
from megatron_rl.loop import connections, parts
from megatron_rl.ranks.activity import Activity


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "run_dir": tmp_path / "run",
            "model": {"path": tmp_path},
            "data": {"train": "unused"},
            "train": {"steps": 1, "mini_batches": 1},
        }
    )


def test_leaders_start_with_servers_that_are_far_apart(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """If all leaders started with the first server, they would use only that one and the next ones."""
    urls = [f"http://127.0.0.1:{port}" for port in range(1000, 1008)]
    monkeypatch.setattr(connections, "broadcast_bytes", lambda *_: orjson.dumps([urls, "key"]))
    first = []
    for dp in range(4):
        place = SimpleNamespace(rank=dp + 1, dp=dp, leads_replica=True, control=None)
        journal = SimpleNamespace(activity=None)
        trainer: Any = SimpleNamespace(place=place, layout=SimpleNamespace(dp=4), journal=journal)
        with connections.connect(config, trainer) as servers:
            assert servers.pool is None
            assert servers.leader is not None
            assert sorted(client.url for client in servers.leader.clients) == urls
            assert {client._api_key for client in servers.leader.clients} == {"key"}
            first.append(servers.leader.clients[0].url)
    assert first == urls[::2]


@pytest.mark.parametrize("where", ["begins", "runs"])
def test_a_failed_run_leaves_its_servers_usable_for_the_next_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Closing the publisher tells servers that run elsewhere that this trainer has left."""
    told = []

    class Publisher:
        versions = Versions(0)

        def __init__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            told.append("closed")

    def begin() -> None:
        if where == "begins":
            raise OSError("the disk is gone")

    trainer: Any = SimpleNamespace(
        place=SimpleNamespace(control=None, dp=0, rank=0),
        networks=None,
        policy=SimpleNamespace(arch=SimpleNamespace(vocab_size=9)),
        run=SimpleNamespace(logs="logs", pending=Path("pending")),
        config=SimpleNamespace(seed=0),
        layout=SimpleNamespace(dp=1),
        journal=SimpleNamespace(activity=Activity()),
        console=SimpleNamespace(starting=lambda *_: contextlib.nullcontext()),
        resumes_from=None,
        begin=begin,
    )

    @contextlib.contextmanager
    def open_trainer(*_: object, **__: object) -> Iterator[Any]:
        yield trainer

    prompts = SimpleNamespace(
        close=ExitStack().close, judges=SimpleNamespace(), tokenizer=None, turns=None, train=None, heldout=None
    )
    servers = SimpleNamespace(pool=None, leader=None)
    monkeypatch.setattr(parts, "open_trainer", open_trainer)
    monkeypatch.setattr(parts, "together", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(parts.RunPrompts, "load", lambda *_: prompts)
    monkeypatch.setattr(parts, "connect", lambda *_: contextlib.nullcontext(servers))
    monkeypatch.setattr(parts.Publisher, "of", Publisher)
    with pytest.raises(OSError, match="gone"), parts.open_parts(config, resume=False):
        raise OSError("a host is gone")
    assert told == ["closed"]
