"""The families of models that this project knows."""

from __future__ import annotations

from megatron_rl.models import qwen3, qwen3_moe
from megatron_rl.models.weight import Family

FAMILIES: dict[str, Family] = {
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
