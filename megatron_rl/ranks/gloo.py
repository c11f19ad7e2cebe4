"""One gloo device for all process groups of a rank."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

from torch.distributed import distributed_c10d as c10d


@contextlib.contextmanager
def one_gloo_device() -> Iterator[None]:
    """Makes the gloo groups that are created inside share their devices.

    A device is a thread that wakes a hundred times a second. torch gives one to each group, and a rank has about thirty
    groups: on a CPU the wake-ups alone would take a tenth of the time of a small run.
    """
    own = c10d.ProcessGroupGloo
    devices = _make_devices()

    class Sharing(own):  # type: ignore[misc,valid-type]  # a class, because torch asks for instances of it
        def __init__(self, store: Any, rank: int, size: int, timeout: datetime.timedelta, **others: Any) -> None:
            options = own._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            for name, value in others.items():  # torch 2.14 says whether a group may lose ranks and go on
                setattr(options, name, value)
            options._devices = devices
            options._threads = 2 * len(devices)
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = Sharing  # type: ignore[misc]
    try:
        yield
    finally:
        c10d.ProcessGroupGloo = own  # type: ignore[misc]
        devices.clear()  # a class lives until garbage is collected, and would keep them


def _make_devices() -> list[Any]:
    """Devices as torch makes them for a group."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME")
    if not interfaces:
        return [c10d.ProcessGroupGloo.create_default_device()]
    return [c10d.ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
