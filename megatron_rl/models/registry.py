"""The families of models that this project knows, by the model_type of their config.json. Importable without torch.

Outside of megatron_rl.models nothing asks which family a model is of: an Architecture says what it computes, and the
functions here give what its family's file declares.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

from megatron_rl.models.kinds import WEIGHT_KINDS, WeightKind

if TYPE_CHECKING:  # architecture.py looks families up here
    from megatron_rl.models.architecture import Architecture
    from megatron_rl.models.fields import JsonFields
    from megatron_rl.models.weight import Source, Weight

MODULES = {
    "qwen3_moe": "megatron_rl.models.qwen3_moe",
    "qwen3": "megatron_rl.models.qwen3",
    "qwen3_next": "megatron_rl.models.qwen3_next",
    "qwen3_5_moe": "megatron_rl.models.qwen3_5_moe",
    "qwen2_moe": "megatron_rl.models.qwen2_moe",
    "qwen2": "megatron_rl.models.qwen2",
    "mixtral": "megatron_rl.models.mixtral",
    "olmoe": "megatron_rl.models.olmoe",
    "llama": "megatron_rl.models.llama",
    "deepseek_v3": "megatron_rl.models.deepseek_v3",
    "kimi_k2": "megatron_rl.models.deepseek_v3",
    "deepseek_v2": "megatron_rl.models.deepseek_v2",
    "glm4_moe": "megatron_rl.models.glm4_moe",
    "glm4_moe_lite": "megatron_rl.models.glm4_moe_lite",
    "minimax_m2": "megatron_rl.models.minimax_m2",
    "gpt_oss": "megatron_rl.models.gpt_oss",
}
"""The file of each model_type."""


class Family(Protocol):
    """What a family's file declares. It does not import torch."""

    MODEL_TYPE: str
    CAUSAL_LM: str
    """What transformers calls its language model."""
    VALUE_MODEL: str
    """What transformers calls a model with one number per token in place of the logits, or would call it."""
    INERT: Mapping[str, tuple[Any, ...]]
    """Fields of config.json that change nothing, beside those of every model: with these values, or () for any."""
    UNUSED: tuple[str, ...]
    """Regular expressions for names of tensors that a checkpoint may have in excess."""
    SERVER_FIELDS: tuple[str, ...]
    """Fields without which SGLang 0.5.23 does not start, or computes something else. transformers 5 leaves them out."""

    def read(self, fields: JsonFields, /) -> Architecture:
        """Takes the model's fields from config.json. Raises ModelError."""

    def weights(self, arch: Architecture, /) -> list[Weight]:
        """Lists the model's weights, in the order in which they are exported."""

    def server_caveats(self, arch: Architecture, /) -> Iterable[str]:
        """Says what rollout servers compute otherwise than config.json asks; such a model cannot be served."""


def find_family(model_type: str) -> Family:
    """Raises KeyError for a model_type that is not in MODULES."""
    return cast(Family, importlib.import_module(MODULES[model_type]))


def family_of(arch: Architecture) -> Family:
    return find_family(arch.model_type)


def weights_of(arch: Architecture) -> list[Weight]:
    """The model's weights, in the order in which they are exported."""
    return family_of(arch).weights(arch)


def tensors_of(arch: Architecture) -> dict[tuple[Source, ...], WeightKind]:
    """The model's tensors in Hugging Face's files, in the order in which they are exported: all sources of each, and
    its kind."""
    sources: dict[str, list[Source]] = {}
    kinds: dict[str, WeightKind] = {}
    for weight in weights_of(arch):
        for source in () if weight.copy else weight.sources:
            sources.setdefault(source.name, []).append(source)
            kinds[source.name] = weight.kind
    return {tuple(parts): kinds[name] for name, parts in sources.items()}


def kinds_of(arch: Architecture) -> tuple[WeightKind, ...]:
    """Returns the kinds of weights that the model has, in the order of WEIGHT_KINDS."""
    found = {weight.kind for weight in weights_of(arch)}
    return tuple(kind for kind in WEIGHT_KINDS if kind in found)


def server_caveats(arch: Architecture) -> Iterable[str]:
    """What rollout servers compute otherwise than the model's config.json asks; empty if they serve it."""
    return family_of(arch).server_caveats(arch)
