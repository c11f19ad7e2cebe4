"""Transformer Engine's layers against plain PyTorch layers, without a GPU: its real Python over support/te_stub."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from te_layers import BOUNDS, compare, make_model
from te_worker import FROZEN
from weight_kinds import kind_of

OLDER = "te-before-2.13"
"""Until 2.13 Transformer Engine marks the experts' weights itself; see engine/stages.py."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("te") / "model")


@pytest.fixture(
    scope="module",
    params=[
        ("te", (2,)),
        pytest.param(("te", (1, 4)), marks=pytest.mark.slow),
        pytest.param((OLDER, (1, 2, 4)), marks=pytest.mark.slow),
    ],
    ids=["2", "1 and 4", "before 2.13"],
)
def answers(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Results by layout and provider, for a version of Transformer Engine and one or more numbers of ranks."""
    name, worlds = request.param
    # Among the environment's packages `layers: auto` would find it.
    directory = Path(sys.prefix) / name
    if not directory.is_dir():
        pytest.skip(f"no Transformer Engine in {directory}; make install puts it there")
    return compare(sys.executable, model, directory, tmp_path_factory.mktemp("answers"), worlds)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.distributed
def test_log_probs_and_gradients_equal_plain_pytorch(answers: dict[str, dict[str, Any]]) -> None:
    for layout, found in answers.items():
        assert 0 <= found["logprobs_apart"] <= BOUNDS["log-probs"], layout
        te, plain = found["te"]["gradients"], found["torch"]["gradients"]
        assert te.keys() == plain.keys()
        for name, gradient in plain.items():
            assert apart(te[name], gradient) <= BOUNDS["gradients"] * float(gradient.abs().max()), (layout, name)


@pytest.mark.distributed
def test_gradient_norms_equal_plain_pytorch_for_each_kind_of_weight(answers: dict[str, dict[str, Any]]) -> None:
    for layout, found in answers.items():
        assert found["torch"]["norms"][0]["expert"] > 1
        for te, plain in zip(found["te"]["norms"], found["torch"]["norms"], strict=True):
            assert te == pytest.approx(plain, rel=BOUNDS["norms"]), layout


@pytest.mark.distributed
def test_the_gradient_norm_of_each_layers_router_is_that_of_its_gradient(answers: dict[str, dict[str, Any]]) -> None:
    for layout, found in answers.items():
        norms, gradients = found["torch"]["norms"][0], found["torch"]["gradients"]
        layers = {f"router/layer_{layer:02d}": f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 2, 3)}
        assert {name for name in norms if "/" in name} == layers.keys()
        for norm, gradient in layers.items():
            assert norms[norm] == pytest.approx(float(gradients[gradient].double().norm()), rel=1e-4), layout
        assert math.hypot(*(norms[name] for name in layers)) == pytest.approx(norms["router"], rel=1e-9)


@pytest.mark.distributed
def test_weights_equal_plain_pytorch_after_two_updates(answers: dict[str, dict[str, Any]]) -> None:
    for layout, found in answers.items():
        te, plain = found["te"], found["torch"]
        assert te["copies_apart"] == plain["copies_apart"] == 0.0, layout
        assert te["weights"].keys() == plain["weights"].keys()
        for name, weight in plain["weights"].items():
            assert apart(te["weights"][name], weight) <= BOUNDS["weights"], (layout, name)


@pytest.mark.distributed
def test_frozen_weights_stay_and_the_others_equal_plain_pytorch(
    answers: dict[str, dict[str, Any]], model: Path
) -> None:
    before = load_file(model / "model.safetensors")
    parallel = {layout: found for layout, found in answers.items() if ",ep=" in layout}
    assert parallel
    for layout, found in parallel.items():
        te, plain = found["te"], found["torch"]
        for name, weight in plain["partial_weights"].items():
            is_frozen = kind_of(name) in FROZEN
            assert torch.equal(te["partial_weights"][name], before[name]) == is_frozen, (layout, name)
            assert apart(te["partial_weights"][name], weight) <= BOUNDS["weights"], (layout, name)
        for mine, theirs in zip(te["partial_norms"], plain["partial_norms"], strict=True):
            assert {*mine} == {"expert", "other"}
            assert mine == pytest.approx(theirs, rel=BOUNDS["norms"]), layout


@pytest.mark.distributed
def test_its_linear_layers_add_weight_gradients_to_the_buffers_themselves(answers: dict[str, dict[str, Any]]) -> None:
    for found in answers.values():
        assert len(found["te"]["fused"]) >= 8
        assert all(found["te"]["fused"])


@pytest.mark.distributed
def test_each_kind_of_fp8_is_a_recipe_of_transformer_engine(answers: dict[str, dict[str, Any]]) -> None:
    for found in answers.values():
        assert found["te"]["fp8"] == {
            "tensorwise": ("Float8CurrentScaling", "HYBRID"),
            "blockwise": ("Float8BlockScaling", "E4M3"),
            "mxfp8": ("MXFP8BlockScaling", "E4M3"),
        }


@pytest.mark.distributed
def test_only_our_own_attention_receives_an_attention_plan(answers: dict[str, dict[str, Any]]) -> None:
    """Under context parallelism the masks of a plan take 512 MiB for a sequence of 32k tokens."""
    for found in answers.values():
        assert (any(found["te"]["attention_plans"]), all(found["torch"]["attention_plans"])) == (False, True)
