"""Models with the config.json of published ones train, and those as deep as published train in uneven stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import FAMILIES, make_family_model
from forks import Forks
from model_directories import files_of
from parity_checks import Compare, check, layouts_of
from published_models import PUBLISHED, make_published_model
from rl_runs import MINI_BATCHES, STEPS, assert_same, run_all, save_rollouts, weights, write_config
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from megatron_rl.lab.run import read_metrics
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.registry import weights_of

NAMES = sorted(file.stem for file in PUBLISHED.glob("*.json"))
CODER = "Qwen--Qwen3-Coder-480B-A35B-Instruct"


def qwen3_235b(directory: Path) -> Path:
    return make_tiny_model(
        directory, num_layers=94, hidden_size=32, num_heads=2, num_kv_heads=1, expert_hidden_size=16, std=0.05
    )


def deepseek_v3(directory: Path) -> Path:
    small = {"hidden_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return make_family_model(directory, "deepseek_v3", std=0.05, num_hidden_layers=61, first_k_dense_replace=3, **small)


SPLITS = {
    "235B": (
        qwen3_235b,
        4,
        ["pp=4", "pp=4 parallel.vpp=2", "pp=4 parallel.stage_layers=[20,25,25,24]", "pp=2 parallel.vpp=3"],
    ),
    "DeepSeek-V3": (
        deepseek_v3,
        8,
        ["pp=8", "pp=8 parallel.vpp=2", "pp=8 parallel.stage_layers=[5,8,8,8,8,8,8,8]"],
    ),
}


@pytest.mark.parametrize(
    "name", [CODER, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name != CODER)]
)
def test_a_model_with_a_published_config_trains(forks: Forks, tmp_path: Path, name: str) -> None:
    model = make_published_model(tmp_path / "model", name)
    save_rollouts(make_tiny_model(tmp_path / "mu"), tmp_path / "saved", steps=1)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "saved", steps=1)
    run_all(forks, config, 1, [f"run_dir={tmp_path / 'run'}"])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == MINI_BATCHES
    assert lines[0]["grad_norm"] > 0  # later mini-batches may be clipped whole
    before, after = load_file(model / "model.safetensors"), weights(tmp_path / "run")
    assert before.keys() == after.keys()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    buffers = {s.name for w in weights_of(read_architecture(model)) if not w.trained for s in w.sources}
    may_stay = {s.name for w in weights_of(read_architecture(model)) if w.kind == "expert" for s in w.sources}
    assert buffers <= unchanged <= buffers | may_stay  # some experts get no token


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_the_engine_does_of_a_trained_export(
    forks: Forks, compare: Compare, tokens: Path, tmp_path: Path, family: str
) -> None:
    model = make_family_model(tmp_path / "model", family)
    save_rollouts(model, tmp_path / "saved", steps=1)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "saved", steps=1)
    layout = layouts_of(model)[-1]
    degrees = " ".join(f"parallel.{degree}" for degree in layout.split(","))
    run_all(forks, config, 4, [f"run_dir={tmp_path / 'run'} {degrees}"])
    assert any(
        not torch.equal(weights(tmp_path / "run")[name], old) for name, old in files_of(model).items() if "norm" in name
    )
    check(compare, tmp_path / "run" / "model", tokens, ["tp=1"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", SPLITS)
def test_uneven_and_virtual_stages_train_as_one_rank(forks: Forks, tmp_path: Path, name: str) -> None:
    make, ranks, splits = SPLITS[name]
    model = make(tmp_path / "model")
    save_rollouts(model, tmp_path / "saved", steps=1)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "saved", steps=1)
    run_all(forks, config, 1, [f"run_dir={tmp_path / 'alone'}"])
    directories = [tmp_path / f"run-{number}" for number in range(len(splits))]
    run_all(
        forks, config, ranks, [f"run_dir={d} parallel.{split}" for d, split in zip(directories, splits, strict=True)]
    )
    for directory in directories:
        assert len(read_metrics(directory / "metrics.jsonl")) == MINI_BATCHES
        assert_same(directory, tmp_path / "alone")
        loaded, info = AutoModelForCausalLM.from_pretrained(directory / "model", output_loading_info=True)
        assert not any(info.values()), info
        assert loaded.config.num_hidden_layers == read_architecture(model).num_layers


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.parametrize("vpp", [1, 2])
def test_a_live_server_gets_the_weights_of_uneven_stages(forks: Forks, tmp_path: Path, vpp: int) -> None:
    model = make_tiny_model(tmp_path / "model", num_layers=10, std=0.1)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "unused")
    options = (
        "data.train=arithmetic:terms=3,split=train,count=64",
        "rollout.replay_from=null",
        "rollout.servers.max_total_tokens=4096",
        "routing.replay=r3",
        "weights.verify=1",
        f"parallel.pp=4 parallel.vpp={vpp}",
    )
    run_all(forks, config, 4, [f"run_dir={tmp_path / 'run'} {' '.join(options)}"])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {line["step"] for line in lines} == set(range(1, STEPS + 1))
    for line in lines:  # the second step's rollouts are of synced weights
        assert line["abs_logprob_gap/max"] < 1e-3
        assert line["routing/set_mismatch/rollout_old/effective/max"] == 0
