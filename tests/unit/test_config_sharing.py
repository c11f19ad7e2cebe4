"""rollout.servers.colocate: what contradicts it is refused before anything starts, with one line that says why."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.sharing import GIB, check_machine, fraction_problem, served_bytes

SHARED = ("rollout.servers.colocate=true", "rollout.servers.launch=4", "rollout.servers.tp=2", "weights.route=ipc")
RANKS = 8


def loaded(tmp_path: Path, *overrides: str) -> Config:
    return load_config(Config, write(tmp_path / "a.yaml", RL), [*SHARED, "engine.dtype=bf16", *overrides])


def told(tmp_path: Path, *overrides: str) -> list[str]:
    try:
        check_config(loaded(tmp_path, *overrides), ARCHITECTURE, RANKS)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_servers_of_all_ranks_gpus_may_share_them(tmp_path: Path) -> None:
    assert told(tmp_path) == []
    assert told(tmp_path, "weights.route=disk", "rollout.servers.launch=8", "rollout.servers.tp=1") == []
    assert told(tmp_path, "engine.device=cpu", "engine.dtype=fp32") == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("rollout.servers.urls=[http://127.0.0.1:1]", "rollout.servers.launch=1"),
            "rollout.servers.urls or urls_file names servers",
        ),
        (
            ("rollout.servers.launch=2",),
            "launch 2 with tp 2 use 4 GPUs, but colocate shares those of all 8 ranks; set lau",
        ),
        (("rollout.servers.launch=1",), "; set launch to 4"),
        (("weights.route=collective",), "weights.route: collective, but under"),
        (("weights.route=delta",), "weights.route: delta sends what changed, but under"),
        (
            ("rollout.servers.colocate=false",),
            "weights.route: ipc needs servers on the trainer's GPUs; set rollout.serv",
        ),
        (
            ("rollout.servers.extra_flags=[--base-gpu-id=1]",),
            "rollout.servers.extra_flags: --base-gpu-id moves servers",
        ),
        (("rollout.servers.extra_flags=[--pp-size=2]",), "rollout.servers.extra_flags: --pp-size moves servers"),
        (
            ("rollout.servers.extra_flags=[--mem-fraction-static=1.5]",),
            "--mem-fraction-static: found '1.5', expected a nu",
        ),
        (
            ("rollout.servers.extra_flags=[--mem-fraction-static=much]",),
            "--mem-fraction-static: found 'much', expected a",
        ),
        (("engine.fp8=blockwise", "engine.layers=te"), "engine.fp8: blockwise, but under"),
        (
            ("optim.moments_dtype=bf16", "engine.layers=te"),
            "optim.moments_dtype: bf16: such an optimizer",
        ),
        (("optim.offload=0.5", "engine.layers=te"), "optim.offload: 0.5: such an optimizer"),
    ],
)
def test_what_contradicts_shared_gpus_is_one_line(tmp_path: Path, overrides: tuple[str, ...], line: str) -> None:
    lines = [each for each in told(tmp_path, *overrides) if line in each]
    assert len(lines) == 1, told(tmp_path, *overrides)


def test_saved_rollouts_leave_nothing_to_share(tmp_path: Path) -> None:
    (line,) = told(tmp_path, "rollout.replay_from=other")
    assert line.startswith("rollout.servers.colocate: True does nothing under rollout.replay_from")


def test_ranks_on_several_machines_are_refused_where_the_run_starts() -> None:
    check_machine(8, 8)
    with pytest.raises(ConfigError, match=r"16 ranks are on several machines \(8 on this one\)"):
        check_machine(16, 8)


def test_a_fraction_without_room_for_the_weights_is_refused(tmp_path: Path) -> None:
    needed = served_bytes(ARCHITECTURE, 2, 2)
    for fraction, fits in (("0.9", True), ("0.1", False)):
        config = loaded(tmp_path, f"rollout.servers.extra_flags=[--mem-fraction-static={fraction}]")
        problem = fraction_problem(config, ARCHITECTURE, 2, 2 * needed)
        assert (problem is None) is fits
        assert fits or fraction in str(problem)
    assert fraction_problem(loaded(tmp_path), ARCHITECTURE, 2, GIB) is None
    assert fraction_problem(loaded(tmp_path), ARCHITECTURE, 2, needed // 2) is not None
