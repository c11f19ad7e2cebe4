"""Measures routing by layer: how routers choose, and how two choices for the same tokens differ.

    set_mismatch   1[E != E']                 R3's published 10% [2510.11370]
    expert_change  1 - |E n E'| / K           GSPO's published 10% [2507.18071, section 5.3]
    top1_change    1[the first experts differ]
    token_layers   layers in which a token's sets differ

All metrics but `ep_peak` are sums over rows, so they do not depend on how rows are divided into micro-batches and
ranks. `ep_peak` says how uneven that division is: in the worst micro-batch, the rows of the fullest expert-parallel
rank over the mean of its ranks. Such a rank runs out of memory first.

Shapes: R rows (tokens of a rank, padding included), K experts of a row in descending order of score. Each router calls
this module in every micro-batch, so nothing waits for the device before `finalize`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROLLOUT_OLD = "rollout_old"
"""(mu, pi_old): the rollout engine's choice and the trainer's, under the same weights."""
OLD_POLICY = "old_policy"
"""(pi_old, pi_theta): before and after updates."""
RERUN = "rerun"
"""Two passes of pi_old: differences without any change of weights."""
PAIRS = (*(f"{pair}/{kind}" for pair in (ROLLOUT_OLD, OLD_POLICY) for kind in ("effective", "live")), RERUN)
"""effective: the experts used; live: the experts that the router would have chosen."""

ROUTER = ("entropy", "margin", "mass", "live_overlap", "fallback")
DRIFT = ("set_mismatch", "expert_change", "top1_change")
COLD = 0.1
"""A cold expert gets less than this fraction of the mean load."""
RUN_BYTES = 8 * 2**20
"""Bytes of tensors that wait to be measured together, if a layer alone has not more."""
MEANS = (*ROUTER, *(f"{measure}/{pair}" for measure in DRIFT for pair in PAIRS))


class RouterScores(NamedTuple):
    """What a router says of each row's experts, [R, experts] fp32 each."""

    logprobs: Tensor
    ranked: Tensor
    """It chooses the K highest: logits, or sigmoids with the bias, -inf for experts that the row's groups exclude."""


class LayerRun:
    """What is seen of the layers of one micro-batch, one after the other, until it is measured at once.

    With small layers an operation costs less than the same operation for each of them, on a CPU as on a GPU.
    """

    def __init__(self, measure: Callable[[int, slice, list[Sequence[Tensor]]], None]) -> None:
        """`measure` gets the micro-batch, the places of the layers, and the tensors of each."""
        self._measure = measure
        self._micro_batch = self._first = self._bytes = 0
        self._given: list[Sequence[Tensor]] = []

    def add(self, micro_batch: int, place: int, tensors: Sequence[Tensor]) -> None:
        """Takes a layer's tensors, which nobody may change until they are measured."""
        follows = self._given and (micro_batch, place) == (self._micro_batch, self._first + len(self._given))
        alike = follows and [each.shape for each in tensors] == [each.shape for each in self._given[0]]
        if not alike or self._bytes > RUN_BYTES:
            self.measure()
            self._micro_batch, self._first = micro_batch, place
        self._given.append(tensors)
        self._bytes += sum(each.nbytes for each in tensors)

    def measure(self) -> None:
        given, self._given, self._bytes = self._given, [], 0
        if given:
            self._measure(self._micro_batch, slice(self._first, self._first + len(given)), given)


class RoutingStats:
    """Sums of one optimizer step. Sums of several ranks and micro-batches add up: see `sums`."""

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        top_k: int,
        device: torch.device,
        *,
        micro_batches: int = 1,
        expert_ranks: int = 1,
        keeps_rows: bool = False,
    ) -> None:
        """`layers` are the global numbers of all MoE layers of the model, equal on every rank. The experts are divided
        among `expert_ranks`, in order. `keeps_rows` keeps the expert change of each row too (`row_changes`)."""
        self._layers = tuple(layers)
        self._place = {layer: place for place, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._top_k = top_k
        self._means = torch.zeros(len(MEANS), 2, len(layers), dtype=torch.float64, device=device)  # sum and rows
        self._load = torch.zeros(len(layers), num_experts, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(len(PAIRS), 3, dtype=torch.float64, device=device)  # layers, tokens with any, tokens
        self._rank_load = self._load.new_zeros(micro_batches, len(layers), expert_ranks)
        self.peaks = self._load.new_zeros(len(layers))
        """[layers]: `ep_peak` by layer, set by whoever knows the other ranks' `rank_load`; 0 is unknown."""
        self._differing: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._changes: dict[tuple[str, int], Tensor] | None = {} if keeps_rows else None
        self._routers = LayerRun(self._measure_routers)
        self._comparisons: dict[tuple[str, ...], LayerRun] = {}

    @property
    def rank_load(self) -> Tensor:
        """Choices of this rank's rows for the experts of each rank, by micro-batch and layer."""
        self._measure_waiting()
        return self._rank_load

    def observe_router(
        self,
        micro_batch: int,
        layer: int,
        scores: RouterScores,
        used: Tensor,
        live: Tensor,
        replayed: Tensor | None,
        valid: Tensor,
    ) -> None:
        """Adds a router's choices. used, live [R, K] ids; valid [R] bool, False on padding.

        replayed [R] bool is True for rows with a route to replay; None if nothing is replayed.
        """
        given = [*scores, used, live, valid] + ([] if replayed is None else [replayed])
        self._routers.add(micro_batch, self._place[layer], given)

    @torch.no_grad()
    def _measure_routers(self, micro_batch: int, places: slice, given: Sequence[Sequence[Tensor]]) -> None:
        """Adds the choices of the layers at these places, which are alike in shape: [L, R, ...] each."""
        valid, *replays = given[0][4:]  # the same for all layers of a micro-batch
        logprobs, ranked, used, live = (torch.stack([layer[kind] for layer in given]) for kind in range(4))
        # Rows of padding may name any expert; they are left in, since the shape of used[valid] depends on the data.
        chosen = used.long().clamp_(0, self._num_experts - 1)
        probabilities = logprobs.exp()
        # The log of a probability that underflowed is -inf, and 0 times that is not 0.
        logs = logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)
        mass = probabilities.gather(-1, chosen).double().sum(-1)
        self._add(places, valid, {"entropy": -(probabilities * logs).sum(-1), "mass": mass})
        if self._top_k < self._num_experts:
            ids = live.long().clamp_(0, self._num_experts - 1)
            last = ranked.gather(-1, ids).amin(-1)
            first = ranked.scatter_(-1, ids, float("-inf")).amax(-1)
            # The groups of a row may have no expert but those chosen.
            self._add(places, valid & first.isfinite(), {"margin": last - first})
        for replayed in replays:
            overlap = common(used, live) / self._top_k
            self._add(places, valid & replayed, {"live_overlap": overlap})
            self._add(places, valid, {"fallback": (~replayed).expand(len(given), -1)})
        rows = valid.to(self._load).repeat_interleave(self._top_k).repeat(len(given))
        ids = chosen.flatten(1) + self._num_experts * torch.arange(len(given), device=chosen.device)[:, None]
        load = rows.new_zeros(len(given) * self._num_experts)
        load = load.index_add_(0, ids.flatten(), rows).view(len(given), -1)  # bincount would wait for the device
        self._load[places] += load
        by_rank = self._rank_load[micro_batch, places]
        by_rank += load.view(*by_rank.shape, -1).sum(-1)

    def expect(self, pair: str, micro_batch: int, valid: Tensor) -> None:
        """Announces a comparison of the routers' choices, for rows in which `valid` [R] is True.

        Call it on every stage of a pipeline, even without routers. Raises ValueError if the pair is not in PAIRS.
        """
        if pair not in PAIRS:
            raise ValueError(f"pair: found {pair!r}; expected one of {', '.join(PAIRS)}")
        self._measure_waiting()  # what was announced before
        self._differing[pair, micro_batch] = (valid.long() * 0, valid)
        if self._changes is not None:
            self._changes[pair, micro_batch] = torch.zeros(len(valid), device=valid.device)

    def compare(self, pairs: Sequence[str], micro_batch: int, layer: int, a: Tensor, b: Tensor) -> None:
        """Compares choices a and b [R, K], the same for all these pairs, in the rows that `expect` announced."""
        for pair in pairs:
            self._differing[pair, micro_batch]  # KeyError if it was not announced
        if tuple(pairs) not in self._comparisons:
            self._comparisons[tuple(pairs)] = LayerRun(functools.partial(self._measure_pairs, tuple(pairs)))
        self._comparisons[tuple(pairs)].add(micro_batch, self._place[layer], (a, b))

    @torch.no_grad()
    def _measure_pairs(
        self, pairs: Sequence[str], micro_batch: int, places: slice, given: Sequence[Sequence[Tensor]]
    ) -> None:
        a, b = (torch.stack([layer[kind].short() for layer in given]) for kind in range(2))  # [L, R, K]
        shared = common(a, b)
        differs = shared < self._top_k
        change = 1 - shared / self._top_k
        measures = differs, change, a[..., 0] != b[..., 0]
        totals: dict[int, Tensor] = {}  # by the rows, which are often those of the pair before
        for pair in pairs:
            differing, valid = self._differing[pair, micro_batch]
            if id(valid) not in totals:
                totals[id(valid)] = _sums(valid, measures)
            self._keep(places, [f"{name}/{pair}" for name in DRIFT], totals[id(valid)])
            differing += (differs & valid).sum(0)
            if self._changes is not None:
                self._changes[pair, micro_batch] += change.sum(0)

    def _add(self, places: slice, valid: Tensor, measures: Mapping[str, Tensor]) -> None:
        """Adds measures [L, R] of the rows in which `valid`, [R] or [L, R], is True."""
        self._keep(places, tuple(measures), _sums(valid, tuple(measures.values())))

    def _keep(self, places: slice, names: Sequence[str], sums: Tensor) -> None:
        for name, total in zip(names, sums, strict=True):
            self._means[MEANS.index(name), :, places] += total

    def _measure_waiting(self) -> None:
        for run in (self._routers, *self._comparisons.values()):
            run.measure()

    def differing(self) -> Iterator[Tensor]:
        """[R] for each pair and micro-batch: number of this rank's layers in which each row differs.

        Sum it in place over the pipeline's stages, which hold the same rows, before `count_tokens`.
        """
        self._measure_waiting()
        for key in sorted(self._differing):
            yield self._differing[key][0]

    def row_changes(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """(expert change [R] fp32 summed over this rank's layers, [R] bool: rows that were compared) of each
        micro-batch, by pair."""
        self._measure_waiting()
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (pair, micro_batch), changes in sorted((self._changes or {}).items()):
            found.setdefault(pair, []).append((changes, self._differing[pair, micro_batch][1]))
        return found

    def count_tokens(self) -> None:
        """Adds `differing` to the sums. Call it on one stage of a pipeline only."""
        self._measure_waiting()
        for (pair, _), (layers, valid) in self._differing.items():
            found = (layers.sum(), (layers > 0).sum(), valid.sum())
            self._tokens[PAIRS.index(pair)] += torch.stack(found).double()

    def sums(self) -> tuple[Tensor, ...]:
        """Tensors to sum over ranks in place."""
        self._measure_waiting()
        return self._means, self._load, self._tokens

    def finalize(self) -> dict[str, float]:
        """Metrics per layer, with their mean and extremes over layers. Omits metrics without rows."""
        self._measure_waiting()
        report: dict[str, float] = {}
        means = self._means.cpu()
        for name, (sums, rows) in zip(MEANS, means, strict=True):
            report |= self._by_layer(name, sums / rows, rows > 0)
        load = self._load.cpu()
        total = load.sum(-1)
        report |= self._by_layer("max_vio", load.max(-1).values / load.mean(-1) - 1, total > 0)
        report |= self._by_layer("load_cv", load.std(-1, correction=0) / load.mean(-1), total > 0)
        report |= self._by_layer("dead_experts", (load == 0).sum(-1).double(), total > 0)
        cold = load < COLD * load.mean(-1, keepdim=True)
        report |= self._by_layer("cold_experts", cold.double().mean(-1), total > 0)
        peaks = self.peaks.cpu()
        report |= self._by_layer("ep_peak", peaks, peaks > 0)
        for pair, (layers, any_layer, tokens) in zip(PAIRS, self._tokens.tolist(), strict=True):
            if tokens:
                report[f"routing/token_layers/{pair}/mean"] = layers / tokens
                report[f"routing/token_layers/{pair}/any"] = any_layer / tokens
        return report

    def _by_layer(self, name: str, values: Tensor, there: Tensor) -> dict[str, float]:
        if not there.any():
            return {}
        found = values[there]
        shown = {f"layer_{layer:02d}": v for layer, v, t in zip(self._layers, values, there, strict=True) if t}
        over = {"mean": found.mean(), "min": found.min(), "max": found.max()}
        return {f"routing/{name}/{key}": float(value) for key, value in {**over, **shown}.items()}


def _sums(valid: Tensor, measures: Sequence[Tensor]) -> Tensor:
    """Returns the sum over the valid rows and their number, [measures, 2, L] fp64, of measures [L, R]; valid is bool,
    [R] or [L, R]."""
    # Other rows may have no finite value, and 0 times such a value is not 0.
    values = torch.stack([torch.where(valid, each.double(), 0.0) for each in measures])
    rows = valid.sum(-1).double().expand(len(values), values.shape[1])
    return torch.stack((values.sum(-1), rows), 1)


def peak_over_mean(rank_load: Tensor) -> Tensor:
    """Returns the fullest rank's load over the mean of the ranks: [...] from [..., ranks]; 0 if there is none."""
    mean = rank_load.mean(-1)
    return (rank_load.max(-1).values / mean.where(mean > 0, 1.0)).where(mean > 0, 0.0)


def common(a: Tensor, b: Tensor) -> Tensor:
    """[..., R]: number of experts in both a and b, ids [..., R, K] that are distinct in a row, or in padding any."""
    first, second = (ids.short().movedim(-1, 0).contiguous() for ids in (a, b))
    # On a CPU a sum over the first dimension, in few bytes, is a tenth of one over the last.
    return (first[:, None] == second).flatten(0, 1).sum(0, dtype=torch.uint8)
