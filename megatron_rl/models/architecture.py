"""The architecture of a model, read from its Hugging Face config.json. Importable without torch.

An Architecture lists features: what the forward pass computes and how large it is. The engine reads these. Which fields
of config.json say so is common to most decoders (decoder_fields.py), or stands in the family's own file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rl.models.fields import JsonFields, ModelError, read_json_object
from megatron_rl.models.quantisation import take_quantisation
from megatron_rl.models.registry import MODULES, find_family

# Neither the weights nor what the forward pass computes depends on these, or not with these values.
INERT: dict[str, tuple[Any, ...]] = dict.fromkeys(
    (
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "max_window_layers",  # only where use_sliding_window is true, which is an error
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",  # the run's engine.aux_loss_coefficient decides
        "sep_token_id",
        "sliding_window",  # as max_window_layers
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        # How transformers before 5 generates, which it wrote into some files.
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "tf_legacy_loss",
        "top_k",
        "top_p",
        "typical_p",
    ),
    (),
) | {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "pruned_heads": ({}, None),
    "tie_encoder_decoder": (False,),
}

QkNorm = Literal["none", "head", "all"]
"""Norms on queries and keys before the rotation. head: over each head, with one weight for all of them; all: over all
heads together."""


@dataclass(frozen=True)
class Yarn:
    """YaRN: rotary frequencies for longer texts [2309.00071]."""

    factor: float
    original_length: int  # in tokens
    beta_fast: float  # turns over the original length from which on a frequency stays as it is
    beta_slow: float  # turns up to which it is divided by the factor
    attention_factor: float  # multiplies cosines and sines
    mscale_all_dim: float = 0.0  # if above 0, the softmax of latent attention gets (0.1 * this * ln(factor) + 1)^2
    truncate: bool = True  # whether the ends of the ramp between the two are whole numbers


@dataclass(frozen=True)
class RampedRope:
    """Rotary frequencies of Llama 3.1: those up to `low_turns` over the original length are divided by the factor."""

    factor: float
    original_length: int
    low_turns: float
    high_turns: float


@dataclass(frozen=True)
class LatentAttention:
    """Widths of multi-head latent attention [DeepSeek-V2, 2405.04434, section 2.1]; it rotates neighbouring pairs."""

    query_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope_dim: int  # of a head's query and key, without positions
    rope_dim: int  # and with: one key for all heads
    value_dim: int


@dataclass(frozen=True)
class ClampedSwiglu:
    """An activation in place of SwiGLU: (up + 1) * gate * sigmoid(alpha * gate), with gate at most `limit` and up
    within -limit and limit (transformers, GptOssExperts)."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class DeltaNet:
    """Gated delta networks [2412.06464] in place of attention: each head keeps a state that decays, after a causal
    convolution over time."""

    layers: tuple[int, ...]  # 0-based numbers of the layers that have one
    key_heads: int
    value_heads: int  # a multiple of key_heads: consecutive ones share a key head
    key_dim: int
    value_dim: int
    kernel: int  # tokens that the convolution sees: one and those before it

    @property
    def values_per_key(self) -> int:
        """Value heads of each key head."""
        return self.value_heads // self.key_heads


@dataclass(frozen=True)
class Router:
    """How a router chooses experts by its logits, and how it weighs those chosen."""

    scores: Literal["softmax", "sigmoid"] = "softmax"  # what the logits become; sigmoids are normalised over the chosen
    pre_softmax: bool = False  # over all experts, unnormalised over those chosen; else over the chosen ones alone
    bias: bool = False  # whether one number for each expert, which does not train, is added to the scores to choose by
    groups: int = 1  # the experts form so many groups, in order, and
    groups_per_token: int = 1  # are chosen from the best of these: by the sum of a group's best scores
    scale: float = 1.0  # multiplies the weights of the chosen


@dataclass(frozen=True)
class Architecture:
    """What config.json says of a model; widths are those of the whole model, not of one rank."""

    model_type: str  # names the file that maps its weights; only megatron_rl.models asks
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    ffn_hidden_size: int  # of a layer without experts
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    qk_norm: QkNorm
    tied_embeddings: bool
    initializer_range: float
    num_experts: int = 0  # 0: no layer has experts, and what follows on experts does not count
    experts_per_token: int = 0
    expert_hidden_size: int = 0
    dense_layers: tuple[int, ...] = ()  # 0-based numbers of the layers without experts; empty if num_experts is 0
    router: Router = Router()
    shared_hidden_size: int = 0  # width of the expert that every token visits; 0: there is none
    shared_gate: bool = False  # whether its output is multiplied by a sigmoid of the token
    clamped: ClampedSwiglu | None = None  # the experts' activation; None: SwiGLU
    qkv_bias: bool = False  # on queries, keys and values
    biases: bool = False  # on every linear layer but the last: of attention, routers and experts
    sinks: bool = False  # whether the softmax of attention has one more logit, learned for each head, without a value
    window: int | None = None  # tokens that a token looks at in the windowed layers, itself included
    windowed_layers: tuple[int, ...] = ()  # 0-based numbers; empty if there is no window
    rotary_fraction: float = 1.0  # of each head, its first elements
    rope_scaling: Yarn | RampedRope | None = None
    latent: LatentAttention | None = None
    output_gate: bool = False  # whether attention's output is multiplied by a sigmoid of the token, made with queries
    zero_centred_norms: bool = False  # whether norms multiply by 1 + weight, but for those of delta networks
    delta_net: DeltaNet | None = None
    predictor_layers: int = 0  # in the files after the others, for several tokens at once: not trained
    value_head: bool = False  # a critic: one number per token in place of the logits

    @property
    def rotary_width(self) -> int:
        """Elements of a head that turn with its position."""
        return self.latent.rope_dim if self.latent else int(self.head_dim * self.rotary_fraction)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token looks at in layer `layer` (0-based, global); None: all before it."""
        return self.window if layer in self.windowed_layers else None

    def has_delta_net(self, layer: int) -> bool:
        """Whether layer `layer` (0-based, global) has a gated delta network in place of attention."""
        return self.delta_net is not None and layer in self.delta_net.layers

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (0-based, global) has experts."""
        return self.num_experts > 0 and layer not in self.dense_layers


IRRELEVANT = ("initializer_range", "predictor_layers")


def differences(found: Architecture, expected: Architecture) -> list[str]:
    """Returns `field value, not value` for each field in which `found` differs from `expected`.

    How a model was initialised says nothing of what it computes, nor do layers that do not take part.
    """
    its, theirs = features_of(found), features_of(expected)
    differing = [field for field in its | theirs if its.get(field) != theirs.get(field)]
    return [f"{field} {its.get(field)}, not {theirs.get(field)}" for field in differing if field not in IRRELEVANT]


def features_of(features: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the fields of a dataclass by name, and those of a dataclass in it as `name.field`."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(features):
        value, name = getattr(features, field.name), f"{prefix}{field.name}"
        found |= features_of(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return found


def refuse_unserved(model_dir: Path, arch: Architecture) -> None:
    """Raises ModelError if model_dir/config.json lacks a field that rollout servers need; this project does without."""
    path = Path(model_dir) / "config.json"
    content = read_json_object(path)
    inner = "text_config." if "text_config" in content else ""
    fields = content.get("text_config", content)
    needed = find_family(arch.model_type).SERVER_FIELDS
    if lacking := [f"{inner}{name}" for name in needed if name not in fields]:
        raise ModelError(
            f"{path} has no {' and no '.join(lacking)}, without which SGLang does not serve a {arch.model_type} "
            "rightly; copy from the published model's"
        )


def read_architecture(model_dir: Path, value_head: bool = False) -> Architecture:
    """Reads the architecture in model_dir/config.json; with `value_head` it is a critic's, whose directory may be that
    of a language model.

    Raises MissingModelError when there is no such file, and ModelError, naming file, field and value, for a
    field that is missing, unknown, or asks for what this project does not compute.
    """
    path = Path(model_dir) / "config.json"
    fields = JsonFields(path, read_json_object(path))
    model_type = fields.left.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in MODULES:
        raise fields.error("model_type", model_type, " or ".join(MODULES))
    family = find_family(model_type)
    with_head = [[family.VALUE_MODEL]] if value_head else []
    fields.must_be("architectures", [family.CAUSAL_LM], *with_head, None)
    take_quantisation(fields)  # how weights are stored changes nothing in what they compute
    architecture = family.read(fields)
    fields.end({**INERT, **family.INERT})
    return dataclasses.replace(architecture, value_head=value_head)
