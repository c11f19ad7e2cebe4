"""Matrix products in fp8: what a run that asks for them is refused, and how its rows are padded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.layout import Layout
from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.weights.verify import pack_probe

FP8 = ("engine.device=cuda", "engine.fp8=tensorwise")


def checked(tmp_path: Path, *overrides: str) -> Layout:
    return check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides), ARCHITECTURE, 4)


@pytest.mark.parametrize("replay", ["r2", "r3"])
def test_routes_are_not_replayed_in_fp8_without_a_certificate(tmp_path: Path, replay: str) -> None:
    checked(tmp_path, *FP8, "routing.observe_rollout=true")
    with pytest.raises(
        ConfigError, match=rf"routing.replay: {replay}, but engine.fp8 is tensorwise, and no certificate"
    ):
        checked(tmp_path, *FP8, f"routing.replay={replay}")


def test_each_ranks_tokens_divide_as_fp8_needs(tmp_path: Path) -> None:
    """Also those of the probe, by which a weight sync is verified."""
    assert checked(tmp_path, "parallel.tp=2").token_multiple == 1
    layout = checked(tmp_path, *FP8, "parallel.tp=2", "parallel.cp=2")
    assert layout.token_multiple == 16
    probe = pack_probe([[3, 4, 5], [6, 7]], SimpleNamespace(layout=layout))  # type: ignore[arg-type]
    assert (probe.tokens, probe.valid.sum()) == (4 * 16, 5)
