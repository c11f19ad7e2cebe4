"""How torch makes gloo groups inside of `one_gloo_device`, whatever its version."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import distributed_c10d as c10d

from megatron_rl.ranks.gloo import one_gloo_device


class Group:
    """Keeps its options, as torch's group does."""

    _Options = SimpleNamespace

    def __init__(self, store: Any, rank: int, size: int, options: SimpleNamespace) -> None:
        self.options = options

    @staticmethod
    def create_default_device() -> str:
        return "a device"


def test_options_of_newer_versions_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.14 passes `enable_reconfigure`, which 2.13 does not know."""
    monkeypatch.setattr(c10d, "ProcessGroupGloo", Group)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    minute = datetime.timedelta(minutes=1)
    with one_gloo_device():
        make: Any = c10d.ProcessGroupGloo
        groups = [make(None, 0, 1, timeout=minute, **more) for more in ({}, {"enable_reconfigure": True})]
    assert [vars(group.options).get("enable_reconfigure") for group in groups] == [None, True]
    assert all(group.options._timeout == minute for group in groups)
