"""Each item of the CPU layer is necessary: without it, training on a CPU fails. If an upgrade of Megatron-Core makes an
item unnecessary, its test fails, and the item can be removed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import megatron.core
import pytest
import torch
from family_models import make_family_model
from models_reference import moe_architecture
from paths import SUPPORT
from rl_runs import environment, torchrun
from tiny_models import make_tiny_model

from megatron_rl.config.schema import Device, EngineConfig, EngineDtype
from megatron_rl.engine.device import CPU_LAYER, ON_EVERY_DEVICE
from megatron_rl.engine.layers.choice import choose_layers
from megatron_rl.engine.layers.plain_torch import TorchLayers
from megatron_rl.engine.layers.transformer_engine import TransformerEngineLayers
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import ClampedSwiglu, DeltaNet

LAYOUTS = {"all_to_all": "ep=2", "uneven_collectives": "tp=2,ep=2,etp=2", "to_cuda": "pp=2"}
"""Layout for each item that is needed only under some kind of parallelism."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("device") / "model", tied=True)


def step(model: Path, layout: str, left_out: str) -> subprocess.CompletedProcess[str]:
    ranks = {"tp=1": 1, "tp=2,ep=2,etp=2": 4}.get(layout, 2)
    worker = str(SUPPORT / "device_worker.py")
    return subprocess.run(
        torchrun(ranks, worker, str(model), layout, left_out),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("item", [*CPU_LAYER, *ON_EVERY_DEVICE])
def test_training_fails_if_one_cpu_layer_item_is_left_out(model: Path, tmp_path: Path, item: str) -> None:
    if item in ("router_gemm", "latent_attention") and not megatron.core.__version__.startswith("0.16"):
        pytest.skip("only megatron-core 0.16 leaves these names of Transformer Engine undefined")
    if item == "latent_attention":
        model = make_family_model(tmp_path / "latent", "deepseek_v3")
    assert step(model, LAYOUTS.get(item, "tp=1"), item).returncode != 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp=1", *LAYOUTS.values()])
def test_training_works_with_all_cpu_layer_items(model: Path, layout: str) -> None:
    done = step(model, layout, "nothing")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "UPDATED" in done.stdout


@pytest.fixture(scope="module")
def on_a_pretended_gpu(model: Path) -> dict[str, dict[str, Any]]:
    """For each network, the names of weights and buffers by device, just before weights are loaded; and the settings of
    NCCL, of which the launcher's environment gives one."""
    worker = str(SUPPORT / "fake_cuda_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(model)],
        env={**environment(), "NCCL_NVLS_ENABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("network", ["policy", "without optimizer", "frozen", "critic"])
def test_all_weights_are_on_the_gpu_before_loading(on_a_pretended_gpu: dict[str, dict[str, Any]], network: str) -> None:
    (names,) = on_a_pretended_gpu[network].values()
    assert on_a_pretended_gpu[network] == {"cuda:0": names}
    assert any(".router." in name for name in names)
    assert any("layernorm" in name for name in names)


def test_nccl_has_the_settings_of_sglang_unless_the_environment_has_others(
    on_a_pretended_gpu: dict[str, dict[str, Any]],
) -> None:
    assert on_a_pretended_gpu["nccl"] == {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "1"}


@pytest.mark.parametrize(
    ("device", "layers", "dtype", "gpu", "found"),
    [
        ("auto", "auto", "bf16", True, True),
        ("cuda", "auto", "bf16", True, True),
        ("cpu", "auto", "bf16", True, False),  # the demo on a machine with a GPU
        ("auto", "auto", "bf16", False, False),
        ("auto", "torch", "bf16", True, False),
        ("cuda", "auto", "fp32", True, False),  # parity and certify
        ("cpu", "te", "fp32", False, True),  # over the stub
    ],
)
def test_transformer_engine_is_used_only_on_a_gpu_and_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
    device: Device,
    layers: Literal["auto", "te", "torch"],
    dtype: EngineDtype,
    gpu: bool,
    found: bool,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    chosen = choose_layers(EngineConfig(device=device, layers=layers, dtype=dtype), moe_architecture())
    assert isinstance(chosen, TransformerEngineLayers) is found


def test_transformer_engine_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"engine\.layers is te, but transformer_engine is not installed"):
        choose_layers(EngineConfig(device="cuda", layers="te"), moe_architecture())


@pytest.mark.parametrize("layers", ["auto", "te"])
@pytest.mark.parametrize(
    ("feature", "name"),
    [
        ({"sinks": True}, "sinks of attention"),
        ({"window": 4, "windowed_layers": (0,)}, "sliding windows"),
        ({"biases": True}, "biases of experts"),
        ({"clamped": ClampedSwiglu(1.702, 7.0)}, "clamped activations"),
        ({"delta_net": DeltaNet((0,), 2, 4, 8, 8, 4)}, "gated delta networks"),
        ({"output_gate": True}, "gates on attention"),
        ({"zero_centred_norms": True}, "zero-centred norms"),
    ],
)
def test_transformer_engine_is_refused_for_features_that_it_has_not_been_run_with(
    monkeypatch: pytest.MonkeyPatch, layers: Literal["auto", "te"], feature: dict[str, Any], name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arch = moe_architecture(**feature)
    with pytest.raises(UserError, match=rf"layers is {layers}, and the model has {name}, .*set engine.layers to torch"):
        choose_layers(EngineConfig(layers=layers), arch)
    assert isinstance(choose_layers(EngineConfig(layers="torch"), arch), TorchLayers)
