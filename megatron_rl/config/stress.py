"""The section `weights.stress`: what is done to the weights that the servers get. No torch.

`kind` names what is done. A later layer that names another kind replaces the section.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron_rl.config.bounds import Frozen
from megatron_rl.models.architecture import Architecture

Target = Literal["attention", "mlp", "expert", "router", "embedding", "head"]

QUANTISED: tuple[Target, ...] = ("attention", "mlp", "expert")
"""The kinds of weights that SGLang's and vLLM's fp8 quantise: linear layers and experts, but no router and no head."""


def _check_targets(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    if not targets or len(set(targets)) < len(targets):
        raise PydanticCustomError("targets", "one kind of weights or more, each once")
    return targets


Targets = Annotated[tuple[Target, ...], AfterValidator(_check_targets)]


class NoStress(Frozen):
    kind: Literal["none"] = "none"
    """Servers get the trainer's weights."""


class Stress(Frozen):
    kind: Literal["fp8", "int8", "int4", "noise"]
    """Selects this kind."""
    targets: Targets | None = None
    """Kinds of weights that are stressed. attention: its projections; mlp: dense MLPs; embedding: word embeddings, the
    output layer too if it is the same tensor; head: an output layer of its own. Norms are never stressed. Defaults to
    null: attention, mlp and expert, which SGLang and vLLM quantise in fp8."""


class Fp8(Stress):
    """Rounds weights to fp8 e4m3 and back."""

    kind: Literal["fp8"] = "fp8"
    """Selects this kind."""
    scale: Literal["block", "tensor"] = "block"
    """block: a scale for each block of 128 x 128, as in published fp8 checkpoints of DeepSeek-V3 [2412.19437]; tensor:
    one for each tensor of the model's files."""


class Integer(Stress):
    """Rounds weights to integers and back: -127 to 127, or -7 to 7. Each row has a scale for every 128 input columns,
    which maps the group's largest absolute weight to the largest integer."""

    kind: Literal["int8", "int4"]
    """Selects the number of bits."""


class Noise(Stress):
    """Multiplies each weight by 1 + size * N(0, 1). The noise depends on the run's seed, the weight version and the
    tensor's name."""

    kind: Literal["noise"] = "noise"
    """Selects this kind."""
    size: Annotated[float, Field(gt=0, le=10)]
    """Standard deviation of a weight's relative change."""


StressConfig = Annotated[NoStress | Fp8 | Integer | Noise, Field(discriminator="kind")]


def check_stress(stress: NoStress | Stress, route: str, arch: Architecture) -> Iterator[str]:
    """Yields one line for each target that the model does not have, and one if weights.route cannot stress."""
    if isinstance(stress, NoStress):
        return
    if route == "delta":
        yield (
            "weights.route: delta sends what changed in each rank's shards, and weights.stress changes whole tensors; "
            "set weights.route to disk or collective"
        )
    held = held_targets(arch)
    for target in stress.targets or ():
        if target not in held:
            yield f"weights.stress.targets: {target}, but the model has no such weights; it has {', '.join(held)}"


def held_targets(arch: Architecture) -> tuple[Target, ...]:
    """Returns the targets that the model has."""
    has_experts = {arch.is_moe(layer) for layer in range(arch.num_layers)}
    dense: tuple[Target, ...] = ("mlp",) if False in has_experts else ()
    sparse: tuple[Target, ...] = ("expert", "router") if True in has_experts else ()
    head: tuple[Target, ...] = () if arch.tied_embeddings else ("head",)
    return ("attention", *dense, *sparse, "embedding", *head)
