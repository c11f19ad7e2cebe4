"""Packs sizes into few bins of one capacity. A bin is a micro-batch, and a size the tokens that a sample takes of it.

Sizes are integers from 1 to the capacity; bins hold positions of the sizes. All functions are pure, and give the same
bins on every rank.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import accumulate

Bins = list[list[int]]

CANDIDATES = 1 << 18
"""Sizes that `best_fill` considers for one bin, times the number of all sizes. Bounds its time: about a second."""
FEWEST_CANDIDATES = 32


def fewest_bins(sizes: Sequence[int], capacity: int) -> int:
    """Returns a lower bound of the number of bins.

    Two sizes above half the capacity never share a bin. For each `least` up to half the capacity, sizes from `least` to
    half must fit beside those that leave as much room, or into bins of their own: Martello and Toth (1990), bound L2.
    """
    small = sorted(size for size in sizes if 2 * size <= capacity)
    rooms = sorted(capacity - size for size in sizes if 2 * size > capacity)
    small_sums, room_sums = ([0, *accumulate(each)] for each in (small, rooms))
    more = 0
    for number, least in enumerate(small):
        room = room_sums[-1] - room_sums[bisect_left(rooms, least)]
        more = max(more, -((room - small_sums[-1] + small_sums[number]) // capacity))
    return len(rooms) + more


def pack_bins(sizes: Sequence[int], capacity: int, enough: int) -> Bins:
    """Packs the sizes into few bins; tries no harder once there are `enough`.

    Best fit is quick and finds the fewest bins for most lengths. Best fill finds them if hardly any room is free.
    """
    fitted = best_fit(sizes, capacity)
    if len(fitted) <= enough:
        return fitted
    return min(fitted, best_fill(sizes, capacity), key=len)


def best_fit(sizes: Sequence[int], capacity: int) -> Bins:
    """Puts each size, largest first, into the fullest bin with room for it."""
    bins: Bins = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for position in largest_first(sizes):
        size = sizes[position]
        place = bisect_left(rooms, (size, 0))
        room, number = rooms.pop(place) if place < len(rooms) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(position)
        insort(rooms, (room - size, number))
    return bins


def best_fill(sizes: Sequence[int], capacity: int) -> Bins:
    """Fills one bin at a time: the largest remaining size, and those of the others that fill the bin best."""
    left = largest_first(sizes)[::-1]
    candidates = max(FEWEST_CANDIDATES, CANDIDATES // max(1, len(sizes)))
    bins: Bins = []
    while left:
        chosen = [left.pop()]
        room = capacity - sizes[chosen[0]]
        # A sum of many sizes hits any room, so only the last few sizes of a bin need care.
        while len(left) > candidates and room > 8 * sizes[left[-1]]:
            chosen.append(left.pop())
            room -= sizes[chosen[-1]]
        fitting = bisect_left(left, room + 1, key=sizes.__getitem__)
        step = -(-fitting // candidates) or 1
        places = range((fitting - 1) % step, fitting, step)  # with the largest that fits
        for place in reversed(fullest_subset([sizes[left[place]] for place in places], room)):
            chosen.append(left.pop(places[place]))
        bins.append(chosen)
    return bins


def fullest_subset(sizes: Sequence[int], room: int) -> list[int]:
    """Returns ascending positions of ascending sizes, with the largest sum that is at most `room`."""
    # Bit n of reachable[k] is set if some of the first k sizes sum to n.
    reachable, mask = [1], (1 << room + 1) - 1
    for size in sizes:
        reachable.append(reachable[-1] | reachable[-1] << size & mask)
    wanted = reachable[-1].bit_length() - 1
    chosen = []
    for k in range(len(reachable) - 1, 0, -1):
        rest = wanted - sizes[k - 1]
        if rest >= 0 and reachable[k - 1] >> rest & 1:
            chosen.append(k - 1)
            wanted = rest
    return chosen[::-1]


def largest_first(sizes: Sequence[int]) -> list[int]:
    """Returns positions, largest size first; equal ones in their order."""
    return sorted(range(len(sizes)), key=lambda position: (-sizes[position], position))
