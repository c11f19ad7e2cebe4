"""Substitutions in the trainer's forward pass, one part at a time, of what the rollout engine may have computed.

The trainer computes in fp32. A part `in bf16` reads its inputs and weights rounded to bf16 and rounds its outputs, as
kernels do that read and write bf16 and add up in fp32. Everything else stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_rl.engine.policy import Policy
from megatron_rl.routing.replay import RoutingPass, Tap

PARTS = {
    "attention": "projections and core of attention in bf16",
    "experts": "the experts, or the MLP of a dense layer, in bf16",
    "router": "the router's inputs and weights in bf16",
    "norms": "the norms in bf16",
    "residual": "the residual stream in bf16 after each layer",
    "head": "the logits in bf16",
    "expert order": "a token's experts added up by falling score, not by number",
}
"""By name, what is substituted. The names of modules are the same with Transformer Engine's layers."""

_MODULES = {
    "attention": ("linear_qkv", "core_attention", "linear_proj"),
    "experts": ("experts", "mlp.linear_fc1", "mlp.linear_fc2"),
    "router": ("router",),
    "norms": ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm", "final_layernorm"),
}


class RoundedGates(RoutingPass):
    """Rounds the scores of the chosen experts to bf16: the gate weights change, and the experts do not."""

    def route(self, tap: Tap, scores: Tensor, live_scores: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        chosen, used = super().route(tap, scores, live_scores, live)
        return _rounded(chosen), used


@contextlib.contextmanager
def substituted(policy: Policy, part: str) -> Iterator[None]:
    """Substitutes one of PARTS in the forward passes of the body. No weight has changed afterwards."""
    match part:
        case "head":
            for model in policy.models:
                model.head_dtype = torch.bfloat16
            try:
                yield
            finally:
                for model in policy.models:
                    model.head_dtype = None
        case "residual":
            with _hooks(policy, lambda _, module: isinstance(module, TransformerLayer), _round_output):
                yield
        case "expert order":
            with _falling_order(policy):
                yield
        case _:
            with _in_bf16(policy, _MODULES[part], outputs=part != "router"):
                yield


def orders_experts(policy: Policy) -> str:
    """Returns why the order of a token's experts cannot be substituted; "" if it can."""
    if not policy.arch.num_experts:
        return "the model has no experts"
    if policy.layout.ep * policy.layout.etp > 1:
        return "a token's experts are on several ranks; use parallel.ep 1 and parallel.etp 1"
    if policy.layers.fused_kernels:
        return "the fused kernels add experts up in an order of their own; use engine.layers torch"
    return ""


@contextlib.contextmanager
def _in_bf16(policy: Policy, names: tuple[str, ...], *, outputs: bool) -> Iterator[None]:
    def wanted(name: str, _: torch.nn.Module) -> bool:
        return any(f".{name}".endswith(f".{each}") for each in names)

    modules = [m for model in policy.models for name, m in model.named_modules() if wanted(name, m)]
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    kept = [(parameter, parameter.data) for parameter in parameters]
    handles = [m.register_forward_pre_hook(_round_inputs, with_kwargs=True) for m in modules]
    try:
        for parameter, data in kept:
            parameter.data = _rounded(data)
        with _hooks(policy, wanted, _round_output) if outputs else contextlib.nullcontext():
            yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hooks(policy: Policy, wanted: Callable[[str, torch.nn.Module], bool], hook: Callable[..., Any]) -> Iterator[None]:
    """Runs a forward hook on the wanted modules."""
    handles = [
        module.register_forward_hook(hook)
        for model in policy.models
        for name, module in model.named_modules()
        if wanted(name, module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(value: Any) -> Any:
    """Rounds floating-point tensors, also those in a tuple; all else is returned as it is."""
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.bfloat16().to(value.dtype)
    return value


def _round_inputs(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Rounds activations. The gate weights that experts are given have one dimension, and stay in fp32."""

    def activation(value: Any) -> Any:
        return _rounded(value) if isinstance(value, Tensor) and value.dim() > 1 else value

    return tuple(map(activation, args)), {key: activation(value) for key, value in kwargs.items()}


def _round_output(_: torch.nn.Module, __: Any, output: Any) -> Any:
    return _rounded(output)


@contextlib.contextmanager
def _falling_order(policy: Policy) -> Iterator[None]:
    """Adds up each token's experts in the order of falling gate weight, as an engine that keeps a slot for each does.

    Megatron-Core adds them up by number. Needs all of a token's experts on this rank (see orders_experts).
    """
    handles = []
    for model in policy.models:
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                seen: dict[str, Any] = {}
                handles += [
                    layer.router.register_forward_hook(lambda _, __, out, seen=seen: seen.update(routed=out)),
                    layer.experts.register_forward_hook(lambda _, __, out, seen=seen: seen.update(output=out[0])),
                    layer.register_forward_hook(lambda _, __, out, seen=seen: added_up(seen, out)),
                ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def added_up(seen: dict[str, Any], out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Returns a MoE layer's output, with the rows of its experts added up by falling gate weight, one after another.

    `seen` has the router's output, (gate weights, choice) [rows, experts] each, and the experts' output [n, H], sorted
    by expert and then by token; `out` is the layer's own output, whose shape and dtype the sum has.
    """
    gates, chosen = (each.flatten(0, -2) for each in seen["routed"])
    rows = torch.zeros(chosen.shape, dtype=torch.long, device=chosen.device)
    experts, tokens = chosen.t().nonzero(as_tuple=True)
    rows[tokens, experts] = torch.arange(len(tokens), device=chosen.device)
    top_k = int(chosen[0].sum())
    slots = gates.masked_fill(~chosen.bool(), -torch.inf).topk(top_k, dim=1).indices
    total = torch.zeros_like(out[0]).view(len(gates), -1)
    for slot in range(top_k):
        total = total + seen["output"][rows.gather(1, slots[:, slot : slot + 1]).squeeze(1)]
    return total.view_as(out[0]), out[1]
