"""Live routing, R2 and R3 in whole runs on saved rollouts: which routes are used, their metrics and those of single
tokens, and equal results in every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks
from rl_runs import GROUP, MINI_BATCHES, STEPS, losses, run_all, save_rollouts, weights, write_config
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from megatron_rl.data.store import read_groups
from megatron_rl.lab.run import read_metrics
from megatron_rl.lab.token_records import read_tokens

MODES = {
    "none": "routing.observe_rollout=true",
    "r2": "routing.replay=r2 routing.noise_floor=1",
    "r3": "routing.replay=r3",
}
CHANGES = ("set_mismatch", "expert_change", "top1_change")
LAYERS = ("layer_00", "layer_02", "layer_03")


@pytest.fixture(scope="module")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, directory of the runs on one rank, one run for each mode)."""
    root = tmp_path_factory.mktemp("modes")
    model = make_tiny_model(root / "model", num_layers=4, mlp_only_layers=(1,))
    save_rollouts(model, root / "saved", traces=True)
    config = write_config(root / "config.yaml", model, root / "saved")
    with config.open("a") as file:
        file.write("lab: {record_steps: [1, 2]}\n")
    runs = [f"run_dir={root / 'one' / mode} {keys}" for mode, keys in MODES.items()]
    runs.append(f"run_dir={root / 'one' / 'balanced'} {MODES['r3']} engine.aux_loss_coefficient=0.1")
    run_all(forks, config, 1, runs)
    return config, root / "one"


def lines(run_dir: Path) -> list[dict[str, float]]:
    found = list(read_metrics(run_dir / "metrics.jsonl"))
    assert len(found) == STEPS * MINI_BATCHES
    return found


def worst(line: dict[str, float], change: str, pair: str) -> float:
    return line[f"routing/{change}/{pair}/max"]


def drifts(run_dir: Path, change: str) -> bool:
    """Returns whether the live routes differ from pi_old's routes in the last mini-batch of every step."""
    last = [line for line in lines(run_dir) if line["mini_batch"] == MINI_BATCHES - 1]
    return all(worst(line, change, "old_policy/live") > 0 for line in last)


@pytest.mark.parametrize("change", CHANGES)
def test_r2_replays_pi_olds_routes_in_every_update(setting: tuple[Path, Path], change: str) -> None:
    assert drifts(setting[1] / "r2", change)
    for line in lines(setting[1] / "r2"):
        assert worst(line, change, "old_policy/effective") == 0
        assert line["mini_batch"] > 0 or worst(line, change, "old_policy/live") == 0
        assert worst(line, change, "rerun") == 0  # one machine, one order of sums
        assert line["routing/fallback/max"] == 0


@pytest.mark.parametrize("change", CHANGES)
def test_r3_replays_the_rollouts_routes_in_every_forward_pass(setting: tuple[Path, Path], change: str) -> None:
    assert drifts(setting[1] / "r3", change)
    for line in lines(setting[1] / "r3"):
        assert worst(line, change, "rollout_old/effective") == worst(line, change, "old_policy/effective") == 0
        assert worst(line, change, "rollout_old/live") > 0.1
        # The last row of each sample has no route: it is routed live and counted as a fallback.
        assert line["routing/fallback/max"] == line["routing/fallback/min"] > 0.02
        assert line["routing/live_overlap/mean"] < 0.95


@pytest.mark.parametrize("change", CHANGES)
def test_without_replay_the_live_routes_are_used(setting: tuple[Path, Path], change: str) -> None:
    assert drifts(setting[1] / "none", change)
    for line in lines(setting[1] / "none"):
        for pair in ("rollout_old", "old_policy"):
            assert worst(line, change, f"{pair}/effective") == worst(line, change, f"{pair}/live")
        assert worst(line, change, "rollout_old/live") > 0.1
        assert "routing/fallback/max" not in line


def test_the_first_mini_batch_is_exactly_on_policy_in_every_mode(setting: tuple[Path, Path]) -> None:
    for mode in MODES:
        first = [line for line in lines(setting[1] / mode) if line["mini_batch"] == 0]
        assert all(line["ratio/min"] == line["ratio/max"] == 1.0 for line in first)


def test_replay_changes_the_trained_weights(setting: tuple[Path, Path]) -> None:
    trained = {mode: weights(setting[1] / mode) for mode in MODES}
    for a, b in (("none", "r2"), ("none", "r3"), ("r2", "r3")):
        assert max(float((trained[a][key] - w).abs().max()) for key, w in trained[b].items()) > 1e-4


def test_the_load_balancing_loss_trains_the_routers_under_replay(setting: tuple[Path, Path]) -> None:
    """The loss counts live routes, so it changes the routers; the replayed routes stay the same."""
    assert all(worst(line, "set_mismatch", "rollout_old/effective") == 0 for line in lines(setting[1] / "balanced"))
    replayed, balanced = weights(setting[1] / "r3"), weights(setting[1] / "balanced")
    routers = [key for key in replayed if key.endswith("mlp.gate.weight")]
    assert len(routers) == len(LAYERS)
    for key in routers:
        assert (balanced[key] - replayed[key]).abs().max() > 1e-4


def test_every_layer_has_its_own_routing_metrics(setting: tuple[Path, Path]) -> None:
    for line in lines(setting[1] / "r3"):
        for measure in (
            "entropy",
            "margin",
            "max_vio",
            "dead_experts",
            "live_overlap",
            "set_mismatch/rollout_old/live",
        ):
            found = [line[f"routing/{measure}/{layer}"] for layer in LAYERS]
            assert line[f"routing/{measure}/mean"] == pytest.approx(np.mean(found))
            assert line[f"routing/{measure}/max"] == max(found)
            assert f"routing/{measure}/layer_01" not in line


def assert_same(run_dir: Path, reference: Path) -> None:
    np.testing.assert_allclose(losses(run_dir)[:, 0], losses(reference)[:, 0], atol=1e-5, err_msg=run_dir.name)
    trained = weights(reference)
    for key, weight in weights(run_dir).items():
        assert (weight - trained[key]).abs().max() <= 1e-4 * trained[key].abs().max(), f"{key} in {run_dir.name}"
    for found, expected in zip(lines(run_dir), lines(reference), strict=True):
        routing = {key for key in expected if key.startswith("routing/")}
        assert routing == {key for key in found if key.startswith("routing/") and "/ep_peak/" not in key}
        assert ("routing/ep_peak/max" in found) == ("ep=" in run_dir.name)
        for key in routing:
            # If two experts have almost equal scores, another order of sums may choose the other one.
            assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=0.02), (run_dir.name, key)


def tokens_of(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """The recorded tokens of a step, ordered by sample and position."""
    files = [read_tokens(file) for file in (run_dir / "tokens").glob(f"step-{step:06d}-dp-*.parquet")]
    assert {file.replicas for file in files} == {len(files)}
    found = {column: np.concatenate([file.columns[column] for file in files]) for column in files[0].columns}
    order = np.lexsort((found["position"], found["sample"]))
    return {column: values[order] for column, values in found.items()}


@pytest.mark.parametrize("mode", MODES)
def test_recorded_tokens_are_those_of_the_rollouts_in_order(setting: tuple[Path, Path], mode: str) -> None:
    """At step 1 the policy is the model whose log-probs the rollouts have."""
    for step in range(1, STEPS + 1):
        found = tokens_of(setting[1] / mode, step)
        groups = read_groups(setting[0].parent / "saved" / "rollouts" / f"step-{step:06d}-dp-0000.jsonl")
        rows = [
            (group.index * GROUP + sample.index, group.index, position, token, sample.rollout_logprobs[position])
            for group in groups
            for sample in group.samples
            for position, token in enumerate(sample.token_ids.tolist())
            if sample.loss_mask[position]
        ]
        for column, expected in zip(
            ("sample", "group", "position", "token_id", "rollout_logprob"), zip(*rows, strict=True), strict=True
        ):
            np.testing.assert_array_equal(found[column], np.array(expected, found[column].dtype), err_msg=column)
        assert set(found["step"]) == {step}
        if step == 1 and mode != "r3":
            np.testing.assert_allclose(found["old_logprob"], found["rollout_logprob"], atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_metrics_are_means_over_the_recorded_tokens(setting: tuple[Path, Path], mode: str) -> None:
    clips = 0
    for line in lines(setting[1] / mode):
        found = tokens_of(setting[1] / mode, int(line["step"]))
        of_line = found["mini_batch"] == line["mini_batch"]
        of_token = {column: values[of_line].astype(np.float64) for column, values in found.items()}
        log_r = of_token["logprob"] - of_token["old_logprob"]
        assert len(log_r) == line["tokens"]
        assert np.exp(log_r).max() == pytest.approx(line["ratio/max"], rel=1e-4)
        assert np.exp(log_r).min() == pytest.approx(line["ratio/min"], rel=1e-4)
        gap = np.abs(of_token["old_logprob"] - of_token["rollout_logprob"]).mean()
        assert gap == pytest.approx(line["abs_logprob_gap/mean"], rel=1e-3, abs=1e-7)
        assert of_token["entropy"].mean() == pytest.approx(line["entropy/mean"], rel=1e-4)
        assert (of_token["clipped"] == -1).mean() == pytest.approx(line["clip/low/active/token"], abs=1e-6)
        assert (of_token["clipped"] == 1).mean() == pytest.approx(line["clip/high/active/token"], abs=1e-6)
        clips += int(np.abs(of_token["clipped"]).sum())
    assert clips


def test_the_expert_change_of_a_token_is_that_of_the_position_that_predicts_it(setting: tuple[Path, Path]) -> None:
    """Against transformers' own routes, which the rollouts' routes differ from in a fifth of the rows."""
    found = tokens_of(setting[1] / "none", 1)
    (group, *_) = read_groups(setting[0].parent / "saved" / "rollouts" / "step-000001-dp-0000.jsonl")
    model = AutoModelForCausalLM.from_pretrained(setting[0].parent / "model", dtype=torch.float32)
    for sample in group.samples:
        assert sample.trace is not None
        own = chosen_experts(model, sample.token_ids.tolist())  # [layers, n, K]
        of_sample = found["sample"] == sample.index
        expected = []
        for position in found["position"][of_sample] - 1:
            theirs = sample.trace.experts[position]
            shared = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(own[:, position], theirs, strict=True)]
            expected.append(1 - sum(shared) / (len(LAYERS) * theirs.shape[-1]))
        np.testing.assert_allclose(found["expert_change/rollout_old/live"][of_sample], expected, atol=1e-6)
        assert len(set(expected)) > 1


def chosen_experts(model: torch.nn.Module, token_ids: list[int]) -> np.ndarray:
    chosen: list[torch.Tensor] = []
    gates = [module for path, module in model.named_modules() if path.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _m, _i, out: chosen.append(out[2])) for gate in gates]
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen).numpy()


def test_replay_hides_the_expert_change_of_tokens(setting: tuple[Path, Path]) -> None:
    change = {mode: tokens_of(setting[1] / mode, 2) for mode in MODES}
    assert "expert_change/rollout_old/live" not in change["r2"]
    for mode in ("r2", "r3"):
        assert not change[mode]["expert_change/old_policy/effective"].any()
        assert change[mode]["expert_change/old_policy/live"].max() > 0.1
    live, used = (change["none"][f"expert_change/old_policy/{kind}"] for kind in ("live", "effective"))
    np.testing.assert_array_equal(live, used)
    assert live.max() > 0.1


def name(layout: str) -> str:
    return layout.replace(" ", ",") or "dp"


# tests/runs/test_certify.py checks the replayed routes of each layout row by row.
TWO_RANKS = [("r3", "tp=2"), ("r2", "pp=2 vpp=2"), ("r3", "pp=2 vpp=2"), ("r3", "cp=2 ep=2")]


@pytest.fixture(scope="module")
def together(forks: Forks, setting: tuple[Path, Path]) -> Path:
    """The directory with the runs of TWO_RANKS."""
    directory = setting[1].with_name("two")
    run_layouts(forks, setting[0], directory, 2, TWO_RANKS)
    return directory


def run_layouts(forks: Forks, config: Path, directory: Path, ranks: int, wanted: list[tuple[str, str]]) -> None:
    runs = []
    for mode, layout in wanted:
        degrees = " ".join(f"parallel.{degree}" for degree in layout.split())
        runs.append(f"run_dir={directory / mode / name(layout)} {MODES[mode]} {degrees}")
    run_all(forks, config, ranks, runs)


@pytest.mark.distributed
@pytest.mark.parametrize(("mode", "layout"), TWO_RANKS)
def test_layouts_do_not_change_results(setting: tuple[Path, Path], together: Path, mode: str, layout: str) -> None:
    assert_same(together / mode / name(layout), setting[1] / mode)
    for step in range(1, STEPS + 1):
        assert_same_tokens(tokens_of(together / mode / name(layout), step), tokens_of(setting[1] / mode, step))


def assert_same_tokens(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for column, values in expected.items():
        if values.dtype == np.float32 and not column.startswith("expert_change"):
            np.testing.assert_allclose(found[column], values, rtol=2e-3, atol=2e-3, err_msg=column)
        else:  # near ties and near bounds are decided by rounding
            assert (found[column] != values).mean() <= 0.02, column


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layouts"), [(2, ["pp=2", "ep=2", ""]), (4, ["tp=2 ep=2 etp=2", "tp=2 pp=2 ep=2", "ep=2"])]
)
def test_more_layouts_do_not_change_results(
    forks: Forks, setting: tuple[Path, Path], tmp_path: Path, ranks: int, layouts: list[str]
) -> None:
    wanted = [(mode, layout) for layout in layouts for mode in ("r2", "r3")]
    run_layouts(forks, setting[0], tmp_path, ranks, wanted)
    for mode, layout in wanted:
        assert_same(tmp_path / mode / name(layout), setting[1] / mode)


@pytest.mark.distributed
def test_the_cost_of_moving_traces_between_ranks_is_logged(setting: tuple[Path, Path], together: Path) -> None:
    one, two = setting[1], together / "r3" / name("tp=2")
    for line in lines(two):
        if line["mini_batch"] == MINI_BATCHES - 1:
            # Half of the rows go to the second rank. Bytes a row: 3 layers x top-2, and 1 that says if it has a route.
            rows = sum(each["tokens"] for each in lines(two) if each["step"] == line["step"])
            assert rows / 2 * 7 < line["trace/bytes_moved"] < rows * 7
            assert line["trace/seconds"] > 0
    assert all(line.get("trace/bytes_moved", 0) == 0 for line in lines(one / "r3"))
    assert not any("trace/bytes_moved" in line for line in lines(one / "r2"))


@pytest.mark.distributed
def test_a_pipeline_stage_may_have_no_routers(forks: Forks, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", num_layers=2, mlp_only_layers=(1,))
    save_rollouts(model, tmp_path / "saved", traces=True)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "saved")
    run_all(forks, config, 1, [f"run_dir={tmp_path / 'one' / mode} {MODES[mode]}" for mode in ("r2", "r3")])
    run_all(
        forks, config, 2, [f"run_dir={tmp_path / 'two' / mode} {MODES[mode]} parallel.pp=2" for mode in ("r2", "r3")]
    )
    for mode in ("r2", "r3"):
        assert_same(tmp_path / "two" / mode, tmp_path / "one" / mode)
