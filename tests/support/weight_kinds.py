"""The kind of a weight by its Hugging Face name: a second classification, to compare the package's with."""

from __future__ import annotations

import re

RULES = (
    (r"model\.layers\.\d+\.mlp\.gate\.weight", "router"),
    (r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight", "expert"),
    (r"model\.layers\.\d+\.self_attn\.([qkvo]_proj|[qk]_norm)\.weight", "attention"),
    (r"model\.embed_tokens\.weight|lm_head\.weight", "embedding"),
    (r"model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight|model\.norm\.weight", "other"),
    (r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight", "other"),
    (r"score\.(weight|bias)", "value_head"),
)


def kind_of(name: str) -> str:
    """Raises ValueError unless exactly one rule fits."""
    (kind,) = (kind for pattern, kind in RULES if re.fullmatch(pattern, name))
    return kind
