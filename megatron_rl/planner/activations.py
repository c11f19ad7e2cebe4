"""Formulas for the bytes that one rank's forward pass keeps for the backward pass. No torch.

They follow section 4.1 of 2205.05198 (Reducing Activation Recomputation in Large Transformer Models): one term for each
tensor that autograd keeps. Our terms differ in what the models have in addition: RMS norms, SwiGLU, top-k experts,
grouped queries, latent attention, gates, and delta networks; and attention keeps no matrix of scores, as its kernels
compute it again. With plain PyTorch layers a norm keeps its normalised values in fp32, and SwiGLU keeps five
tensors of the MLP's width. Transformer Engine's kernels keep the input alone, and three. The terms for plain
layers are compared with what autograd keeps (tests/ranks/test_planner_activations.py); those for Transformer Engine
were found by reading its source.

Two things are not counted. Plain PyTorch attention pads sequences of similar length to the longest. And a kernel that
has no other way, such as a CPU's for values narrower than keys, keeps the scores.

Units: bytes, for all tokens of one micro-batch on one rank, unless a name says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.config.layout import Layout
from megatron_rl.config.recompute import Recomputation
from megatron_rl.models.architecture import Architecture, DeltaNet, LatentAttention

FP32 = 4
INT64 = 8
CORE, UP = "core_attn", "mla_up_proj"
INSIDE_MOE = ("shared_experts", "moe_act")
"""Modules of engine.recompute that are part of the module moe."""
CHUNK = 64
"""Tokens of a chunk of a delta network (engine/layers/delta_net.py)."""
IMBALANCE = 1.3
"""Rows of the fullest expert-parallel rank, over the mean. Without expert parallelism no rank is fuller than others."""


@dataclass(frozen=True)
class Workload:
    """What one micro-batch of `tokens` packed tokens, over all context-parallel ranks, is to one rank."""

    arch: Architecture
    layout: Layout
    tokens: int
    item: int  # bytes of an activation's element
    fused: bool = False  # whether Transformer Engine's kernels compute the layers
    imbalance: float = IMBALANCE

    @property
    def attended(self) -> float:
        """Tokens that this rank's heads see."""
        return self.tokens / self.layout.cp

    @property
    def own(self) -> float:
        """Tokens of this rank outside attention and MLP: sequence parallelism cuts them over tensor-parallel ranks."""
        return self.attended / self.layout.tp

    @property
    def routed(self) -> float:
        """Rows of this rank's experts, one for each token and expert that it chose."""
        imbalance = self.imbalance if self.layout.ep > 1 else 1.0
        return self.own * self.arch.experts_per_token * self.layout.etp * imbalance

    @property
    def query_heads(self) -> float:
        return self.arch.num_heads / self.layout.tp

    @property
    def kv_heads(self) -> float:
        """Key-value heads of this rank; with more ranks than heads, each has one."""
        return max(self.arch.num_kv_heads / self.layout.tp, 1)


@dataclass(frozen=True)
class Kept:
    """What a module of engine.recompute keeps, and what is kept in place of it if the module is recomputed."""

    whole: float
    recomputed: float = 0.0


@dataclass(frozen=True)
class LayerBytes:
    """What a layer keeps: modules that can be recomputed, without those inside of them, and the rest."""

    rest: float
    modules: Mapping[str, Kept]

    def under(self, recomputation: Recomputation) -> float:
        """Returns what is kept while the layer's own backward pass has not begun, if the layer is not recomputed as a
        whole: see layer_input."""
        again = _with_inner(recomputation)
        return self.rest + sum(kept.recomputed if name in again else kept.whole for name, kept in self.modules.items())

    def again(self, recomputation: Recomputation) -> float:
        """Returns what recomputed modules make again. Not all of it at once, so it is an upper bound."""
        return sum(self.modules[name].whole for name in _with_inner(recomputation) & self.modules.keys())


def _with_inner(recomputation: Recomputation) -> set[str]:
    inner = INSIDE_MOE if "moe" in recomputation.modules else ()
    return {*recomputation.modules, *inner}


def layer_bytes(work: Workload, layer: int) -> LayerBytes:
    """Returns what layer `layer` (0-based, global) keeps without recomputation of whole layers."""
    mlp = _experts(work) if work.arch.is_moe(layer) else _dense(work)
    parts = _mixer(work, layer), _norms(work, layer), mlp
    return LayerBytes(
        sum(part.rest for part in parts), {name: kept for part in parts for name, kept in part.modules.items()}
    )


def layer_input(work: Workload) -> float:
    """Returns what a layer keeps if it is recomputed: its input."""
    return work.own * work.arch.hidden_size * work.item


def logits_bytes(work: Workload, chunk: int) -> float:
    """Returns what the last stage needs while it computes log-probs and their gradients (engine/logprobs.py).

    These are the final norm and hidden states; one chunk of logits, or of their gradient, in fp32 and in the model's
    dtype; and the gradients of hidden states, and of the output layer in fp32 and in the model's dtype.
    """
    arch = work.arch
    kept = _norm(work, arch.hidden_size) * work.own + work.attended * arch.hidden_size * work.item
    if arch.value_head:
        return kept
    rows = arch.vocab_size / work.layout.tp
    logit = FP32 if work.item == FP32 else FP32 + work.item
    gradients = work.attended * arch.hidden_size * work.item + rows * arch.hidden_size * (FP32 + work.item)
    return kept + rows * min(chunk, work.attended) * logit + gradients


def in_flight(layout: Layout, pp: int, micro_batches: int) -> int:
    """Returns how many micro-batches' activations stage `pp` keeps at most, counted in passes of one virtual stage.

    One forward, one backward: stage p of P starts P - p micro-batches before its first backward pass [2104.04473,
    section 2.2]. Interleaved: 2 (P - p - 1) + (V - 1) P + 1 passes (Megatron-Core's schedules.py,
    get_pp_rank_microbatches).
    """
    if layout.vpp == 1:
        return min(layout.pp - pp, micro_batches)
    started = 2 * (layout.pp - pp - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(started, layout.vpp * micro_batches)


@dataclass(frozen=True)
class StageActivations:
    """Bytes that a stage keeps for all micro-batches in flight, and what comes on top while one layer's backward pass
    runs: tensors that are computed again, and gradients of its widest tensors."""

    kept: float
    layer: float


def stage_activations(
    work: Workload, layers: list[range], pp: int, micro_batches: int, recomputation: Recomputation
) -> StageActivations:
    """Returns the largest sums of stage `pp`; `layers` are those of its virtual stages."""
    numbers = Counter(_like(work.arch, layer) for virtual in layers for layer in virtual)
    rerun = Counter(_like(work.arch, layer) for virtual in layers for layer in virtual[: recomputation.layers])
    whole = {layer: layer_bytes(work, layer) for layer in numbers}
    one = layer_input(work) * rerun.total()
    one += sum(whole[layer].under(recomputation) * count for layer, count in (numbers - rerun).items())
    again = max((whole[layer].under(Recomputation()) for layer in rerun), default=0.0)
    if recomputation.modules:
        again = max(each.again(recomputation) for each in whole.values())
    passes = in_flight(work.layout, pp, micro_batches)
    gradients = max(_gradients(work, layer) for layer in numbers)
    return StageActivations(one * passes / len(layers), again + gradients)


def _like(arch: Architecture, layer: int) -> int:
    """Returns the first layer that keeps what `layer` keeps."""
    kind = arch.is_moe(layer), arch.has_delta_net(layer)
    return next(n for n in range(arch.num_layers) if (arch.is_moe(n), arch.has_delta_net(n)) == kind)


def _gradients(work: Workload, layer: int) -> float:
    """Returns the gradients that exist at once in a layer's backward pass: those of input and output of its widest
    product, and of the hidden states."""
    arch, item = work.arch, work.item
    if arch.is_moe(layer):
        widest = work.routed * (arch.hidden_size + 3 * arch.expert_hidden_size / work.layout.etp)
    else:
        widest = work.attended * 3 * arch.ffn_hidden_size / work.layout.tp
    attention = work.attended * (3 * work.query_heads + 4 * work.kv_heads) * arch.head_dim
    return (max(widest, attention) + 2 * work.own * arch.hidden_size) * item


# ---- one term for each tensor ----------------------------------------------------------------------------------


def _norm(work: Workload, width: float, values: float = 1.0) -> float:
    """Returns the bytes a token of `values` norms over `width` elements each: normalised values in fp32, and in the
    model's dtype if they are multiplied by the weight in that; fused, the input alone; and one inverse root."""
    if work.fused:
        kept = work.item
    elif work.item == FP32 or work.arch.zero_centred_norms:
        kept = FP32
    else:
        kept = FP32 + work.item
    return values * (width * kept + FP32)


def _norms(work: Workload, layer: int) -> LayerBytes:
    """Returns what the norms before attention and before the MLP keep, and their outputs, which projections and router
    keep. Transformer Engine fuses a norm into the projection that follows, and cannot recompute it there alone."""
    arch, output = work.arch, layer_input(work)
    norm = _norm(work, arch.hidden_size) * work.own + output
    alone = arch.is_moe(layer) + (arch.latent is not None) if work.fused else 2
    return LayerBytes((2 - alone) * norm, {"layernorm": Kept(alone * norm, alone * layer_input(work))})


def _gated(work: Workload, width: float) -> float:
    """Returns the bytes a row of SwiGLU and of the projection that follows: gate and up, its sigmoid's product, a copy
    of up, and the projection's input. Fused: gate and up, and the projection's input."""
    return width * work.item * (3 if work.fused else 5)


def _dense(work: Workload) -> LayerBytes:
    width = work.arch.ffn_hidden_size / work.layout.tp
    return LayerBytes(0.0, {"mlp": Kept(work.attended * _gated(work, width))})


def _experts(work: Workload) -> LayerBytes:
    """Returns what router, exchange and experts keep, and the expert that every token visits."""
    arch, width = work.arch, work.arch.expert_hidden_size / work.layout.etp
    row = arch.hidden_size * work.item + 2 * width * work.item + FP32
    activation = width * work.item
    if arch.clamped is not None:
        activation += 4 * width * work.item  # gate and up, clamped, the gate's sigmoid, and the unweighted product
    if arch.biases:
        row += arch.hidden_size / work.layout.etp * work.item + 2 * INT64  # the second bias, times the probability
    scores = 3 if arch.router.scores == "sigmoid" else 2
    token = arch.num_experts * (scores * FP32 + 1) + arch.experts_per_token * (3 * INT64 + FP32)
    modules = {"moe": Kept(work.routed * row + work.own * token), "moe_act": Kept(work.routed * activation)}
    if arch.shared_hidden_size:
        shared = work.attended * _gated(work, arch.shared_hidden_size / work.layout.tp)
        if arch.shared_gate:
            shared += work.own * (arch.hidden_size + 1) * work.item
        modules["shared_experts"] = Kept(shared)
    return LayerBytes(0.0, modules)


def _mixer(work: Workload, layer: int) -> LayerBytes:
    if work.arch.has_delta_net(layer):
        assert work.arch.delta_net is not None
        return _delta_net(work, work.arch.delta_net)
    return _latent(work, work.arch.latent) if work.arch.latent else _attention(work)


def _attention(work: Workload) -> LayerBytes:
    arch, item = work.arch, work.item
    query, key = work.query_heads * arch.head_dim, work.kv_heads * arch.head_dim
    heads = query + 2 * key + (query if arch.output_gate else 0)
    inputs = query + key + heads
    rest = work.attended * query * item  # the output projection's input
    if arch.qk_norm == "head":
        rest += work.attended * _norm(work, arch.head_dim, work.query_heads + work.kv_heads)
    elif arch.qk_norm == "all":
        kept = item if work.fused else FP32 + item  # the input too: AllHeadsNorm is made of separate operations
        rest += work.attended * ((query + key) * kept + 2 * FP32)
    if arch.output_gate:
        rest += work.attended * query * (FP32 + item)
    if work.layout.tp > arch.num_kv_heads:  # the outputs of all ranks are gathered
        gathered = arch.num_heads + 2 * arch.num_kv_heads
        rest += work.attended * gathered * arch.head_dim * item
    core = Kept(_core(work, query, key, key, query), work.attended * inputs * item)
    return LayerBytes(rest, {CORE: core})


def _latent(work: Workload, latent: LatentAttention) -> LayerBytes:
    """Returns what latent attention keeps. Recomputed up-projections, and norms fused into them, keep neither queries,
    keys nor values, but the key that all heads share."""
    item, heads = work.item, work.query_heads
    key, value = heads * (latent.nope_dim + latent.rope_dim), heads * latent.value_dim
    projected = work.attended * (2 * key + value) * item
    ranks = [rank for rank in (latent.query_rank, latent.kv_rank) if rank is not None]
    rest = work.attended * value * item + work.own * sum(_norm(work, rank) for rank in ranks)
    normalised = work.own * sum(ranks) * item
    up = Kept(projected + normalised, work.attended * latent.rope_dim * item + (0 if work.fused else normalised))
    return LayerBytes(rest, {CORE: Kept(_core(work, key, key, value, value) - projected), UP: up})


def _core(work: Workload, query: float, key: float, value: float, output: float) -> float:
    """Returns what attention keeps: queries, keys, values, output, and a logarithm for each query and head. Under
    context parallelism keys and values are those of all its ranks."""
    kept = work.attended * (query + output) + work.tokens * (key + value)
    if work.fused:
        kept -= work.attended * output  # the output projection's input, which is counted there
    return kept * work.item + work.attended * work.query_heads * FP32


def _delta_net(work: Workload, net: DeltaNet) -> LayerBytes:
    """Returns what a gated delta network keeps (engine/layers/delta_rule.py): the convolution's input and output; in
    fp32 five matrices of a chunk, and ten vectors of a head's key width and three of its value width. Under context
    parallelism each rank computes the recurrence over all tokens."""
    tp, item = work.layout.tp, work.item
    heads, keys = net.value_heads / tp, net.key_heads / tp * net.key_dim
    values, mixed = heads * net.value_dim, 2 * keys + heads * net.value_dim
    rest = work.attended * values * (3 * FP32 + 3 * item)
    token = 2 * item * mixed + 2 * FP32 * (keys + net.key_heads / tp) + 3 * FP32 * values
    token += FP32 * heads * (5 * CHUNK + 10 * net.key_dim + 8 + net.key_dim * net.value_dim / CHUNK)
    return LayerBytes(rest, {CORE: Kept(work.tokens * token, work.attended * (mixed + 2 * heads) * item)})
