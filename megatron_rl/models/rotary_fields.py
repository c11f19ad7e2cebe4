"""Fields of config.json on rotary position embedding. Importable without torch.

transformers 5 writes rope_parameters; earlier versions write rope_theta, rope_scaling and partial_rotary_factor.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_rl.models.architecture import RampedRope, Yarn
from megatron_rl.models.fields import JsonFields

# In models that see images: which elements turn with which coordinate. Those of text are all the same.
_OF_IMAGES: dict[str, tuple[Any, ...]] = {"mrope_interleaved": (), "mrope_section": ()}


def read_rotary(fields: JsonFields, partial: float | None = None) -> dict[str, Any]:
    """Takes what config.json says of rotary positions, as fields of Architecture. Raises ModelError.

    `partial`: the share of each head that turns if config.json has no partial_rotary_factor; None if the family's
    heads always turn whole.
    """
    thetas = {fields.number("rope_theta")} if "rope_theta" in fields.left else set()
    shares = {fields.number("partial_rotary_factor")} if "partial_rotary_factor" in fields.left else set()
    scaling: Yarn | RampedRope | None = None
    for name in ("rope_parameters", "rope_scaling"):
        content = fields.left.pop(name, None)
        if content is None:
            continue
        if not isinstance(content, dict):
            raise fields.error(name, content, "an object, or null")
        known = {field: value for field, value in content.items() if value is not None}
        rope = JsonFields(fields.path, known, prefix=f"{fields.prefix}{name}.")
        thetas |= {rope.number("rope_theta")} if "rope_theta" in rope.left else set()
        shares |= {rope.number("partial_rotary_factor")} if "partial_rotary_factor" in rope.left else set()
        scaling = _scaling(rope) or scaling
        rope.end(_OF_IMAGES)
    theta = _one(fields, "rope_theta", thetas) if thetas else fields.number("rope_theta")  # raises: it is missing
    share = _one(fields, "partial_rotary_factor", shares) if shares else partial or 1.0
    if share > 1 or (partial is None and share != 1):
        raise fields.error("partial_rotary_factor", share, "1" if partial is None else "a number up to 1")
    return {"rope_theta": theta, "rotary_fraction": share, "rope_scaling": scaling}


def _one(fields: JsonFields, name: str, values: set[float]) -> float:
    if len(values) > 1:
        raise fields.error(name, sorted(values), f"one value; {name} and rope_parameters.{name} differ")
    return values.pop()


def _scaling(rope: JsonFields) -> Yarn | RampedRope | None:
    # Some files have both names of the kind.
    kinds = {name: rope.left.pop(name) for name in ("rope_type", "type") if name in rope.left}
    name, kind = next(iter(kinds.items()), ("rope_type", "default"))
    if any(each != kind for each in kinds.values()):
        raise rope.error("type", kinds["type"], f"{kind}, as rope_type is")
    match kind:
        case "default":
            return None
        case "yarn":
            return _yarn(rope)
        case "llama3":
            return _llama3(rope)
    raise rope.error(name, kind, "default, yarn or llama3")


def _yarn(rope: JsonFields) -> Yarn:
    factor = rope.number("factor")
    if factor <= 1:
        raise rope.error("factor", factor, "a number above 1")
    mscale, all_dim = (rope.left.pop(name, 0) or 0 for name in ("mscale", "mscale_all_dim"))
    for name, value in (("mscale", mscale), ("mscale_all_dim", all_dim)):
        if type(value) not in (int, float) or not 0 <= value <= 10:
            raise rope.error(name, value, "a number from 0 to 10")

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1

    # As transformers has it: without both of them, the paper's own.
    derived = grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1)
    fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
    return Yarn(
        factor=factor,
        original_length=rope.integer("original_max_position_embeddings"),
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=rope.number("attention_factor", derived),
        mscale_all_dim=float(all_dim),
        truncate=rope.boolean("truncate", True),
    )


def _llama3(rope: JsonFields) -> RampedRope:
    # Megatron-Core's embedding, which Transformer Engine's layers use, has these numbers in its code.
    rope.must_be("low_freq_factor", 1.0, 1)
    rope.must_be("high_freq_factor", 4.0, 4)
    rope.must_be("original_max_position_embeddings", 8192)
    return RampedRope(rope.number("factor"), original_length=8192, low_turns=1.0, high_turns=4.0)
