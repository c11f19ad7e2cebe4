"""What an optimizer's keys say together with the engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config


def told(tmp_path: Path, overrides: str) -> list[str]:
    config = load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split())
    try:
        check_config(config, ARCHITECTURE, 1)
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("setting", ["moments_dtype=bf16", "offload=0.5", "offload=1"])
def test_a_smaller_optimizer_is_accepted_on_a_gpu_in_bf16(tmp_path: Path, setting: str) -> None:
    assert told(tmp_path, f"optim.{setting}") == []
    assert told(tmp_path, f"presets=ppo critic.optim.{setting} engine.device=cuda engine.grad_dtype=bf16") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "optim.moments_dtype=bf16 engine.device=cpu",
            "optim.moments_dtype: bf16 needs a GPU, but engine.device is cpu",
        ),
        (
            "optim.moments_dtype=bf16 engine.dtype=fp32",
            "optim.moments_dtype: bf16 needs engine.dtype bf16, but that is",
        ),
        (
            "optim.offload=0.5 engine.device=cpu",
            "optim.offload: 0.5 needs a GPU, but engine.device is cpu; set it to 0",
        ),
        (
            "optim.offload=1 engine.dtype=fp32",
            "optim.offload: 1 needs engine.dtype bf16, but that is fp32; set it to 0",
        ),
        (
            "optim.offload=1 optim.moments_dtype=bf16",
            "optim.moments_dtype: bf16, but moments in the host's memory (opt",
        ),
        (
            "presets=ppo critic.optim.offload=1 engine.dtype=fp32",
            "critic.optim.offload: 1 needs engine.dtype bf16, but that is fp32; set it to 0",
        ),
    ],
)
def test_a_smaller_optimizer_that_cannot_be_is_refused(tmp_path: Path, overrides: str, message: str) -> None:
    (line,) = told(tmp_path, overrides)
    assert line.startswith(message)
