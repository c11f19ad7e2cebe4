"""Rotary embedding against transformers: frequencies, factors, and the rotation of heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_reference import dense_architecture
from paths import ROOT
from transformers import Glm4MoeConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.engine.layers.rotary import Turns, inverse_frequencies, pairs_to_halves, rotate
from megatron_rl.models.architecture import Yarn, read_architecture
from megatron_rl.models.fields import ModelError

BASE = json.loads((ROOT / "tests" / "families" / "qwen2.json").read_text())
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def read(tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **changes}))
    return read_architecture(tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 8, "beta_slow": 2},
        {**YARN, "attention_factor": 1.5},
        {**YARN, "mscale": 0.8, "mscale_all_dim": 0.3},
        {**YARN, "factor": 40.0, "original_max_position_embeddings": 4096, "rope_theta": 1e4},
        LLAMA3,
        {**LLAMA3, "factor": 32.0},
    ],
)
def test_frequencies_and_factors_are_those_of_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    arch = read(tmp_path, head_dim=64, rope_parameters=rope)
    config = Qwen3Config(head_dim=64, max_position_embeddings=512, rope_parameters=dict(rope))
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(arch), frequencies, rtol=1e-6, atol=0)
    if isinstance(arch.rope_scaling, Yarn):
        assert arch.rope_scaling.attention_factor == pytest.approx(factor, rel=1e-6)


def test_turns_multiply_cosine_and_sine_by_the_factor() -> None:
    turns = Turns(torch.tensor([1.0, 0.1]), factor=1.5)
    cosine, sine = turns.at(torch.tensor([0, 2]))
    angles = torch.tensor([2.0, 0.2, 2.0, 0.2])
    assert cosine.shape == (2, 1, 1, 4)
    torch.testing.assert_close(cosine[1, 0, 0], 1.5 * angles.cos())
    torch.testing.assert_close(sine[1, 0, 0], 1.5 * angles.sin())
    assert cosine[0].flatten().tolist() == [1.5] * 4


def test_what_does_not_turn_passes_unchanged() -> None:
    x = torch.randn(3, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    cosine, sine = Turns(torch.tensor([1.0, 0.3]), 1.0).at(torch.tensor([0, 1, 5]))
    turned = rotate(x, cosine, sine)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[0], x[0])
    assert not torch.equal(turned[1, ..., :4], x[1, ..., :4])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_the_gradient_of_a_rotation_is_that_of_its_operations() -> None:
    x = torch.randn(5, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    cosine, sine = (part.double() for part in Turns(torch.tensor([1.0, 0.3, 0.1]), factor=1.5).at(torch.arange(5)))
    assert torch.autograd.gradcheck(lambda each: rotate(each, cosine, sine), (x,))


def test_neighbouring_pairs_come_apart() -> None:
    assert pairs_to_halves(torch.arange(6)[None]).tolist() == [[0, 2, 4, 1, 3, 5]]


def test_half_of_a_glm_head_turns() -> None:
    arch = dense_architecture(head_dim=16, rotary_fraction=0.5, rope_theta=1e4)
    config = Glm4MoeConfig(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    width = 1.0 / (1e4 ** (torch.arange(0, 8, 2).float() / 8))
    torch.testing.assert_close(inverse_frequencies(arch), width)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {**YARN, "factor": 0.5}}, "rope_parameters.factor is 0.5; expected a number above 1"),
        ({"rope_parameters": {**YARN, "rope_type": "longrope"}}, "rope_type is 'longrope'; expected default, yarn or"),
        ({"rope_parameters": {**YARN, "type": "default"}}, "type is 'default'; expected yarn, as rope_type is"),
        ({"rope_parameters": {**YARN, "mscale": -1}}, "mscale is -1; expected a number from 0 to 10"),
        ({"rope_parameters": {**YARN, "slope": 1}}, "not understood: rope_parameters.slope = 1"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "low_freq_factor is 2.0; expected 1.0 or 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1"),
        ({"head_dim": 15}, "head_dim is 15; expected one of which an even number of elements turns"),
    ],
)
def test_what_the_rotation_does_not_know_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as refused:
        read(tmp_path, **changes)
    assert message in str(refused.value)
