"""engine.fp8: what matrix products in fp8 ask of the run, the layout and the model. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_rl.config.schema import EngineConfig, RoutingConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.models.architecture import Architecture

if TYPE_CHECKING:
    from megatron_rl.config.layout import Layout


def fp8_multiple(engine: EngineConfig) -> int:
    """Returns what both sides of each matrix divide by: a rank's tokens and the model's widths on it."""
    return {"none": 1, "mxfp8": 32}.get(engine.fp8, 16)


def check_fp8(layout: Layout, arch: Architecture, engine: EngineConfig) -> Iterator[str]:
    if engine.fp8 == "none":
        return
    if engine.layers == "torch" or engine.device == "cpu":
        why = "engine.layers is torch" if engine.layers == "torch" else "engine.device is cpu"
        yield f"engine.fp8: {engine.fp8} needs Transformer Engine's layers, but {why}; set it to none"
    if engine.dtype == "fp32":
        yield f"engine.fp8: {engine.fp8} needs engine.dtype bf16, but that is fp32; set it to none"
    multiple = fp8_multiple(engine)
    for what, width, key, ranks in _widths(layout, arch):
        if width % (ranks * multiple):
            cut, smaller = (f" at {key} {ranks}", f", or take a smaller {key}") if ranks > 1 else ("", "")
            yield (
                f"engine.fp8: {engine.fp8} needs matrices whose sides divide by {multiple}, but a rank has "
                f"{width / ranks:g} {what}{cut}; set it to none{smaller}"
            )


def _widths(layout: Layout, arch: Architecture) -> Iterator[tuple[str, int, str, int]]:
    """Yields sides of weights: what they are, how many, and the degree that cuts them with its size."""
    tp, etp = ("parallel.tp", layout.tp), ("parallel.etp", layout.etp)
    yield "features of hidden states", arch.hidden_size, "parallel.tp", 1
    if arch.latent is None:
        yield "rows of queries, keys and values", (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim, *tp
        yield "outputs of attention", arch.num_heads * arch.head_dim, *tp
    if arch.dense_layers or not arch.num_experts:
        yield "features of the dense MLP", arch.ffn_hidden_size, *tp
    if arch.shared_hidden_size:
        yield "features of the shared expert", arch.shared_hidden_size, *tp
    if arch.num_experts:
        yield "features of each expert", arch.expert_hidden_size, *etp


def check_replay(routing: RoutingConfig, engine: EngineConfig) -> Iterator[str]:
    if routing.replay != "none" and engine.fp8 != "none":
        yield (
            f"routing.replay: {routing.replay}, but engine.fp8 is {engine.fp8}, and no certificate says that routes "
            "are replayed under it; set one of the two to none"
        )


def refuse_fp8(engine: EngineConfig) -> None:
    """Raises ConfigError for a study, which replays routes and compares passes that differ by rounding."""
    if engine.fp8 != "none":
        raise ConfigError(f"engine.fp8: {engine.fp8}, under which no routes are replayed yet; set it to none")
