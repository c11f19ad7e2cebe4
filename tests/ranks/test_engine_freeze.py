"""Frozen weights stay as they are, bit by bit, and all others train as if nothing were frozen; in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from freeze_worker import Case
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from weight_kinds import kind_of

Answer = dict[str, Any]
ALL = ("router", "expert", "attention", "embedding", "other")
SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_experts": 4, "expert_hidden_size": 16}
# The gradient's share in a step is linear here: Adam's first step is lr * g / (|g| + eps), and g is far below eps.
LINEAR = (("lr", 1.0), ("eps", 1.0))

EMBEDDING = Case(freeze=("embedding",), recompute="full")
EXPERTS_TRAIN = Case(freeze=("router", "attention", "embedding", "other"))
HEAD_TRAINS = Case(freeze=ALL, critic=True)
ALONE = [
    Case(freeze=("router", "attention")),
    Case(freeze=("router", "expert")),
    EMBEDDING,
    EXPERTS_TRAIN,
    replace(EXPERTS_TRAIN, model="late", recompute="full"),
    replace(EMBEDDING, model="tied", recompute="none"),
    HEAD_TRAINS,
    Case(model="tied"),
]
TWO_RANKS = [
    replace(ALONE[0], layout="tp=2"),
    replace(ALONE[1], layout="dp=2", recompute="full"),
    replace(EMBEDDING, layout="pp=2,vpp=2"),
    replace(EXPERTS_TRAIN, layout="cp=2,ep=2"),
    replace(ALONE[4], layout="pp=2"),  # the first stage has dense layers alone, so it is frozen as a whole
    replace(ALONE[5], layout="pp=2"),
    replace(HEAD_TRAINS, layout="pp=2"),
    replace(ALONE[7], layout="pp=2"),  # both stages hold the embeddings, which count once in the norm
]
FOUR_RANKS = [replace(ALONE[0], layout="tp=2,pp=2,ep=2", recompute="full"), replace(ALONE[1], layout="tp=2,ep=2,etp=2")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("freeze")
    make_tiny_model(root / "model", mlp_only_layers=(1,), **SIZES)
    make_tiny_model(root / "late", mlp_only_layers=(0, 1), **SIZES)
    make_tiny_model(root / "tied", mlp_only_layers=(1,), tied=True, **SIZES)
    return root


@pytest.fixture(scope="module")
def alone(forks: Forks, models: Path) -> dict[Case, Answer]:
    """Answers of one rank by case, layout and recomputation left out."""
    answers = forks.world(1, "freeze_worker:main", models, ALONE)[0]
    return {plain(case): answer for case, answer in zip(ALONE, answers, strict=True)}


def plain(case: Case) -> Case:
    return replace(case, layout="tp=1", recompute="none")


def compared(models: Path, case: Case, answer: Answer) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields name, weight before and weight after."""
    before = load_file(models / case.model / "model.safetensors")
    for name, weight in answer["weights"].items():
        yield name, before.get(name, torch.zeros_like(weight)).to(weight.dtype), weight  # a critic's head begins at 0


def assert_frozen(models: Path, case: Case, answer: Answer) -> None:
    for name, before, after in compared(models, case, answer):
        is_frozen = kind_of(name) in case.freeze
        assert torch.equal(before, after) == is_frozen, (case, name)
        if not is_frozen and case.dtype == "fp32":
            assert (before != after).any(dim=-1).all(), (case, name)  # no row, and so no rank's shard, stays


def trained_kinds(case: Case) -> set[str]:
    return {*ALL, *(["value_head"] if case.critic else [])} - {*case.freeze}


@pytest.mark.distributed
def test_frozen_weights_stay_and_all_others_move(models: Path, alone: dict[Case, Answer]) -> None:
    for case, answer in alone.items():
        assert_frozen(models, case, answer)
        assert len(answer["weights"]) > 60


@pytest.mark.distributed
def test_frozen_weights_have_neither_gradients_nor_optimizer_state(models: Path, alone: dict[Case, Answer]) -> None:
    for case, answer in alone.items():
        trained = sum(w.numel() for name, w in answer["weights"].items() if kind_of(name) not in case.freeze)
        assert answer["stored"] == (trained, trained), case
        assert {name for name in answer["norms"][0] if "/" not in name} == trained_kinds(case)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, TWO_RANKS), pytest.param(4, FOUR_RANKS, marks=pytest.mark.slow)],
    ids=["2 ranks", "4 ranks"],
)
def test_results_do_not_depend_on_the_layout(
    forks: Forks, models: Path, alone: dict[Case, Answer], ranks: int, cases: list[Case]
) -> None:
    answers = forks.world(ranks, "freeze_worker:main", models, cases)
    for number, case in enumerate(cases):
        answer, expected = answers[0][number], alone[plain(case)]
        assert_frozen(models, case, answer)
        for name, weight in expected["weights"].items():
            found = answer["weights"][name]
            assert (found - weight).abs().max() <= 1e-4 * weight.abs().max(), (case, name)
        for found, wanted in zip(answer["norms"], expected["norms"], strict=True):
            assert found == pytest.approx(wanted, rel=1e-3), case
        assert all(rank[number]["norms"] == answer["norms"] for rank in answers)


# ---- nothing else changes --------------------------------------------------------------------------------------

FREEZES: list[tuple[str, ...]] = [
    (),
    ("router",),
    ("embedding",),
    ("attention",),
    ("expert", "other"),
    ("expert", "attention", "embedding", "other"),
    ("router", "attention", "embedding", "other"),
]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_trained_weights_move_as_if_nothing_were_frozen(forks: Forks, models: Path, recompute: str) -> None:
    """In the first step they have the gradients of a run without frozen weights.

    Gradients are clipped to a tenth of the norm over the weights that train, and of the whole norm if all train: the
    gradients are then scaled alike. If frozen weights counted in the clipped norm, they would not be.
    """

    def run(cases: list[Case]) -> list[Answer]:
        return forks.world(1, "freeze_worker:main", models, cases)[0]

    case = Case(steps=1, optim=LINEAR, recompute=recompute)
    (whole,) = run([replace(case, clip=1e9)])
    norms = whole["norms"][0]
    clips = [
        1e-4 * math.hypot(*(norms[kind] for kind in norms if "/" not in kind and kind not in freeze))
        for freeze in FREEZES
    ]
    cases = [replace(case, freeze=freeze, clip=clip) for freeze, clip in zip(FREEZES, clips, strict=True)]
    expected, *answers = run(cases)
    before = load_file(models / "model" / "model.safetensors")
    for one, answer, clip in zip(cases[1:], answers, clips[1:], strict=True):
        assert answer["norm"] == pytest.approx([1e4 * clip], rel=1e-6)
        for name, weight in answer["weights"].items():
            if kind_of(name) in one.freeze:
                assert torch.equal(weight, before[name]), (one, name)
                continue
            moved = expected["weights"][name] - before[name]
            assert (weight - before[name] - moved).abs().max() <= 1e-3 * moved.abs().max(), (one, name)


@pytest.mark.slow
def test_any_subset_of_kinds_can_be_frozen(forks: Forks, models: Path) -> None:
    subsets = [tuple(kind for bit, kind in enumerate(ALL) if number >> bit & 1) for number in range(31)]
    cases = [Case(freeze=freeze, recompute=recompute) for freeze in subsets for recompute in ("none", "full")]
    for case, answer in zip(cases, forks.world(1, "freeze_worker:main", models, cases)[0], strict=True):
        assert_frozen(models, case, answer)


def test_frozen_weights_stay_in_bf16(forks: Forks, models: Path) -> None:
    case = Case(freeze=("router", "attention"), dtype="bf16", optim=(("lr", 1e-1), ("weight_decay", 0.1)))
    (answer,) = forks.world(1, "freeze_worker:main", models, [case])[0]
    assert_frozen(models, case, answer)
    assert {weight.dtype for weight in answer["weights"].values()} == {torch.bfloat16}
