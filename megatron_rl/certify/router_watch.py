"""Observes what the routers of a layout did, and compares it with the traces.

The replay's own code is not trusted. Each row that leaves the embedding shows by its token's id which (sample,
position) it is, and rows keep their order through the stages. Hooks on the routers read the routing map that the
experts get, in the forward pass and again if the backward pass recomputes.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import orjson
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_rl.certify.samples import LENGTHS, token_of, trace_of
from megatron_rl.data.sample import Sample
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.engine.policy import Policy
from megatron_rl.ranks.collectives import all_gather_bytes
from megatron_rl.ranks.place import Place

Sets = npt.NDArray[np.bool_]  # [rows, experts]


@dataclass(frozen=True, eq=False)
class Call:
    """One router call: the experts that each row got, and the experts that its live scores choose."""

    layer: int
    micro_batch: int
    got: Sets
    live: Sets


@dataclass
class RouterWatch:
    """Hooks embedding and routers during one run of the schedule."""

    policy: Policy
    rows: list[list[int]] = field(default_factory=list)  # per micro-batch, the token id of each row; first stages only
    forward: list[Call] = field(default_factory=list)
    backward: list[Call] = field(default_factory=list)
    _calls: defaultdict[tuple[int, bool], int] = field(default_factory=lambda: defaultdict(int))

    @contextlib.contextmanager
    def on(self, reruns: Collection[int]) -> Iterator[None]:
        """`reruns` are the layers whose routers the backward pass runs again."""
        handles = []
        for model in self.policy.models:
            if model.pre_process:
                ids = _embedded_ids(model)
                handles.append(
                    model.embedding.register_forward_hook(lambda _m, _i, out, ids=ids: self._embedded(out, ids))
                )
            for router in model.modules():
                if isinstance(router, TopKRouter):
                    handles.append(
                        router.register_forward_hook(lambda module, args, out: self._routed(module, args, out, reruns))
                    )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _embedded(self, out: Tensor, ids: dict[bytes, int]) -> None:
        self.rows.append([ids[row.numpy().tobytes()] for row in _plain(out).flatten(0, -2)])

    def _routed(
        self, router: TopKRouter, args: tuple[Tensor, ...], out: tuple[Tensor, Tensor], reruns: Collection[int]
    ) -> None:
        # If activations are recomputed, a forward pass without gradients comes first, and its activations are dropped.
        layer = router.layer_number - 1
        again = layer in reruns and torch.is_grad_enabled()
        with torch.no_grad():
            live = _own_choice(router, router.gating(args[0]).flatten(0, -2))
        call = Call(layer, self._calls[layer, again], out[1].bool().cpu().numpy(), live.cpu().numpy())
        self._calls[layer, again] += 1
        (self.backward if again else self.forward).append(call)


def _own_choice(router: TopKRouter, logits: Tensor) -> Tensor:
    """Returns [rows, experts] bool: what Megatron-Core chooses by logits [rows, experts] if nothing is replayed."""
    config = router.config
    _, chosen = topk_routing_with_score_function(
        logits,
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
    )
    return chosen.bool()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _embedded_ids(model: GPTModel) -> dict[bytes, int]:
    """Token ids by the bytes of their embedding."""
    shard = model.embedding.word_embeddings.weight.detach()
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard, group=group)
    table = _plain(torch.cat(parts)[: sum(LENGTHS)])
    found = {row.numpy().tobytes(): number for number, row in enumerate(table)}
    if len(found) < sum(LENGTHS):
        raise ValueError("the model embeds two of the certificate's tokens alike; nothing can be told apart")
    return found


# ---- the verdict


@dataclass(frozen=True)
class ReplayCount:
    """Counts over all ranks of all replicas; rows are (sample, position, layer)."""

    replayed: int  # rows that used exactly their own trace
    live: int  # rows without a route, which used their live choice
    expected_replayed: int
    expected_live: int
    strange: int  # router rows that are neither replayed nor live, without padding

    @property
    def holds(self) -> bool:
        return (self.replayed, self.live, self.strange) == (self.expected_replayed, self.expected_live, 0)


def judge(
    calls: Sequence[Call],
    rows: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    place: Place,
    layers: Collection[int],
) -> ReplayCount:
    """Counts the router rows of this rank's calls. Collective.

    `rows` are the token of each row, by micro-batch, on the first stage with this rank's tp and cp. `layers` are those
    whose routers should have run, on all ranks.
    """
    traces = [trace_of(sample) for sample in samples]
    columns = {layer: column for column, layer in enumerate(traces[0].layers)}
    # (token, layer) -> number of rows that used its trace, its live choice, neither, or a trace that is the live choice
    seen: dict[str, list[int]] = {}
    for call in calls:
        for row, token_id in enumerate(rows[call.micro_batch]):
            token = token_of(token_id)
            trace = traces[token.sample]
            wanted = call.live[row]
            kind = 1
            if token.position < trace.rows and trace.present[token.position]:
                wanted = np.zeros_like(wanted)
                wanted[trace.experts[token.position, columns[call.layer]]] = True
                kind = 3 if np.array_equal(wanted, call.live[row]) else 0
            counts = seen.setdefault(f"{token_id}:{call.layer}", [0] * 4)
            counts[kind if np.array_equal(call.got[row], wanted) else 2] += 1
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0] * 4)
    for part in all_gather_bytes(orjson.dumps(seen), place.control):
        for key, counts in orjson.loads(part).items():
            totals[key] = [a + b for a, b in zip(totals[key], counts, strict=True)]
    return _count(totals, traces, len(layers))


def _count(totals: dict[str, list[int]], traces: Sequence[RoutingTrace], layers: int) -> ReplayCount:
    """Adds up the rows of all tokens and layers.

    Padding repeats its sequence and routes live, so a token may have several rows. Exactly one may use its own trace,
    except for rows whose live choice is the trace: with few experts that happens by chance, and shows nothing.
    """
    present = sum(int(trace.present.sum()) for trace in traces) * layers
    live = sum(LENGTHS[: len(traces)]) * layers - present
    own = [counts[0] == 1 or (counts[0] == 0 and counts[3] > 0) for counts in totals.values()]
    replayed = sum(own)
    routed_live = sum(not any((counts[0], counts[2], counts[3])) and counts[1] > 0 for counts in totals.values())
    strange = sum(counts[2] for counts, replays in zip(totals.values(), own, strict=True) if not replays)
    return ReplayCount(replayed, routed_live, present, live, strange)


def share_rows(rows: list[list[int]], place: Place) -> list[list[int]]:
    """Returns the first stage's rows on every stage; the pipeline passes them on rank by rank. Collective."""
    mine = orjson.dumps([place.tp, place.cp, place.dp, place.pp, rows])
    for part in all_gather_bytes(mine, place.control):
        tp, cp, dp, pp, found = orjson.loads(part)
        if (tp, cp, dp, pp) == (place.tp, place.cp, place.dp, 0):
            return found
    raise AssertionError("no first stage")
