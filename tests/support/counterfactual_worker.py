"""Studies of saved rollouts, one after another in one world of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config


def studies(config: Path, runs: list[tuple[str, dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Returns the lines of each study; a run is (overrides in one string, options)."""
    from megatron_rl.counterfactual.replay_study import StudyOptions, check_options, replay_study

    found = []
    for overrides, options in runs:
        loaded, chosen = load_config(Config, config, overrides.split()), StudyOptions(**options)
        check_options(loaded, chosen)
        found.append(replay_study(loaded, chosen))
    return found


def attributions(config: Path, runs: list[str]) -> list[list[dict[str, Any]]]:
    """Returns the lines of each attribution of step 1."""
    from megatron_rl.counterfactual.attribution import attribute

    return [attribute(load_config(Config, config, overrides.split()), 1) for overrides in runs]
