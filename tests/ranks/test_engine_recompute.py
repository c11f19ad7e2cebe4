"""Activations that the backward pass computes again change no gradient, whichever they are; routers run again with them
as often as they should (RoutingPass counts)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from family_models import make_family_model
from forks import Forks
from settings_worker import Case
from tiny_models import make_tiny_model

from megatron_rl.config.recompute import MODULES, OF_TRANSFORMER_ENGINE

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_experts": 4, "expert_hidden_size": 16}
FAMILIES = ("deepseek_v3", "qwen3_next", "gpt_oss")
"""Latent attention with a dense layer and a shared expert; delta networks and a gated shared expert; sinks."""
OURS = [name for name in MODULES if name not in OF_TRANSFORMER_ENGINE]
FROZEN = (("freeze", ("embedding", "attention")),)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recompute")
    make_tiny_model(root / "model", mlp_only_layers=(1,), **SIZES)
    for family in FAMILIES:
        make_family_model(root / family, family)
    return root


def recomputing(case: Case, recompute: str) -> Case:
    return replace(case, engine=(("recompute", recompute),))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "case", "kinds"),
    [
        (1, Case(), ["full", "full:2", "core_attn,layernorm", "mlp,moe"]),
        (1, Case(model="deepseek_v3"), ["layernorm,mlp,shared_experts", "moe"]),
        (1, Case(optim=FROZEN), ["layernorm", "moe", "full:1"]),
        (2, Case(layout="pp=2,vpp=2"), ["full:1", "layernorm,moe"]),
        *(
            pytest.param(1, Case(model=family, critic=critic), ["full:1", *OURS], marks=pytest.mark.slow)
            for family in FAMILIES
            for critic in (False, True)
        ),
        *(
            pytest.param(ranks, Case(layout=layout), ["full:2", *OURS], marks=pytest.mark.slow)
            for layout, ranks in (("tp=2", 2), ("cp=2,ep=2", 2), ("pp=2,vpp=2", 2), ("tp=2,pp=2,ep=2", 4))
        ),
    ],
)
def test_recomputation_changes_no_result(forks: Forks, models: Path, ranks: int, case: Case, kinds: list[str]) -> None:
    present = [kind for kind in kinds if kind != "shared_experts" or case.model in FAMILIES[:2]]
    cases = [case, *(recomputing(case, kind) for kind in present)]
    for plain, *others in forks.world(ranks, "settings_worker:main", models, cases):
        for kind, found in zip(present, others, strict=True):
            # Gradients of what is computed again are added up in another order, if it is used beside other things.
            bound = 1e-5 if "layernorm" in kind or "shared_experts" in kind else 0.0
            assert found["norm"] == pytest.approx(plain["norm"], rel=bound, abs=0.0), kind
            for before, after in zip(plain["weights"], found["weights"], strict=True):
                assert before.keys() == after.keys()
                for name, weight in before.items():
                    assert (after[name] - weight).abs().max() <= bound * weight.abs().max(), (kind, name)
