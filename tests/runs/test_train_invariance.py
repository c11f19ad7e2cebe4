"""A step of four mini-batches on saved rollouts: losses and weights do not depend on how work is divided.

For several steps see tests/runs/test_train_objectives.py and tests/runs/test_routing_modes.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks
from rl_runs import assert_same, losses, run_all, save_rollouts, weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics

# Each kind of parallelism appears once: RSPO's loss is GSPO's with the router shift. tests/runs/test_parity.py and
# tests/ranks/test_routing_shift.py compare gradients, log-probs and the router shift with transformers in every layout.
TWO_RANKS = ["tp=2", ""]
RSPO_TWO_RANKS = ["pp=2 vpp=2", "cp=2 ep=2"]
FOUR_RANKS = ["tp=2 ep=2 etp=2", "tp=2 pp=2 ep=2"]


@pytest.fixture(scope="module")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory of the run on one rank)."""
    root = tmp_path_factory.mktemp("invariance")
    model = make_tiny_model(root / "model", num_layers=4, mlp_only_layers=(1,))
    save_rollouts(model, root / "saved")
    save_rollouts(model, root / "shuffled", steps=1, shuffled=True)
    config = write_config(root / "config.yaml", model, root / "saved", steps=1)
    run_all(
        forks,
        config,
        1,
        [
            f"run_dir={root / 'reference'}",
            f"run_dir={root / 'one-by-one'} engine.max_tokens_per_micro_batch=16",
            f"run_dir={root / 'all-at-once'} engine.max_tokens_per_micro_batch=4096",
            f"run_dir={root / 'other-order'} rollout.replay_from={root / 'shuffled'}",
            f"run_dir={root / 'recompute'} engine.recompute=full",
            f"run_dir={root / 'rspo'} presets=rspo",
            f"run_dir={root / 'rspo-r2'} presets=rspo engine.recompute=full routing.replay=r2",
        ],
    )
    return config, root / "reference"


def assert_same_shift(run_dir: Path, reference: Path) -> None:
    """Compares router shifts; an objective without a router shift has none in both runs."""

    def shifts(directory: Path) -> list[dict[str, float]]:
        lines = read_metrics(directory / "metrics.jsonl")
        return [{name: line[name] for name in line if name.startswith("router_shift/")} for line in lines]

    for found, expected in zip(shifts(run_dir), shifts(reference), strict=True):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-3), run_dir.name


def test_the_run_learns_something(setting: tuple[Path, Path]) -> None:
    """Otherwise a trainer that does nothing would pass the tests below."""
    config, reference = setting
    from safetensors.torch import load_file

    before = load_file(config.parent / "model" / "model.safetensors")
    after = weights(reference)
    assert all((after[name] - before[name]).abs().max() > 1e-4 for name in before)
    clipped = losses(reference)[:, -1]
    assert clipped.max() > 0.05


def test_first_mini_batch_is_exactly_on_policy(setting: tuple[Path, Path]) -> None:
    for line in read_metrics(setting[1] / "metrics.jsonl"):
        if line["mini_batch"] == 0:
            assert line["ratio/min"] == line["ratio/max"] == 1.0
            assert line["sequence_ratio/min"] == line["sequence_ratio/max"] == 1.0
            clips = [value for name, value in line.items() if name.startswith("clip/")]
            assert clips
            assert not any(clips)
        else:
            assert line["ratio/min"] < 1.0 < line["ratio/max"]


@pytest.mark.parametrize("run", ["rspo", "rspo-r2"])
def test_routers_shift_after_the_first_mini_batch(setting: tuple[Path, Path], run: str) -> None:
    lines = read_metrics(setting[1].parent / run / "metrics.jsonl")
    for line in lines:
        if line["mini_batch"] == 0:
            assert line["router_shift/min"] == line["router_shift/max"] == 1.0
            assert line["ratio/min"] == line["ratio/max"] == 1.0
            assert line["router_shift/floored"] == 0
        else:
            assert 0.0 < line["router_shift/min"] < line["router_shift/max"] < 1.0
    assert any(0 < line["router_shift/floored"] < 1 for line in lines)
    assert "router_shift/mean" not in read_metrics(setting[1] / "metrics.jsonl")[0]


@pytest.mark.parametrize("other", ["one-by-one", "all-at-once", "other-order", "recompute"])
def test_results_do_not_depend_on_micro_batches_packing_order_or_recompute(
    setting: tuple[Path, Path], other: str
) -> None:
    assert_same(setting[1].parent / other, setting[1])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layouts", "rspo_layouts"),
    [(2, TWO_RANKS, RSPO_TWO_RANKS), (4, FOUR_RANKS, [])],
    ids=["2 ranks", "4 ranks"],
)
def test_results_do_not_depend_on_the_layout(
    forks: Forks, setting: tuple[Path, Path], ranks: int, layouts: list[str], rspo_layouts: list[str]
) -> None:
    config, reference = setting
    wanted = [("gspo", layout) for layout in layouts] + [("rspo", layout) for layout in rspo_layouts]
    runs, directories = [], []
    for preset, layout in wanted:
        directory = config.parent / f"{preset} {ranks} ranks {layout}".replace(" ", "-")
        degrees = " ".join(f"parallel.{degree}" for degree in layout.split())
        runs.append(f"run_dir={directory} presets={preset} {degrees}")
        directories.append((directory, reference if preset == "gspo" else reference.with_name("rspo")))
    run_all(forks, config, ranks, runs)
    for directory, alone in directories:
        assert_same(directory, alone)
        assert_same_shift(directory, alone)
        first = [line for line in read_metrics(directory / "metrics.jsonl") if line["mini_batch"] == 0]
        assert all(line["ratio/min"] == line["ratio/max"] == 1.0 for line in first), directory.name


@pytest.mark.distributed
def test_rejected_tokens_leave_the_denominators_on_all_ranks(forks: Forks, setting: tuple[Path, Path]) -> None:
    """In the second step: in the first pi_old is mu, and nothing is rejected."""
    config = setting[0]
    rejects = "train.steps=2 objective.correction.kind=mis objective.correction.low=0.8 objective.correction.high=1.25"
    alone, *others = [config.parent / f"mis-{number}" for number in range(3)]
    run_all(forks, config, 1, [f"run_dir={alone} {rejects} engine.max_tokens_per_micro_batch=4096"])
    layouts = ["parallel.pp=2", "parallel.cp=2"]
    run_all(forks, config, 2, [f"run_dir={d} {rejects} {layout}" for d, layout in zip(others, layouts, strict=True)])
    for directory in others:
        assert_same(directory, alone, steps=2)
        for line, expected in zip(*(read_metrics(d / "metrics.jsonl") for d in (directory, alone)), strict=True):
            for unit in ("token", "sequence"):
                name = f"correction/masked/{unit}"
                assert line[name] == pytest.approx(expected[name], abs=1e-9), directory.name
    masked = [line["correction/masked/token"] for line in read_metrics(alone / "metrics.jsonl")]
    assert any(0.05 < fraction < 0.95 for fraction in masked)


def test_one_rank_needs_no_launcher(forks: Forks, setting: tuple[Path, Path], tmp_path: Path) -> None:
    config, reference = setting
    done = forks.run("-m", "megatron_rl", "train", config, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(tmp_path / "run", reference)
