"""How far a run has come, against the steps that it is asked for."""

from __future__ import annotations

import pytest

from megatron_rl.config.load import ConfigError
from megatron_rl.config.schema import Config
from megatron_rl.loop.progress import check_steps


@pytest.mark.parametrize(
    ("steps", "left", "refused"), [(6, 0, False), (5, 0, False), (4, 0, True), (6, 1, False), (5, 1, True)]
)
def test_a_run_is_asked_for_no_fewer_steps_than_are_made(steps: int, left: int, refused: bool) -> None:
    sections = {"model": {"path": "/model"}, "data": {"train": "/data"}, "train": {"steps": steps}}
    config = Config.model_validate({"run_dir": "/run", **sections})
    if not refused:
        check_steps(config, 5, "the run", left=left)
        return
    with pytest.raises(ConfigError) as caught:
        check_steps(config, 5, "the run", left=left)
    assert str(caught.value) == f"train.steps: {steps}, but the run has made 5 steps; give train.steps above 5"
