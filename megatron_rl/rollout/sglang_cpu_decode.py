"""Attends one new token of each sequence on a CPU, over copies of SGLang's KV cache that grow with the sequences.

In the cache the keys and values of a sequence are in scattered slots, and to gather them costs as much as to attend.
But from one decoding step to the next each sequence has one token more. So each layer keeps a row for each sequence,
with its keys and values laid out for two batched products, and adds a token to each.

A row belongs to a request of SGLang, whose number its pool may give to another request. Before that one is decoded its
prompt is computed, so numbers that take part in such a forward pass are forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOM = 64
"""Positions for new tokens, beyond the longest sequence, when rows are made."""
SPARE = 1.25
"""Rows that are made, and used at most, for each sequence: those of sequences that ended cost as much as others."""


@dataclass(frozen=True)
class Step:
    """What all layers of one decoding step share, of S sequences in the first `used` rows."""

    rows: Tensor
    """The row of each sequence, [S] int64."""
    in_order: bool
    """Sequence i has row i, and all rows have a sequence."""
    last: Tensor
    """Position of each sequence's new token, [S] int64."""
    slots: Tensor
    """Its slot in the cache, [S] int64."""
    entered: Tensor
    """Rows of sequences that have none of their tokens in the copies yet, [N] int64."""
    entered_slots: Tensor
    """Slots of their tokens, [N, longest of them] int64; beyond a sequence's end its first slot."""
    bias: Tensor
    """Added to scores, [used, 1, 1, longest]: -inf beyond a sequence's end."""


class Copies:
    """The copies of all layers, in fp32. They have no more positions than the cache has slots."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}  # by request: its row, and the tokens in it
        self._shape = (0, 0)  # rows and positions
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of a layer's keys in the cache

    def forget(self, requests: Sequence[int]) -> None:
        """Forgets requests whose tokens are computed outside of decoding steps."""
        for request in requests:
            self._known.pop(request, None)

    def step(self, req_to_token: Tensor, requests: Tensor, lengths: Tensor, slots: int) -> Step | None:
        """Begins a decoding step; None without requests, or if the copies would be larger than the cache of `slots`.

        The slots of request i's tokens, the new one included, are req_to_token[requests[i], : lengths[i]].
        """
        names, counts = requests.tolist(), lengths.tolist()
        if not names:
            return None
        longest = max(counts)
        rows = self._rows(names, counts)
        if longest > self._shape[1] or max(rows) >= min(self._shape[0], SPARE * len(names) + 1):
            self._known, self._layers = {}, {}
            self._shape = int(SPARE * len(names)) + 1, longest + ROOM
            rows = list(range(len(names)))
        if self._shape[0] * self._shape[1] > slots:
            self._known, self._shape = {}, (0, 0)
            return None
        entered = [i for i, name in enumerate(names) if name not in self._known]
        self._known = dict(zip(names, zip(rows, counts, strict=True), strict=True))
        return _step(req_to_token, requests, lengths, rows, entered)

    def _rows(self, names: list[int], counts: list[int]) -> list[int]:
        """Gives each request a row: those that go on keep theirs, the others take the first free ones."""
        self._known = {
            name: self._known[name]
            for name, count in zip(names, counts, strict=True)
            if name in self._known and self._known[name][1] == count - 1
        }
        taken = {row for row, _ in self._known.values()}
        free = iter([row for row in range(len(names) + len(taken)) if row not in taken])
        return [self._known[name][0] if name in self._known else next(free) for name in names]

    def attend(self, step: Step, query: Tensor, output: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float) -> None:
        """Attends the new tokens of a layer and writes into `output`.

        `query` is [S, heads, D] and `output` [S, heads, width of values]; the caches are [slots, KV heads, ...].
        """
        keys, values = self._copies(k_cache, v_cache)
        _enter(step, keys, values, k_cache, v_cache)
        keys[step.rows, :, :, step.last] = k_cache.index_select(0, step.slots).float()
        values[step.rows, :, step.last] = v_cache.index_select(0, step.slots).float()
        used, longest, (kv_heads, width) = len(step.bias), step.bias.shape[-1], keys.shape[1:3]
        scaled = query.float() * scale
        if not step.in_order:
            scaled = scaled.new_zeros(used, *query.shape[1:]).index_copy_(0, step.rows, scaled)
        of_keys = keys[:used, :, :, :longest].reshape(used * kv_heads, width, longest)
        of_values = values[:used, :, :longest].reshape(used * kv_heads, longest, values.shape[-1])
        scores = torch.bmm(scaled.view(used * kv_heads, -1, width), of_keys).view(used, kv_heads, -1, longest)
        weights = scores.add_(step.bias).softmax(-1)
        attended = torch.bmm(weights.view(used * kv_heads, -1, longest), of_values).view(used, *output.shape[1:])
        output.copy_(attended if step.in_order else attended.index_select(0, step.rows))

    def _copies(self, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys [rows, KV heads, D, positions] and values [rows, KV heads, positions, width]."""
        if (layer := k_cache.data_ptr()) not in self._layers:
            (rows, positions), (kv_heads, width) = self._shape, k_cache.shape[1:]
            # Numbers of no sequence are multiplied by 0, so they must be finite.
            keys = torch.zeros(rows, kv_heads, width, positions)
            self._layers[layer] = keys, torch.zeros(rows, kv_heads, positions, v_cache.shape[-1])
        return self._layers[layer]


def _step(req_to_token: Tensor, requests: Tensor, lengths: Tensor, rows: list[int], entered: list[int]) -> Step:
    place, last = torch.tensor(rows), lengths.long() - 1
    used, longest = max(rows) + 1, int(last.max()) + 1
    bias = torch.full((used, longest), float("-inf"))
    bias[:, 0] = 0.0  # of rows without a sequence: a softmax needs a number
    bias[place] = torch.zeros(()).where(torch.arange(longest) <= last[:, None], float("-inf"))
    first = torch.arange(int(last[entered].max()) + 1 if entered else 0)
    # Beyond the end of a sequence the table may have anything.
    positions = first.where(first <= last[entered, None], 0)
    return Step(
        rows=place,
        in_order=rows == list(range(used)),
        last=last,
        slots=req_to_token[requests, last].long(),
        entered=place[entered],
        entered_slots=req_to_token[requests[entered, None], positions].long(),
        bias=bias[:, None, None],
    )


def _enter(step: Step, keys: Tensor, values: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if not len(step.entered):
        return
    sequences, longest = step.entered_slots.shape
    entering = step.entered_slots.view(-1)
    of_keys, of_values = (
        cache.index_select(0, entering).view(sequences, longest, *cache.shape[1:]).float()
        for cache in (k_cache, v_cache)
    )
    keys[:, :, :, :longest].index_copy_(0, step.entered, of_keys.permute(0, 2, 3, 1))
    values[:, :, :longest].index_copy_(0, step.entered, of_values.transpose(1, 2))
