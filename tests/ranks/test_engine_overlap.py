"""Gradients that are reduced during the backward pass, and weights gathered during the forward pass, are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from settings_worker import Case
from tiny_models import make_tiny_model

SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_experts": 4, "expert_hidden_size": 16}
PLAIN = Case(layout="dp=2", engine=(("overlap", "none"),))
TWO_RANKS = [
    replace(PLAIN, restores=True),
    replace(PLAIN, layout="dp=2,ep=2", optim=(("freeze", ("embedding", "attention")),)),
    replace(PLAIN, model="tied", engine=(("overlap", "none"), ("recompute", "full"))),
    replace(PLAIN, engine=(("overlap", "none"), ("dtype", "bf16"))),
    replace(PLAIN, critic=True),
    replace(PLAIN, layout="cp=2"),
]
FOUR_RANKS = [
    replace(PLAIN, layout="dp=2,pp=2,vpp=2", restores=True),
    replace(PLAIN, layout="dp=2,pp=2"),
    replace(PLAIN, layout="dp=2,pp=2,vpp=2,ep=2", engine=(("overlap", "none"), ("recompute", "full"))),
    replace(PLAIN, layout="dp=2,tp=2,ep=2"),
    replace(PLAIN, layout="dp=2,pp=2", model="tied"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlap")
    make_tiny_model(root / "model", mlp_only_layers=(1,), **SIZES)
    make_tiny_model(root / "tied", mlp_only_layers=(1,), tied=True, **SIZES)
    return root


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "cases", "kinds"),
    [
        (2, TWO_RANKS[:2], ["all"]),
        (4, FOUR_RANKS[:1], ["all"]),
        pytest.param(2, TWO_RANKS, ["grads", "all"], marks=pytest.mark.slow),
        pytest.param(4, FOUR_RANKS, ["grads", "all"], marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "virtual stages", "2 ranks, all", "4 ranks"],
)
def test_overlap_changes_no_result(forks: Forks, models: Path, ranks: int, cases: list[Case], kinds: list[str]) -> None:
    others = [replace(case, engine=(*case.engine, ("overlap", kind))) for case in cases for kind in kinds]
    answers = forks.world(ranks, "settings_worker:main", models, [*cases, *others])
    for rank, answer in enumerate(answers):
        plain = [case for case in answer[: len(cases)] for _ in kinds]
        for case, expected, found in zip(others, plain, answer[len(cases) :], strict=True):
            # Megatron-Core gives later pipeline ranks one bucket: their reduction is not on the critical path.
            assert rank or found["buckets"] > expected["buckets"], case
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-6), case
            for before, after in zip(expected["weights"], found["weights"], strict=True):
                assert before.keys() == after.keys()
                assert all(torch.equal(before[name], after[name]) for name in before), (case, rank)
            for one, other in zip(expected["output"], found["output"], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), (case, rank)
    start, end = answers[0][-1]["weights"]
    assert sum(not torch.equal(end[name], start[name]) for name in end) > len(end) // 2, "no step was made"
