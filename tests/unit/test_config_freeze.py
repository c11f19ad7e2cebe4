"""Frozen kinds of weights in the configuration: what is refused, and what is noted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from config_files import ARCHITECTURE, MODEL_FIELDS, RL, SFT, write, write_model

from megatron_rl.config.load import ConfigError, check_companions, check_config, load_config
from megatron_rl.config.resolve import resolve
from megatron_rl.config.schema import Config, SftConfig

DENSE = dataclasses.replace(ARCHITECTURE, model_type="qwen3", num_experts=0, experts_per_token=0)
ALL = "[router,expert,attention,embedding,other]"


def rl(tmp_path: Path, overrides: str) -> Config:
    return load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "optim.freeze=[router]",
        "optim.freeze=[expert,attention,embedding,other]",
        f"presets=ppo optim.freeze=[router] critic.optim.freeze={ALL}",
    ],
)
def test_some_kinds_can_be_frozen(tmp_path: Path, overrides: str) -> None:
    check_config(rl(tmp_path, overrides), ARCHITECTURE, 1)


def test_the_order_of_kinds_means_nothing(tmp_path: Path) -> None:
    """A resume compares the keys of two configurations."""
    found = [rl(tmp_path, f"optim.freeze={kinds}").optim.freeze for kinds in ("[expert,router]", "[router,expert]")]
    assert found == [("router", "expert")] * 2


@pytest.mark.parametrize(
    ("overrides", "arch", "told"),
    [
        (f"optim.freeze={ALL}", ARCHITECTURE, "optim.freeze: router, expert, attention, embedding, other are all"),
        ("optim.freeze=[attention,embedding,other]", DENSE, "optim.freeze: attention, embedding, other are all"),
        ("optim.freeze=[router]", DENSE, "optim.freeze: router, but the model has no such weights; it has attention, "),
        (
            "presets=ppo critic.optim.freeze=[expert]",
            DENSE,
            "critic.optim.freeze: expert, but the model has no such weights; it has attention, embedding, other, ",
        ),
    ],
)
def test_freezing_nothing_that_exists_or_everything_is_refused(
    tmp_path: Path, overrides: str, arch: object, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(rl(tmp_path, overrides), arch, 1)  # type: ignore[arg-type]
    (line,) = str(caught.value).splitlines()
    assert line.startswith(told)


def test_the_critics_own_architecture_counts(tmp_path: Path) -> None:
    moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    fields = {key: value for key, value in MODEL_FIELDS.items() if key not in moe}
    dense = {**fields, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    write(tmp_path / "critic" / "config.json", json.dumps(dense))
    config = rl(tmp_path, f"presets=ppo critic.path={tmp_path / 'critic'} critic.optim.freeze=[router]")
    layout = check_config(config, ARCHITECTURE, 1)
    with pytest.raises(ConfigError, match=r"^critic\.optim\.freeze: router, but the model has no such weights"):
        check_companions(config, ARCHITECTURE, layout)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("[routers]", "optim.freeze.0: found \"routers\", expected 'router', 'expert', 'attention', 'embedding' or"),
        ("[value_head]", 'optim.freeze.0: found "value_head", expected'),
        ("router", 'optim.freeze: found "router", expected a list'),
        ("[router,router]", 'optim.freeze: found ["router", "router"], expected each kind of weight once'),
    ],
)
def test_other_values_are_refused(tmp_path: Path, value: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rl(tmp_path, f"optim.freeze={value}")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        ("engine.aux_loss_coefficient=.01 optim.freeze=[router]", ["optim"]),
        ("engine.aux_loss_coefficient=.01 optim.freeze=[expert]", []),
        ("engine.aux_loss_coefficient=0 optim.freeze=[router]", []),
        ("engine.aux_loss_coefficient=.01 presets=ppo critic.optim.freeze=[router]", ["critic.optim"]),
    ],
)
def test_a_load_balancing_loss_that_moves_no_router_is_noted(tmp_path: Path, overrides: str, noted: list[str]) -> None:
    model = write_model(tmp_path / "model")
    path = write(tmp_path / "a.yaml", RL)
    notes = resolve(Config, path, [*overrides.split(), f"model.path={model}"], 1).notes
    told = [
        f"engine.aux_loss_coefficient: 0.01 moves no router, because {section}.freeze has router" for section in noted
    ]
    assert [note.partition(";")[0] for note in notes if "aux_loss" in note] == told


def test_fine_tuning_is_checked_and_noted_too(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    path = write(tmp_path / "a.yaml", SFT)
    words = [f"model.path={model}", "engine.aux_loss_coefficient=.01"]
    resolved = resolve(SftConfig, path, [*words, "optim.freeze=[router]"], 1)
    assert len(resolved.notes) == 1
    with pytest.raises(ConfigError, match=r"^optim\.freeze: .* are all weights of the model"):
        resolve(SftConfig, path, [*words, f"optim.freeze={ALL}"], 1)
