"""The formulas of activations against what autograd keeps in real small models with layers in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_models import make_family_model
from forks import Forks

from megatron_rl.config.layout import Layout
from megatron_rl.config.recompute import MODULES, check_recompute, read_recompute
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.planner.activations import Workload, layer_bytes, layer_input

BOUND = 0.05
TOKENS = 256
DTYPES = {"bf16": 2, "fp32": 4}
# On a CPU values narrower than keys, and sinks, have no kernel: attention keeps its scores, which the plan leaves out.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen2_moe": {},
    "olmoe": {},
    "llama": {},
    "deepseek_v3": {"v_head_dim": 24},
    "qwen3_next": {},
}
DEFAULT = ("qwen3_moe", "deepseek_v3")


def recomputes(arch: Architecture) -> list[str]:
    """Returns each module that the layers in plain PyTorch can recompute in the model, all together, and all or no
    layers."""
    singly = [name for name in MODULES if not [*check_recompute(read_recompute(name), "torch", "cpu", arch)]]
    together = [name for name in singly if name != "shared_experts"]  # a part of moe
    return ["none", "full", *singly, ",".join(together)]


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in FAMILIES]
)
def test_autograd_keeps_what_was_predicted(forks: Forks, tmp_path: Path, family: str) -> None:
    model = make_family_model(tmp_path / "model", family, **FAMILIES[family])
    cases = [(recompute, dtype) for recompute in recomputes(read_architecture(model)) for dtype in DTYPES]
    (answers,) = forks.world(1, "planner_worker:kept", model, cases, TOKENS)
    for (recompute, dtype), (arch, layers) in zip(cases, answers, strict=True):
        work = Workload(arch, Layout.resolve(ParallelConfig(), 1), TOKENS, DTYPES[dtype])
        predicted, found = layer_input(work) * arch.num_layers, layers.get(-1, 0)
        if recompute != "full":
            predicted = sum(
                [layer_bytes(work, layer).under(read_recompute(recompute)) for layer in range(arch.num_layers)]
            )
            found = sum(layers.values())
        assert predicted == pytest.approx(found, rel=BOUND), (recompute, dtype)
