"""Layouts against Megatron-Core: which rank has which coordinates and layers."""

from __future__ import annotations

import pytest
from config_files import ARCHITECTURE, LAYOUTS
from forks import Forks
from layout_worker import Groups

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.show import stage_layers

Answers = dict[str, tuple[Groups, list[list[list[int]]]]]


@pytest.fixture(scope="module")
def megatron_core(forks: Forks) -> Answers:
    # Runs in another process: the CPU layer has to be in place before Megatron-Core is imported.
    (answers,) = forks.world(1, "layout_worker:answer", ARCHITECTURE.num_layers, list(LAYOUTS))
    return dict(answers)


@pytest.mark.parametrize("text", LAYOUTS)
def test_rank_coordinates_match_megatron_core(text: str, megatron_core: Answers) -> None:
    groups, _ = megatron_core[text]
    layout = Layout.resolve(*parse_layout(text))
    for axis, of_axis in groups.items():
        assert len(of_axis) * getattr(layout, axis) == layout.world_size
        for group in of_axis:
            assert [getattr(layout.coordinates(rank), axis) for rank in group] == list(range(len(group)))


@pytest.mark.parametrize("text", LAYOUTS)
def test_stage_layers_match_megatron_core(text: str, megatron_core: Answers) -> None:
    _, layers = megatron_core[text]
    layout = Layout.resolve(*parse_layout(text))
    for pp in range(layout.pp):
        assert [list(part) for part in stage_layers(layout, ARCHITECTURE, pp)] == layers[pp]
