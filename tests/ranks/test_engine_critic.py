"""The critic against transformers' token-classification model with one label, in every kind of layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
import torch
from critic_samples import samples, weight_of
from family_models import FAMILIES, make_family_model
from forks import Forks
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.fields import ModelError
from megatron_rl.models.registry import family_of, tensors_of, weights_of
from megatron_rl.parity import file_gradients

Expected = Callable[[Path], tuple[list[torch.Tensor], dict[str, torch.Tensor]]]

ONE_RANK = ["tp=1"]
TWO_RANKS = ["tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "ep=2", "dp=2"]
FOUR_RANKS = ["tp=2,ep=2,etp=2", "tp=2,pp=2,ep=2"]


def value_model(model: Path, target: Path, bias: float = 0.3) -> Path:
    """Writes a copy of a language model whose output layer is replaced by a random value head."""
    target.mkdir()
    weights = load_file(model / "model.safetensors")
    arch = read_architecture(model)
    weights["score.weight"] = 0.1 * torch.randn(1, arch.hidden_size, generator=torch.Generator().manual_seed(5))
    weights["score.bias"] = torch.full((1,), bias)
    weights.pop("lm_head.weight", None)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    head = {"architectures": [family_of(arch).VALUE_MODEL], "id2label": {"0": "v"}, "label2id": {"v": 0}}
    (target / "config.json").write_text(json.dumps({**config, **head}))
    return target


def expected(model: Path) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Returns transformers' values of the tokens in the loss mask, and the gradients of their weighted sum."""
    reference = AutoModelForTokenClassification.from_pretrained(model, dtype=torch.float32).eval()
    values = backward(reference)
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    stored = load_file(model / "model.safetensors").keys()
    return values, dict(pair for item in gradients.items() for pair in by_expert(*item, stored))


def expected_of_family(model: Path) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The same by its language model with another output layer, as transformers has few models with one number per
    token."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    head = load_file(model / "model.safetensors")
    reference.lm_head = torch.nn.Linear(head["score.weight"].shape[1], 1)
    reference.lm_head.load_state_dict({name: head[f"score.{name}"] for name in ("weight", "bias")})
    reference.get_input_embeddings().padding_idx = None
    values = backward(reference)
    gradients = file_gradients(reference, read_architecture(model, value_head=True))
    untrained = {
        s.name for w in weights_of(read_architecture(model, value_head=True)) if not w.trained for s in w.sources
    }
    named = {name.replace("lm_head.", "score."): each for name, each in gradients.items() if name not in untrained}
    return values, named


def backward(reference: torch.nn.Module) -> list[torch.Tensor]:
    """Returns the values of the tokens in the loss mask, after a backward pass of their weighted sum."""
    values, loss = [], torch.zeros(())
    for number, sample in enumerate(samples()):
        states = reference(torch.tensor(sample.token_ids[None].astype("int64"))).logits[0, :, 0]
        mine = states[:-1][torch.tensor(sample.loss_mask[1:])]
        values.append(mine.detach())
        loss = loss + weight_of(number) * mine.sum()
    loss.backward()
    return values


def by_expert(name: str, gradient: torch.Tensor, stored: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields gradients by checkpoint name; transformers holds all experts of a layer in one tensor, and some
    checkpoints do."""
    if name in stored:
        yield name, gradient
        return
    layer, _, kind = name.partition(".experts.")
    for number, own in enumerate(gradient):
        parts = own.chunk(2) if kind == "gate_up_proj" else (own,)
        for projection, part in zip(kind.removesuffix("_proj").split("_"), parts, strict=True):
            yield f"{layer}.experts.{number}.{projection}_proj.weight", part


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("critic")
    return value_model(make_tiny_model(root / "lm", num_layers=4, mlp_only_layers=(1,)), root / "critic")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [(1, ONE_RANK), (2, TWO_RANKS), pytest.param(4, FOUR_RANKS, marks=pytest.mark.slow)],
    ids=["1 rank", "2 ranks", "4 ranks"],
)
def test_values_and_gradients_equal_transformers(
    forks: Forks, model: Path, tmp_path: Path, ranks: int, layouts: list[str]
) -> None:
    check(forks, model, tmp_path, ranks, layouts)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "family", [family if family == "gpt_oss" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_critic_of_a_family_equals_transformers(forks: Forks, tmp_path: Path, family: str) -> None:
    critic = value_model(make_family_model(tmp_path / "lm", family), tmp_path / f"critic of {family}")
    cut = "ep=2" if read_architecture(critic, value_head=True).num_experts else "cp=1"
    check(forks, critic, tmp_path, 4, [f"tp=2,pp=2,{cut}"], expected_of_family)


def check(
    forks: Forks, model: Path, tmp_path: Path, ranks: int, layouts: list[str], expected: Expected = expected
) -> None:
    """Compares values, gradients and the exported critic."""
    forks.world(ranks, "critic_worker:main", model, tmp_path, layouts)
    values, gradients = expected(model)
    for layout in layouts:
        found = load_file(tmp_path / f"{layout}.safetensors")
        for number, wanted in enumerate(values):
            torch.testing.assert_close(found.pop(f"value/{number}"), wanted, atol=2e-5, rtol=0, msg=layout)
        assert {"score.weight", "score.bias"} <= gradients.keys()
        assert "lm_head.weight" not in found
        assert gradients.keys() <= found.keys()
        for name in gradients:
            error, largest = (found[name] - gradients[name]).abs().max(), gradients[name].abs().max()
            assert error <= 1e-4 * largest, (layout, name, error, largest)  # an expert may get no token
    exported = tmp_path / "critic"
    before, after = load_file(model / "model.safetensors"), load_file(exported / "model.safetensors")
    assert after.keys() == {s.name for s, *_ in tensors_of(read_architecture(model, True))} | images(before)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() & after.keys())
    again, _ = expected(exported)
    torch.testing.assert_close(again, values, atol=1e-6, rtol=0)


def images(names: Collection[str]) -> set[str]:
    return {name for name in names if name.startswith("model.visual.")}


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_a_critic_made_from_a_language_model_starts_with_zero_values(forks: Forks, tmp_path: Path, tied: bool) -> None:
    language_model = make_tiny_model(tmp_path / "lm", tied=tied)
    forks.world(1, "critic_worker:main", language_model, tmp_path, ["tp=1"])
    found = load_file(tmp_path / "tp=1.safetensors")
    assert not any(found[name].any() for name in found if name.startswith("value/"))
    assert found["score.weight"].any()  # it can learn: the head's gradient is not zero
    exported = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
    assert exported.num_labels == 1


def test_a_critic_cannot_be_read_as_a_policy(model: Path) -> None:
    with pytest.raises(ModelError, match=r"architectures is \['Qwen3MoeForTokenClassification'\]"):
        read_architecture(model)
    assert read_architecture(model, value_head=True).value_head
