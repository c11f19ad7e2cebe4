"""Every family against transformers: log-probs and gradients in six kinds of layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from family_models import FAMILIES, make_family_model
from parity_checks import Compare, check

from megatron_rl.models.architecture import read_architecture

LAYOUTS = {
    "moe": ["tp=1", "tp=2", "pp=2,vpp=2", "cp=2,ep=2", "tp=2,ep=2,etp=2", "tp=2,pp=2,ep=2"],
    "dense": ["tp=1", "tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "tp=2,pp=2"],
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = make_family_model(tmp_path_factory.mktemp("family") / family, family)
        return made[family]

    return model


def layouts_of(model: Path) -> list[str]:
    return LAYOUTS["moe" if read_architecture(model).num_experts else "dense"]


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers(
    compare: Compare, model_of: Callable[[str], Path], tokens: Path, family: str
) -> None:
    """In the layout that cuts most of it; the slow test has the others, and recomputation."""
    model = model_of(family)
    check(compare, model, tokens, layouts_of(model)[-1:])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers_in_every_layout(
    compare: Compare, model_of: Callable[[str], Path], tokens: Path, family: str, recompute: str
) -> None:
    model = model_of(family)
    check(compare, model, tokens, layouts_of(model), recompute)
