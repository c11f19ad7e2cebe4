"""Moves what belongs to samples to the data-parallel leaders that train on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from megatron_rl.config.layout import Layout
from megatron_rl.ranks.collectives import receive_bytes, send_bytes
from megatron_rl.ranks.place import Place


class Portable(Protocol):
    def to_bytes(self) -> bytes: ...


P = TypeVar("P", bound=Portable)


def migrate(
    mine: Mapping[int, P],
    home: Mapping[int, int],
    target: Mapping[int, int],
    place: Place,
    layout: Layout,
    from_bytes: Callable[[bytes], P],
) -> tuple[dict[int, P], int]:
    """Moves what belongs to sample i from replica `home[i]` to replica `target[i]`.

    Returns what this leader has then, and how many bytes it received; {} and 0 on ranks that lead no replica.
    Collective over the data-parallel leaders.
    """
    if not place.leads_replica:
        return {}, 0
    held, received = dict(mine), 0
    for index in sorted(target):
        source, destination = home[index], target[index]
        if source == destination:
            continue
        if place.dp == source:
            send_bytes(held.pop(index).to_bytes(), layout.leader(destination), place.control)
        elif place.dp == destination:
            data = receive_bytes(layout.leader(source), place.control)
            held[index] = from_bytes(data)
            received += len(data)
    return held, received
