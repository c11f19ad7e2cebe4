"""How a run reaches its rollout servers, and how it leaves them. Nothing is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from megatron_rl import session
from megatron_rl.config.schema import Config


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        run_dir=tmp_path / "run",
        model={"path": tmp_path},
        data={"train": "unused"},
        rollout={"replay_from": tmp_path},
        train={"steps": 1, "mini_batches": 1},
    )


def test_leaders_begin_with_servers_far_apart(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that began with the first one would send all of their groups to it and its neighbours."""
    urls = [f"http://127.0.0.1:{port}" for port in range(1000, 1008)]
    monkeypatch.setattr(session, "broadcast_bytes", lambda *_: orjson.dumps([urls, "key"]))
    first = []
    for dp in range(4):
        place = SimpleNamespace(rank=dp + 1, dp=dp, leads_replica=True, control=None)
        trainer: Any = SimpleNamespace(place=place, layout=SimpleNamespace(dp=4))
        with contextlib.ExitStack() as stack:
            pool, leader = session._connect(config, trainer, None, stack)
            assert pool is None
            assert leader is not None
            assert sorted(client.url for client in leader.clients) == urls
            assert {client._api_key for client in leader.clients} == {"key"}
            first.append(leader.clients[0].url)
    assert first == urls[::2]


@pytest.mark.parametrize("where", ["begins", "runs"])
def test_a_run_that_fails_leaves_its_servers_fit_for_the_next(
    config: Config, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Closing the weight sync is what tells servers that run elsewhere that this trainer is gone."""
    told = []

    class Session:
        def __init__(self, *_: object) -> None:
            pass

        def begin(self) -> None:
            if where == "begins":
                raise OSError("the disk is gone")

        def close(self) -> None:
            told.append("closed")

    @contextlib.contextmanager
    def open_trainer(*_: object, **__: object) -> Iterator[SimpleNamespace]:
        policy = SimpleNamespace(arch=SimpleNamespace(vocab_size=9))
        yield SimpleNamespace(place=SimpleNamespace(control=None), policy=policy)

    monkeypatch.setattr(session, "open_trainer", open_trainer)
    monkeypatch.setattr(session, "together", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(session.RunPrompts, "load", lambda *_: None)
    monkeypatch.setattr(session, "_check_saved", lambda *_: None)
    monkeypatch.setattr(session, "Session", Session)
    with pytest.raises(OSError, match="gone"), session.open_session(config, resume=False):
        raise OSError("a host is gone")
    assert told == ["closed"]
