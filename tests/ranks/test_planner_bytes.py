"""The plan's bytes of weights, gradients and optimizer are those that real ranks hold, in layouts of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_models import make_family_model
from forks import Forks
from planner_worker import KINDS

from megatron_rl.config.layout import parse_layout

BOUND = 0.05
LAYOUTS = ["tp=2", "pp=2,vpp=2", "cp=2,dp=2", "ep=2,dp=4", "tp=2,ep=2,etp=2", "pp=2,ep=2", "tp=2,cp=2,ep=4"]
CASES = [
    pytest.param("qwen3_moe", "tp=2,pp=2,ep=2", "bf16", False, id="tp=2,pp=2,ep=2"),
    *(
        pytest.param("qwen3_moe", text, dtype, False, id=f"{text}-{dtype}", marks=pytest.mark.slow)
        for text in LAYOUTS
        for dtype in ("bf16", "fp32")
    ),
    pytest.param("deepseek_v3", "tp=2,pp=2,ep=2", "bf16", False, id="latent", marks=pytest.mark.slow),
    pytest.param("gpt_oss", "pp=2,ep=2,etp=2", "bf16", False, id="biases", marks=pytest.mark.slow),
    pytest.param("qwen3_next", "tp=2,pp=2,ep=2", "fp32", False, id="delta", marks=pytest.mark.slow),
    pytest.param("qwen3_moe", "tp=2,pp=2,ep=2", "bf16", True, id="critic", marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("family", "text", "dtype", "critic"), CASES)
def test_a_rank_holds_what_was_predicted(
    forks: Forks, tmp_path: Path, family: str, text: str, dtype: str, critic: bool
) -> None:
    # Wide enough that DDP's padding, which does not grow with the model, is not what is compared.
    model = make_family_model(tmp_path / "model", family, hidden_size=256, vocab_size=1024)
    _, ranks = parse_layout(text)
    found = forks.world(ranks, "planner_worker:held", model, text, dtype, critic)
    (predicted,) = forks.world(1, "planner_worker:predicted", model, text, dtype, critic)
    for real, (built, counted) in zip(found, predicted, strict=True):
        for kind in KINDS:
            assert built[kind] == pytest.approx(real[kind], rel=BOUND), kind
            assert counted[kind] == pytest.approx(real[kind], rel=BOUND), kind


def test_a_build_without_values_allocates_nothing(forks: Forks, tmp_path: Path) -> None:
    model = make_family_model(tmp_path / "model", "qwen3_moe")
    assert forks.world(1, "planner_worker:devices", model, "tp=2,pp=2,ep=2") == [{"meta"}]
