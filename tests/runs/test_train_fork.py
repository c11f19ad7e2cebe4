"""Real runs under another learning rate, runs forked from a checkpoint of another, and exported checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import orjson
import pytest
import torch
from forks import Forks, Run
from resume_runs import assert_refused, contents, copy, damage, figures, resume, sft
from rl_runs import weights
from tiny_models import make_tiny_model

from megatron_rl.engine.shard_file import ShardReader
from megatron_rl.lab.changes import read_changes
from megatron_rl.lab.run import read_metrics

# ---- another learning rate -------------------------------------------------------------------------------------


def test_a_resume_follows_another_learning_rate_and_schedule(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """The schedule counts the steps of the whole run, and its new values hold for the steps that the resume makes."""
    run_dir = copy(setting, tmp_path / "run", until=2)
    linear = ("optim.schedule=linear", "optim.lr=4.0e-3", "optim.min_lr=1.0e-3", "optim.decay_steps=5", "steps=4")
    done = resume(forks, setting, run_dir, *linear, "optim.warmup_steps=1")
    assert done.status == [0], done.stderr
    assert "note: optim.lr: 0.001 up to step 2, 0.004 from then on" in done.stderr
    lines = read_metrics(run_dir / "metrics.jsonl")
    expected = [1e-3, 1e-3, 1e-3 + 3e-3 * (1 - 2 / 4), 1e-3 + 3e-3 * (1 - 3 / 4)]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-12)
    changes = [(each.step, each.key) for each in read_changes(run_dir)]
    keys = ("decay_steps", "lr", "min_lr", "schedule", "warmup_steps")
    assert changes == [*((2, f"optim.{key}") for key in keys), (2, "run_dir"), (2, "steps")]
    # From the same checkpoint once more: a warm-up that is longer than the steps so far goes on.
    shutil.rmtree(run_dir / "checkpoints" / "step-000004")
    shutil.rmtree(run_dir / "checkpoints" / "step-000003")
    done = resume(forks, setting, run_dir, "optim.warmup_steps=6", "steps=4")
    assert done.status == [0], done.stderr
    assert [line["lr"] for line in read_metrics(run_dir / "metrics.jsonl")[2:]] == pytest.approx([0.5e-3, 4e-3 / 6])
    assert [(each.step, each.key, each.new) for each in read_changes(run_dir)] == [
        (2, "optim.warmup_steps", "6"),
        (2, "run_dir", str(run_dir)),
        (2, "steps", "4"),
    ]


# ---- forks -----------------------------------------------------------------------------------------------------


def fork(forks: Forks, setting: Path, run_dir: Path, step: int | str, *words: str, ranks: int = 1) -> Run:
    return sft(forks, setting, run_dir, "--fork", f"{setting / 'whole'}@{step}", *words, ranks=ranks)


def test_a_fork_goes_on_to_the_bit_and_says_what_it_is_of(forks: Forks, setting: Path, tmp_path: Path) -> None:
    before, run_dir = contents(setting / "whole"), tmp_path / "run"
    done = fork(forks, setting, run_dir, 3)
    assert done.status == [0], done.stderr
    assert f"note: forked from step 3 of {setting / 'whole'}, with the same configuration" in done.stderr
    assert figures(run_dir) == figures(setting / "whole")[3:]
    for name, weight in weights(setting / "whole").items():
        assert torch.equal(weight, weights(run_dir)[name]), name
    assert contents(setting / "whole") == before
    record = orjson.loads((run_dir / "fork.json").read_bytes())
    assert record == {
        "run": str(setting / "whole"),
        "id": orjson.loads((setting / "whole" / "run.json").read_bytes())["id"],
        "step": 3,
        "networks": ["policy"],
        "optimizers": ["policy"],
        "data_goes_on": True,
        "changes": [{"key": "run_dir", "old": str(setting / "whole"), "new": str(run_dir)}],
    }
    assert orjson.loads((run_dir / "run.json").read_bytes())["id"] != record["id"]


def test_a_fork_begins_anew_what_its_settings_do_not_allow(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """With other betas the moments would be means over other steps; another seed has another order of the data."""
    betas, seed = tmp_path / "betas", tmp_path / "seed"
    done = fork(forks, setting, betas, "last", "optim.betas=[0.8, 0.9]", "steps=6", "batch_size=2")
    assert done.status == [0], done.stderr
    said = "with other values of batch_size, optim.betas, steps; begun anew: optimizer of the policy"
    assert f"forked from step 5 of {setting / 'whole'}, {said}" in done.stderr
    state = ShardReader(betas / "checkpoints" / "step-000006" / "rank-00000.safetensors").state["networks"]["policy"]
    assert (state["steps"], state["scheduler"]["num_steps"]) == (1, 6)
    done = fork(forks, setting, seed, 4, "seed=3")
    assert done.status == [0], done.stderr
    assert "begun anew: order of the data" in done.stderr
    (line,) = figures(seed)
    assert line["loss"] != figures(setting / "whole")[4]["loss"]
    cursor = orjson.loads((seed / "checkpoints" / "step-000005" / "manifest.json").read_bytes())["state"]["cursor"]
    assert cursor == {"seed": 3, "epoch": 0, "position": 3}
    bf16 = tmp_path / "bf16"  # the checkpoint has fp32 weights, whatever the run computes in
    done = fork(forks, setting, bf16, 4, "engine.dtype=bf16")
    assert done.status == [0], done.stderr
    assert figures(bf16)[0]["loss"] == pytest.approx(figures(setting / "whole")[4]["loss"], rel=0.01)


def test_a_forked_run_is_resumed_from_its_fork_until_it_has_a_checkpoint(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    """And never from step 0, with the weights of model.path."""
    run_dir = tmp_path / "run"
    assert fork(forks, setting, run_dir, 3).status == [0]
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints.jsonl").unlink()
    (run_dir / "ended.json").unlink()
    whole = weights(run_dir)
    assert_refused(resume(forks, setting, run_dir), "start again at step 3")
    done = sft(forks, setting, run_dir, "--resume", "auto")
    assert done.status == [0], done.stderr
    assert figures(run_dir) == figures(setting / "whole")[3:]
    for name, weight in weights(run_dir).items():
        assert torch.equal(weight, whole[name]), name


def test_a_fork_that_cannot_be_is_refused(forks: Forks, setting: Path, tmp_path: Path) -> None:
    parent, run_dir = copy(setting, tmp_path / "parent"), tmp_path / "run"
    make_tiny_model(tmp_path / "wider", num_layers=1, hidden_size=64, num_experts=4, expert_hidden_size=16)
    damage(parent / "checkpoints" / "step-000002" / "rank-00000.safetensors")
    damage(parent / "checkpoints" / "step-000001" / "manifest.json")
    before = contents(parent)
    for name, words, told in (
        (f"{parent}@7", [], "has no complete checkpoint of step 7; it has 1, 2, 3, 4, 5 (checkpoint.keep)"),
        (f"{parent}", [], "expected RUN_DIR@STEP"),
        (f"{tmp_path / 'none'}@1", [], "no run, because it has no config.yaml"),
        (f"{parent}@2", [], "step-000002/rank-00000.safetensors: not what its manifest says; name another"),
        (f"{parent}@1", [], "step-000001/manifest.json: damaged"),
        (
            f"{parent}@3",
            [f"model.path={tmp_path / 'wider'}"],
            "of another model than model.path: hidden_size 32, not 64",
        ),
        (f"{parent}@3", ["optim.freeze=[router]"], "optim.freeze: [] in "),
        (f"{parent}@3", [f"run_dir={parent}"], "not an empty directory"),
        (
            f"{parent}@4",
            ["steps=2"],
            f"error: steps: 2, but --fork: the checkpoint {parent}/checkpoints/step-000004 has made 4",
        ),
        (f"{parent}@4", ["steps=4"], "step-000004 has made 4 steps; give steps above 4\n"),
    ):
        assert_refused(sft(forks, setting, run_dir, "--fork", name, *words), told)
        assert not run_dir.exists(), told
        assert contents(parent) == before, told


# ---- export ----------------------------------------------------------------------------------------------------


def export(forks: Forks, *words: str | Path) -> Run:
    return forks.run("-m", "megatron_rl", "export", *words)


def test_an_export_equals_the_model_that_the_run_wrote(forks: Forks, setting: Path, tmp_path: Path) -> None:
    before, out = contents(setting / "whole"), tmp_path / "out"
    done = export(forks, setting / "whole", out)
    assert done.status == [0], done.stderr
    assert done.stdout == f"{out}: the policy of {setting / 'whole' / 'checkpoints' / 'step-000005'}, in fp32\n"
    assert contents(out) == contents(setting / "whole" / "model")
    shorter, empty = tmp_path / "shorter", tmp_path / "empty"
    assert sft(forks, setting, shorter, "steps=3").status == [0]
    empty.mkdir()
    assert export(forks, f"{setting / 'whole'}@3", empty).status == [0]
    assert contents(empty) == contents(shorter / "model")
    assert contents(setting / "whole") == before


def test_an_export_that_cannot_be_is_refused(forks: Forks, setting: Path, tmp_path: Path) -> None:
    parent, taken = copy(setting, tmp_path / "parent"), tmp_path / "taken"
    damage(parent / "checkpoints" / "step-000002" / "rank-00000.safetensors")
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    shutil.copytree(setting / "model", tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    before = contents(tmp_path)
    for words, told in (
        ([f"{parent}@9", tmp_path / "out"], "has no complete checkpoint of step 9"),
        ([f"{parent}@2", tmp_path / "out"], "step-000002/rank-00000.safetensors: not what its manifest says"),
        ([parent, taken], "taken exists already"),
        ([parent, tmp_path / "out", "--critic"], "has no critic; leave out --critic"),
        ([parent, tmp_path / "out", "--model", tmp_path / "model"], "model.safetensors are not those that the policy"),
        ([tmp_path, tmp_path / "out"], "no run, because it has no config.yaml"),
        ([f"{parent}@first", tmp_path / "out"], "expected RUN_DIR@STEP"),
    ):
        assert_refused(export(forks, *words), told)
        assert contents(tmp_path) == before, told
