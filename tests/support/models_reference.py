"""A second implementation of the Hugging Face <-> Megatron-Core weight map, the reference for megatron_rl.models.

It cuts with view, cat and chunk, as Megatron-Core's attention and MLP read their weights. It shares only Architecture
with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.binding import WeightNames


def moe_architecture(**changes: object) -> Architecture:
    values: dict = {
        "model_type": "qwen3_moe",
        "num_layers": 4,
        "hidden_size": 12,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "vocab_size": 13,
        "ffn_hidden_size": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "qk_norm": "head",
        "tied_embeddings": False,
        "initializer_range": 0.02,
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_hidden_size": 4,
        "dense_layers": (1,),
    }
    return Architecture(**{**values, **changes})


def dense_architecture(**changes: object) -> Architecture:
    none = {
        "num_experts": 0,
        "experts_per_token": 0,
        "expert_hidden_size": 0,
        "dense_layers": (),
    }
    return moe_architecture(model_type="qwen3", **{**none, **changes})


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns the tensor shapes of a Hugging Face checkpoint, in export order."""
    hidden, head = arch.hidden_size, arch.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (arch.vocab_size, hidden)}

    def mlp(prefix: str, ffn: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, ffn)

    for layer in range(arch.num_layers):
        own = f"model.layers.{layer}"
        shapes[f"{own}.input_layernorm.weight"] = (hidden,)
        shapes[f"{own}.self_attn.q_proj.weight"] = (arch.num_heads * head, hidden)
        shapes[f"{own}.self_attn.k_proj.weight"] = (arch.num_kv_heads * head, hidden)
        shapes[f"{own}.self_attn.v_proj.weight"] = (arch.num_kv_heads * head, hidden)
        shapes[f"{own}.self_attn.q_norm.weight"] = (head,)
        shapes[f"{own}.self_attn.k_norm.weight"] = (head,)
        shapes[f"{own}.self_attn.o_proj.weight"] = (hidden, arch.num_heads * head)
        shapes[f"{own}.post_attention_layernorm.weight"] = (hidden,)
        if arch.num_experts and layer not in arch.dense_layers:
            shapes[f"{own}.mlp.gate.weight"] = (arch.num_experts, hidden)
            for expert in range(arch.num_experts):
                mlp(f"{own}.mlp.experts.{expert}", arch.expert_hidden_size)
        else:
            mlp(f"{own}.mlp", arch.ffn_hidden_size)
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tied_embeddings:
        shapes["lm_head.weight"] = (arch.vocab_size, hidden)
    return shapes


def hf_tensors(arch: Architecture) -> dict[str, Tensor]:
    """Returns a model's tensors. All elements differ, so any misplaced element is noticed."""
    counter = itertools.count(1)
    tensors = {}
    for name, shape in hf_shapes(arch).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.tensor([float(next(counter)) for _ in range(count)]).view(shape)
    return tensors


def chunk_layers(arch: Architecture, stage: int, pp: int, vpp: int) -> list[range]:
    """Returns the global layer numbers of each virtual stage of pipeline stage `stage`."""
    per = arch.num_layers // (pp * vpp)
    return [range((v * pp + stage) * per, (v * pp + stage + 1) * per) for v in range(vpp)]


def chunk_parameters(
    hf: dict[str, Tensor],
    arch: Architecture,
    layers: Iterable[int],
    tp: tuple[int, int] = (0, 1),
    ep: tuple[int, int] = (0, 1),
    etp: tuple[int, int] = (0, 1),
    transformer_engine: bool = False,
) -> dict[str, Tensor]:
    """Returns the parameters of one virtual stage by their Megatron-Core names; tp, ep, etp are (rank, size)."""
    layers = list(layers)
    tp_rank, tp_size = tp
    found: dict[str, Tensor] = {}

    def vocabulary(name: str) -> Tensor:
        padded = -(-arch.vocab_size // tp_size) * tp_size
        full = torch.zeros(padded, arch.hidden_size)
        full[: arch.vocab_size] = hf[name]
        return full.chunk(tp_size)[tp_rank]

    if 0 in layers:
        found["embedding.word_embeddings.weight"] = vocabulary("model.embed_tokens.weight")
    for local, layer in enumerate(layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in hf.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        for name, tensor in _layer(own, arch, layer, tp, ep, etp, transformer_engine).items():
            found[f"decoder.layers.{local}.{name}"] = tensor
    if arch.num_layers - 1 in layers:
        found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not arch.tied_embeddings:
            found["output_layer.weight"] = vocabulary("lm_head.weight")
        elif 0 not in layers:
            found["output_layer.weight"] = vocabulary("model.embed_tokens.weight")
    return found


def _layer(own, arch, layer, tp, ep, etp, transformer_engine) -> dict[str, Tensor]:
    tp_rank, tp_size = tp
    groups = arch.num_kv_heads
    q, k, v = (own[f"self_attn.{x}_proj.weight"].view(groups, -1, arch.head_dim, arch.hidden_size) for x in "qkv")
    mixed = torch.cat([q, k, v], dim=1).reshape(-1, arch.hidden_size)
    moe = bool(arch.num_experts) and layer not in arch.dense_layers
    input_norm = "self_attention.linear_qkv.layer_norm_weight" if transformer_engine else "input_layernorm.weight"
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if transformer_engine and not moe else "pre_mlp_layernorm.weight"
    found = {
        input_norm: own["input_layernorm.weight"],
        "self_attention.linear_qkv.weight": mixed.chunk(tp_size)[tp_rank],
        "self_attention.q_layernorm.weight": own["self_attn.q_norm.weight"],
        "self_attention.k_layernorm.weight": own["self_attn.k_norm.weight"],
        "self_attention.linear_proj.weight": own["self_attn.o_proj.weight"].chunk(tp_size, dim=1)[tp_rank],
        mlp_norm: own["post_attention_layernorm.weight"],
    }

    def mlp(prefix: str, rank: int, size: int) -> tuple[Tensor, Tensor]:
        gate, up, down = (own[f"{prefix}.{x}_proj.weight"] for x in ("gate", "up", "down"))
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]]), down.chunk(size, dim=1)[rank]

    if not moe:
        found["mlp.linear_fc1.weight"], found["mlp.linear_fc2.weight"] = mlp("mlp", *tp)
        return found
    found["mlp.router.weight"] = own["mlp.gate.weight"]
    local_experts = arch.num_experts // ep[1]
    pairs = [mlp(f"mlp.experts.{ep[0] * local_experts + e}", *etp) for e in range(local_experts)]
    if transformer_engine:
        for e, (fc1, fc2) in enumerate(pairs):
            found[f"mlp.experts.linear_fc1.weight{e}"], found[f"mlp.experts.linear_fc2.weight{e}"] = fc1, fc2
    else:
        found["mlp.experts.weight1"] = torch.stack([fc1 for fc1, _ in pairs])
        found["mlp.experts.weight2"] = torch.stack([fc2 for _, fc2 in pairs])
    return found


def weight_names(transformer_engine: bool = False) -> WeightNames:
    """Returns the parameter names of the layer provider that chunk_parameters imitates."""
    from megatron_rl.engine.layers.plain_torch import TorchLayers
    from megatron_rl.engine.layers.transformer_engine import TransformerEngineLayers

    provider = TransformerEngineLayers() if transformer_engine else TorchLayers()
    return provider.weight_names


def stage_module(parameters: dict[str, Tensor], layers: Iterable[int]) -> nn.Module:
    """Returns a module with these parameters and names, like a virtual stage of a GPTModel."""
    root = nn.Module()
    for name, tensor in parameters.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(tensor.clone()))
    for local, layer in enumerate(layers):
        root.get_submodule(f"decoder.layers.{local}").layer_number = layer + 1
    return root


_SMALL: dict = {
    "num_layers": 4,
    "hidden_size": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_hidden_size": 24,
    "num_experts": 4,
    "expert_hidden_size": 8,
    "vocab_size": 37,
}
# Arguments of make_tiny_model: experts and one dense layer; tied embeddings.
TINY: dict[str, dict] = {
    "qwen3_moe": {**_SMALL, "family": "qwen3_moe", "mlp_only_layers": [1]},
    "qwen3": {**_SMALL, "family": "qwen3", "tied": True},
}
