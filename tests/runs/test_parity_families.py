"""Every family against transformers: log-probs and gradients in six kinds of layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from family_models import FAMILIES, make_family_model
from parity_checks import Compare, check, layouts_of


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(family: str) -> Path:
        if family not in made:
            made[family] = make_family_model(tmp_path_factory.mktemp("family") / family, family)
        return made[family]

    return model


# These have every feature of attention, routers and experts between them; the slow test has the others.
DISTINCT = ("deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2", "qwen2_moe", "qwen3_next")


@pytest.mark.distributed
@pytest.mark.parametrize("family", DISTINCT)
def test_a_family_equals_transformers(
    compare: Compare, model_of: Callable[[str], Path], tokens: Path, family: str
) -> None:
    """In the layout that cuts most of it; the slow test has all layouts, and recomputation."""
    model = model_of(family)
    check(compare, model, tokens, layouts_of(model)[-1:])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "full", "core_attn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_transformers_in_every_layout(
    compare: Compare, model_of: Callable[[str], Path], tokens: Path, family: str, recompute: str
) -> None:
    model = model_of(family)
    check(compare, model, tokens, layouts_of(model), recompute)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["olmoe", "qwen2"])
def test_several_ranks_may_share_a_key_value_head(compare: Compare, tmp_path: Path, tokens: Path, family: str) -> None:
    """OLMoE norms all key heads together, and Qwen2 has biases; test_parity.py has a norm on each head."""
    model = make_family_model(tmp_path / family, family, num_hidden_layers=2, num_attention_heads=8)
    check(compare, model, tokens, ["tp=4"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "full", "core_attn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_ranks_may_share_the_only_key_value_head(
    compare: Compare, tmp_path: Path, tokens: Path, family: str, recompute: str
) -> None:
    model = make_family_model(tmp_path / family, family, num_key_value_heads=1)
    check(compare, model, tokens, ["tp=2", "tp=4", "tp=2,cp=2", "tp=2,pp=2"], recompute)
