"""Divides samples among data-parallel replicas and their micro-batches, so that no replica has much more than another.

Both tokens and cost are balanced, because a replica's time lies between them: it is tokens + a * (sum of squared
tokens), and `a` depends on the model and the machine. For short windows `a` is almost 0; the cost has a large one. If
no replica exceeds the means by more than e in tokens and in cost, it does not in time either, for any `a` between them.
If a few long samples make this impossible, the larger of the two excesses over the least possible is made small.
Loads are integers, so that every rank adds them up to the same number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

TOLERANCE = 0.005
"""Excess of a replica over the least possible that is not worth an exchange of samples between leaders."""
NEAR = 1
"""Excess over the least possible, in longest samples, up to which samples start at home. Few exchanges then suffice."""
LEAST_GAIN = 1e-3
"""Relative fall of the fullest replica that is worth an exchange."""
ROUNDS = 8
"""Exchanges, at most, as a multiple of the replicas."""
MOST_SINGLE, MOST_PAIRED = (32, 1024), (16, 48)
"""Samples of the fullest replica and of its partners that a round compares. They bound its time to milliseconds."""
PARTNERS = 4
"""Least full replicas with which pairs are exchanged."""


@dataclass(frozen=True)
class Division:
    """Samples to divide among `dp` replicas of `count` micro-batches, numbered replica * count + k."""

    loads: Ints  # [samples, 2] tokens and cost
    sizes: Ints  # [samples] what a sample takes of a micro-batch's capacity, at most all of it
    homes: Ints  # [samples] the replica that holds it, -1 if none does
    dp: int
    count: int
    capacity: int

    @property
    def least(self) -> Ints:
        """[2]: lower bound of the fullest replica's tokens and cost."""
        return np.array([least_fullest(each, self.dp) for each in self.loads.T])


@dataclass(frozen=True)
class _Parts:
    """Samples of one micro-batch that may leave it together: one, two or none. Arrays are [parts, ...]."""

    members: list[tuple[int, ...]]
    bins: Ints
    loads: Ints  # [parts, 2]
    sizes: Ints
    homes: Ints  # [parts, dp + 1] how many of the samples have this home; the last column counts those without


def least_fullest(loads: Ints, dp: int) -> int:
    """Returns a lower bound of the fullest replica's load: of dp * k + 1 samples, k + 1 share a replica."""
    sums = np.concatenate([[0], np.cumsum(np.sort(loads)[::-1])])
    k = np.arange(-(-len(loads) // dp))
    return max(-(-int(sums[-1]) // dp), int((sums[dp * k + 1] - sums[dp * k - k]).max()))


def near_home(division: Division) -> Ints | None:
    """Returns the micro-batch [samples] of each, largest sample first; None if a sample fits into no micro-batch.

    Each goes home if it stays there and has room, else to the replica that it leaves least full. There it goes into the
    fullest micro-batch with room.
    """
    dp, count = division.dp, division.count
    tokens_least, cost_least = division.least.tolist()
    rooms = [[(division.capacity, replica * count + k) for k in range(count)] for replica in range(dp)]
    tokens, costs = [0] * dp, [0] * dp
    bins = np.zeros(len(division.sizes), dtype=np.int64)
    homes = np.where(stays_home(division), division.homes, -1).tolist()
    samples = list(zip(division.loads.tolist(), division.sizes.tolist(), homes, strict=True))
    for number in _longest_first(division):
        (length, cost), size, home = samples[number]
        fitting = [replica for replica in range(dp) if rooms[replica][-1][0] >= size]
        if not fitting:
            return None
        target = home
        if home not in fitting:
            after = [max((tokens[r] + length) / tokens_least, (costs[r] + cost) / cost_least) for r in fitting]
            target = fitting[after.index(min(after))]
        room, place = rooms[target].pop(bisect_left(rooms[target], (size, 0)))
        insort(rooms[target], (room - size, place))
        bins[number] = place
        tokens[target] += length
        costs[target] += cost
    return bins


def stays_home(division: Division) -> npt.NDArray[np.bool_]:
    """Returns [samples], whether each starts at home: all of a home that has at most NEAR longest samples too much.

    Of another home the share stays that it may have, of all lengths: if it kept its longest, the others would get so
    many short ones that tokens and cost could not both be made even.
    """
    limit = division.least + NEAR * division.loads.max(axis=0)
    stays = np.zeros(len(division.sizes), dtype=np.bool_)
    ordered = _longest_first(division)
    for home in range(division.dp):
        here = ordered[division.homes[ordered] == home]
        share = min(1.0, *(limit / np.maximum(1, division.loads[here].sum(axis=0))).tolist())
        stays[here] = np.diff(np.floor(np.arange(len(here) + 1) * share)) > 0
    return stays


def _longest_first(division: Division) -> Ints:
    return np.argsort(-division.loads[:, 0], kind="stable")


def deal(division: Division, packed: Sequence[Sequence[int]]) -> Ints:
    """Returns the micro-batch [samples] of each: whole `packed` ones go to the least full replica, fullest first."""
    totals = np.zeros((division.dp, 2), dtype=np.int64)
    taken = [0] * division.dp
    bins = np.zeros(len(division.sizes), dtype=np.int64)
    least = division.least
    loads = np.array([division.loads[part].sum(axis=0) for part in packed])
    for number in np.argsort(-(loads / least).max(axis=1), kind="stable"):
        after = ((totals + loads[number]) / least).max(axis=1)
        after[np.array(taken) == division.count] = np.inf
        target = int(after.argmin())
        bins[packed[number]] = target * division.count + taken[target]
        totals[target] += loads[number]
        taken[target] += 1
    return bins


def exchange(division: Division, bins: Ints) -> Ints:
    """Returns a better micro-batch [samples] of each than `bins`.

    Each round exchanges samples of the fullest replica for another's, or gives them away, so that the fuller of the two
    is least full. It tries single samples first, then pairs.
    """
    state = _State(division, bins.copy())
    for _ in range(ROUNDS * division.dp):
        order = np.argsort(state.fullness(state.totals), kind="stable")
        fullest, others = int(order[-1]), order[:-1]
        if state.fullness(state.totals[fullest]) <= 1 + TOLERANCE:
            break
        if not (state.improve(fullest, others, paired=False) or state.improve(fullest, others[:PARTNERS], paired=True)):
            break
    return state.bins


class _State:
    """Micro-batches of all samples, with the loads of replicas and of micro-batches."""

    def __init__(self, division: Division, bins: Ints) -> None:
        self.division, self.bins, self.least = division, bins, division.least
        self.totals = np.zeros((division.dp, 2), dtype=np.int64)
        self.used = np.zeros(division.dp * division.count, dtype=np.int64)
        np.add.at(self.totals, bins // division.count, division.loads)
        np.add.at(self.used, bins, division.sizes)

    def fullness(self, totals: Ints) -> Floats:
        """Returns [...], the larger of tokens and cost [..., 2] over what the fullest replica has at least."""
        return np.maximum(totals[..., 0] / self.least[0], totals[..., 1] / self.least[1])

    def improve(self, fullest: int, partners: Ints, *, paired: bool) -> bool:
        """Makes the best exchange between `fullest` and one of the partners; returns whether one gains enough."""
        rows, columns = MOST_PAIRED if paired else MOST_SINGLE
        replica = self.bins // self.division.count
        mine = self._parts(self._some(replica == fullest, rows), paired)
        theirs = self._parts(self._some(np.isin(replica, partners), columns), paired, self._roomiest(partners).tolist())
        if not mine.members:
            return False
        target = theirs.bins // self.division.count
        size = mine.sizes[:, None] - theirs.sizes
        load = mine.loads[:, None] - theirs.loads
        after = np.maximum(self.fullness(self.totals[fullest] - load), self.fullness(self.totals[target] + load))
        room = self.division.capacity - self.used
        after[(size > room[theirs.bins]) | (-size > room[mine.bins][:, None])] = np.inf
        if after.min() > self.fullness(self.totals[fullest]) * (1 - LEAST_GAIN):
            return False
        # Of exchanges that are good enough, the one that brings most samples home.
        home = mine.homes[:, target] - mine.homes[:, [fullest]] + theirs.homes[:, fullest]
        home -= theirs.homes[np.arange(len(target)), target]
        best = np.lexsort((after.ravel(), -home.ravel(), np.maximum(after, 1 + TOLERANCE).ravel()))[0]
        row, column = divmod(int(best), len(target))
        into, back = int(theirs.bins[column]), int(mine.bins[row])
        for members, place in ((mine.members[row], into), (theirs.members[column], back)):
            for sample in members:
                self._move(sample, place)
        return True

    def _move(self, sample: int, place: int) -> None:
        for where, sign in ((int(self.bins[sample]), -1), (place, 1)):
            self.totals[where // self.division.count] += sign * self.division.loads[sample]
            self.used[where] += sign * self.division.sizes[sample]
        self.bins[sample] = place

    def _roomiest(self, replicas: Ints) -> Ints:
        """Returns the emptiest micro-batch of each replica."""
        count = self.division.count
        return self.used.reshape(-1, count)[replicas].argmin(axis=1) + replicas * count

    def _some(self, wanted: npt.NDArray[np.bool_], most: int) -> Ints:
        """Returns at most `most` of the wanted samples, of all lengths."""
        positions = np.flatnonzero(wanted)
        if len(positions) <= most:
            return positions
        ordered = positions[np.argsort(self.division.loads[positions, 0], kind="stable")]
        return ordered[np.linspace(0, len(ordered) - 1, most).astype(np.int64)]

    def _parts(self, samples: Ints, paired: bool, empty: Sequence[int] = ()) -> _Parts:
        """Returns each sample alone, `paired` also pairs within a micro-batch, and no sample of each `empty` one."""
        division = self.division
        members: list[tuple[int, ...]] = [(sample,) for sample in samples.tolist()]
        if paired:
            members += [(i, j) for (i,), (j,) in combinations(members, 2) if self.bins[i] == self.bins[j]]
        bins = np.array([self.bins[part[0]] for part in members] + list(empty), dtype=np.int64)
        members += [()] * len(empty)
        part = np.array([number for number, each in enumerate(members) for _ in each], dtype=np.int64)
        sample = np.array([i for each in members for i in each], dtype=np.int64)
        loads, sizes = np.zeros((len(members), 2), dtype=np.int64), np.zeros(len(members), dtype=np.int64)
        homes = np.zeros((len(members), division.dp + 1), dtype=np.int64)
        np.add.at(loads, part, division.loads[sample])
        np.add.at(sizes, part, division.sizes[sample])
        np.add.at(homes, (part, division.homes[sample]), 1)
        return _Parts(members, bins, loads, sizes, homes)
