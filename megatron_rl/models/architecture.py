"""The architecture of a model, read from its Hugging Face config.json. Importable without torch.

Every field of config.json is understood here, or is in the list of fields known not to matter, or is an
error: a field passed over in silence would be a model trained as something that it is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rl.errors import MissingFileError, UserError

Family = Literal["qwen3_moe", "qwen3"]

_CAUSAL_LM: dict[Family, str] = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM"}
VALUE_MODEL: dict[Family, str] = {"qwen3_moe": "Qwen3MoeForTokenClassification", "qwen3": "Qwen3ForTokenClassification"}
"""What transformers calls a model with one number per token in place of the logits."""

# Neither the weights nor what the forward pass computes depends on these.
_NO_MATTER = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "max_window_layers",  # only where use_sliding_window is true, which is an error
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",  # the run's engine.aux_loss_coefficient decides
        "sliding_window",  # as max_window_layers
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


MAX_SHOWN = 200
"""Characters of a value in an error."""
MAX_LISTED = 10
MAX_INTEGER = 10**9
LARGEST_NUMBER = 1e38  # that of float32, in round figures
# Lists as long as these are made of a model's layers and experts; today's largest have 126 and 512.
MAX_LAYERS, MAX_EXPERTS = 1_000, 4_096


class ModelError(UserError, ValueError):
    """A model directory that cannot be read as what its config.json says; names the file and the field or tensor."""


class MissingModelError(ModelError, MissingFileError):
    """A model directory, or a file that belongs in it, that is not there."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model directory. Raises ModelError for anything else, and for a key given twice.

    Raises MissingModelError when there is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _once(path, pairs))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingModelError(f"{path} does not exist; expected a Hugging Face model directory with it") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None
    except ModelError:
        raise
    except RecursionError:
        raise ModelError(f"{path} is not valid JSON: nested too deep") from None
    except ValueError as error:  # also text that is not UTF-8, and integers of thousands of digits
        raise ModelError(f"{path} is not valid JSON: {str(error)[:MAX_SHOWN]}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object; found a {type(content).__name__}")
    return content


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"{path}: {twice[:MAX_SHOWN]} is given twice; keep one")
    return content


@dataclass(frozen=True)
class Architecture:
    """What config.json says of a model; widths are those of the whole model, not of one rank."""

    family: Family
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
    tied_embeddings: bool
    initializer_range: float
    num_experts: int = 0  # 0: no layer has experts, and the next three are 0 and False
    experts_per_token: int = 0
    expert_hidden_size: int = 0
    norm_topk_prob: bool = False
    dense_layers: tuple[int, ...] = ()  # 0-based numbers of the layers without experts; empty if num_experts is 0
    value_head: bool = False  # a critic: one number per token in place of the logits

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (0-based, global) has experts."""
        return self.num_experts > 0 and layer not in self.dense_layers


def read_architecture(model_dir: Path, value_head: bool = False) -> Architecture:
    """The architecture in model_dir/config.json. With `value_head` it is that of a critic, of which the directory of a
    language model lacks no more than the head.

    Raises MissingModelError when there is no such file, and ModelError, naming file, field and value, for a
    field that is missing, unknown, or asks for what this project does not compute.
    """
    path = Path(model_dir) / "config.json"
    content = read_json_object(path)
    return _architecture(_Fields(path, content), value_head)


class _Fields:
    """The fields of one JSON object; each is taken once, and what is left at the end was not understood."""

    def __init__(self, path: Path, content: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self.left = dict(content)
        self.prefix = prefix

    def error(self, name: str, found: object, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {self.prefix}{name} is {_shown(repr(found))}; expected {expected}")

    def _take(self, name: str, default: Any) -> Any:
        if name in self.left:
            return self.left.pop(name)
        if default is None:
            raise ModelError(f"{self.path}: {self.prefix}{name} is missing, and it has no safe default; add it")
        return default

    def integer(self, name: str, default: int | None = None, largest: int = MAX_INTEGER) -> int:
        value = self._take(name, default)
        if type(value) is not int or value < 1:
            raise self.error(name, value, "an integer of at least 1")
        if value > largest:
            raise self.error(name, value, f"an integer of at most {largest}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._take(name, default)
        if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
            raise self.error(name, value, f"a number above 0 and below {LARGEST_NUMBER:g}")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        value = self._take(name, default)
        if type(value) is not bool:
            raise self.error(name, value, "true or false")
        return value

    def must_be(self, name: str, *allowed: Any) -> None:
        """Takes a field that may be absent, and otherwise has one of these values."""
        value = self.left.pop(name, allowed[0])
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            choices = " or ".join(json.dumps(choice) for choice in allowed)
            raise self.error(name, value, f"{choices}; no other value is supported")

    def end(self) -> None:
        unknown = {name: value for name, value in self.left.items() if name not in _NO_MATTER}
        if unknown:
            fields = [f"{self.prefix}{name} = {json.dumps(value)}" for name, value in unknown.items()]
            listed = ", ".join(map(_shown, fields[:MAX_LISTED]))
            listed += f" and {len(fields) - MAX_LISTED} more" if len(fields) > MAX_LISTED else ""
            raise ModelError(
                f"{self.path}: not understood: {listed}; if it changes nothing in the model, remove it there"
            )


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _architecture(fields: _Fields, value_head: bool) -> Architecture:
    family = _family(fields, value_head)
    fields.must_be("hidden_act", "silu")
    fields.must_be("attention_bias", False)
    fields.must_be("attention_dropout", 0.0, 0)
    fields.must_be("use_sliding_window", False)
    fields.must_be("is_encoder_decoder", False)
    fields.must_be("quantization_config", None)

    num_layers = fields.integer("num_hidden_layers", largest=MAX_LAYERS)
    layer_types = fields.left.pop("layer_types", None)
    if layer_types not in (None, ["full_attention"] * num_layers):
        raise fields.error("layer_types", layer_types, f'"full_attention" for each of the {num_layers} layers')
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    # transformers and SGLang both derive head_dim so for qwen3_moe; for qwen3 its absence would mean 128.
    derived = hidden_size // num_heads if family == "qwen3_moe" and hidden_size % num_heads == 0 else None

    moe = _moe(fields, num_layers) if family == "qwen3_moe" else {}
    architecture = Architecture(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.integer("head_dim", derived),
        vocab_size=fields.integer("vocab_size"),
        ffn_hidden_size=fields.integer("intermediate_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tied_embeddings=fields.boolean("tie_word_embeddings"),
        initializer_range=fields.number("initializer_range", 0.02),
        value_head=value_head,
        **moe,
    )
    fields.end()
    return architecture


def _family(fields: _Fields, value_head: bool) -> Family:
    model_type = fields.left.pop("model_type", None)
    for family, causal_lm in _CAUSAL_LM.items():
        if model_type == family:
            with_head = [[VALUE_MODEL[family]]] if value_head else []
            fields.must_be("architectures", [causal_lm], *with_head, None)
            return family
    raise fields.error("model_type", model_type, " or ".join(_CAUSAL_LM))


def _moe(fields: _Fields, num_layers: int) -> dict[str, Any]:
    # transformers 5 writes num_local_experts, earlier versions num_experts.
    names = [name for name in ("num_experts", "num_local_experts") if name in fields.left]
    counts = {fields.integer(name, largest=MAX_EXPERTS) for name in names or ["num_experts"]}
    if len(counts) > 1:
        raise fields.error("num_experts", sorted(counts), "the same number as num_local_experts")
    num_experts = counts.pop()
    experts_per_token = fields.integer("num_experts_per_tok")
    if experts_per_token > num_experts:
        raise fields.error("num_experts_per_tok", experts_per_token, f"at most num_experts = {num_experts}")
    step = fields.integer("decoder_sparse_step", 1)
    mlp_only = fields.left.pop("mlp_only_layers", None) or []
    if not isinstance(mlp_only, list) or any(type(n) is not int or not 0 <= n < num_layers for n in mlp_only):
        raise fields.error("mlp_only_layers", mlp_only, f"a list of layer numbers from 0 to {num_layers - 1}")
    return {
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "expert_hidden_size": fields.integer("moe_intermediate_size"),
        "norm_topk_prob": fields.boolean("norm_topk_prob"),
        "dense_layers": tuple(n for n in range(num_layers) if n in mlp_only or (n + 1) % step),
    }


def _rope_theta(fields: _Fields) -> float:
    """transformers 5 writes rope_parameters; earlier versions write rope_theta and rope_scaling."""
    thetas = [fields.number("rope_theta")] if "rope_theta" in fields.left else []
    for name in ("rope_parameters", "rope_scaling"):
        content = fields.left.pop(name, None)
        if content is None:
            continue
        if not isinstance(content, dict):
            raise fields.error(name, content, "an object, or null")
        rope = _Fields(fields.path, content, prefix=f"{name}.")
        rope.must_be("rope_type", "default")
        rope.must_be("type", "default")
        rope.must_be("partial_rotary_factor", 1.0, 1)
        if "rope_theta" in rope.left:
            thetas.append(rope.number("rope_theta"))
        rope.end()
    if not thetas:
        return fields.number("rope_theta")  # raises: it is missing
    if len(set(thetas)) > 1:
        raise fields.error("rope_theta", thetas, "one value; rope_theta and rope_parameters.rope_theta differ")
    return thetas[0]
