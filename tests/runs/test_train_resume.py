"""Resumed real runs, also from damaged or wrong files: nothing is lost, and wrong files are refused or skipped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from resume_runs import SFT, STEPS, assert_like_whole, assert_refused, contents, copy, damage, figures, resume, sft
from rl_runs import weights
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics

# ---- nothing is erased -----------------------------------------------------------------------------------------


def test_resume_without_a_checkpoint_is_refused_if_metrics_were_logged(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    run_dir = copy(setting, tmp_path / "run", until=0)
    before = contents(run_dir)
    assert_refused(resume(forks, setting, run_dir), "no whole checkpoint", f"{STEPS} lines in metrics.jsonl")
    assert contents(run_dir) == before


def test_metrics_that_a_resume_removes_are_kept_in_history(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run", until=2)
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    done = resume(forks, setting, run_dir)
    assert done.status == [0], done.stderr
    assert_like_whole(setting, run_dir)
    (history,) = (run_dir / "history").iterdir()
    assert (history / "metrics.jsonl").read_bytes() == b"".join(lines[2:])


# ---- start or go on, and the end ---------------------------------------------------------------------------------


@pytest.mark.distributed
def test_one_command_starts_goes_on_and_ends(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """On two ranks, of which rank 0 alone sees whether there is a run."""
    run_dir = tmp_path / "run"
    for steps in (2, STEPS):
        done = sft(forks, setting, run_dir, "--resume", "auto", f"steps={steps}", ranks=2)
        assert done.status == [0, 0], done.stderr
    assert f"steps: 2 up to step 2, {STEPS} from then on" in done.stderr
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, STEPS + 1))
    before = contents(run_dir)
    done = sft(forks, setting, run_dir, "--resume", "auto", ranks=2)
    assert done.status == [0, 0], done.stderr
    assert done.stderr.count(f"nothing is left to do: the run in {run_dir} has made all {STEPS} steps") == 1
    assert "engine:" not in done.stdout, "no model is loaded for it"
    assert contents(run_dir) == before


@pytest.mark.parametrize("word", ["", "auto"])
def test_a_resume_with_fewer_steps_than_are_made_is_refused(
    forks: Forks, setting: Path, tmp_path: Path, word: str
) -> None:
    """Whether the run has ended, or was stopped before its end."""
    ended, stopped = tmp_path / "ended", copy(setting, tmp_path / "stopped", until=4)
    shutil.copytree(setting / "whole", ended)
    before = contents(tmp_path)
    for run_dir, made, by in (
        (ended, STEPS, f"the run in {ended}"),
        (stopped, 4, f"the checkpoint {stopped / 'checkpoints' / 'step-000004'}"),
    ):
        done = sft(forks, setting, run_dir, "steps=3", "--resume", *filter(None, [word]))
        assert_refused(done, f"error: steps: 3, but {by} has made {made} steps; give steps above {made}\n")
        assert contents(tmp_path) == before


def test_the_summary_of_a_run_names_a_command_that_trains_longer(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["sft", str(setting / "sft.yaml"), f"run_dir={run_dir}", "steps=1"]
    for steps in (1, 2, 4):
        done = forks.run("-m", "megatron_rl", *words)
        assert done.status == [0], done.stderr
        assert len(read_metrics(run_dir / "metrics.jsonl")) == steps
        (line,) = (each for each in done.stdout.splitlines() if each.startswith("train longer"))
        words = shlex.split(re.split("megatron[_-]rl ", line, maxsplit=1)[1])


def test_a_run_whose_model_is_missing_has_not_ended(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run")
    done = resume(forks, setting, run_dir)
    assert done.status == [0], done.stderr
    assert "nothing is left" not in done.stderr
    assert_like_whole(setting, run_dir)


def test_auto_begins_anew_a_run_that_was_killed_before_its_first_checkpoint(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    run_dir = copy(setting, tmp_path / "run", until=0)
    (run_dir / "checkpoints.jsonl").unlink()
    before = contents(run_dir)
    assert_refused(resume(forks, setting, run_dir), "no whole checkpoint")
    assert contents(run_dir) == before
    done = sft(forks, setting, run_dir, "--resume", "auto")
    assert done.status == [0], done.stderr
    assert_like_whole(setting, run_dir)
    assert len(read_metrics(run_dir / "history" / "0" / "metrics.jsonl")) == STEPS


def test_a_refused_resume_changes_no_file(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """Whatever it is refused for: by its configuration, its directory, its files, or what it would lose."""
    run_dir, elsewhere = copy(setting, tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for words, told in (
        (["--resume", "optim.betas=[0.9, 0.99]"], "optim.betas: [0.9, 0.95] in the run, [0.9, 0.99] now"),
        (["--resume", "seed=3"], "seed: 0 in the run, 3 now"),
        (["--resume", "auto", "engine.dtype=bf16"], "engine.dtype: fp32 in the run, bf16 now"),
        (["--resume", "optim.schedule=linear"], "optim.decay_steps: 0"),
        (
            ["--resume", f"run_dir={elsewhere}"],
            f"error: run_dir {elsewhere} has no config.yaml, so there is no run to resume. Start without --resume, or "
            "correct the path.\n",
        ),
        (["--resume", "auto", f"run_dir={elsewhere}"], "not an empty directory: notes.txt is in it"),
        (["--resume", f"run_dir={tmp_path / 'nothing'}"], "no config.yaml, so there is no run to resume"),
        (
            [],
            f"error: run_dir {run_dir} is not an empty directory: a run is in it. Go on with that run by --resume, "
            "name another run_dir, or remove it.\n",
        ),
        (["--resume", "data.max_tokens=1"], "data.max_tokens: 32 in the run, 1 now"),
        (["--resume", "lab.alarms=[{metric: los, above: 1, action: warn}]"], "los"),
        (["--resume", "--fork", f"{setting / 'whole'}@2"], "--fork begins a new run"),
    ):
        assert_refused(sft(forks, setting, run_dir, *words), told)
        assert contents(tmp_path) == before, words


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.train={tmp}/bad.jsonl"], "bad.jsonl"),
        (["data.max_tokens=2"], "data.max_tokens = 2"),
        (["model.path={tmp}/other"], "config.json"),
        (["parallel.tp=3"], "parallel"),
    ],
)
def test_a_start_that_fails_leaves_no_run_directory(
    forks: Forks, setting: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "other").mkdir()
    assert_refused(sft(forks, setting, tmp_path / "run", *(word.format(tmp=tmp_path) for word in words)), told)
    assert not (tmp_path / "run").exists()


def test_a_failed_start_does_not_block_the_next_start(forks: Forks, setting: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(setting / "model", model)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={tmp_path / 'run'}", f"model.path={model}", "steps=1")
    assert_refused(forks.run(*arguments), "model.safetensors")
    assert not (tmp_path / "run").exists()
    (model / "model.safetensors").write_bytes(whole)
    assert forks.run(*arguments).status == [0]


# ---- checkpoints that cannot be trusted -------------------------------------------------------------------------


def test_resume_skips_damaged_checkpoints(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run")
    root = run_dir / "checkpoints"
    damage(root / "step-000005" / "rank-00000.safetensors")
    os.truncate(root / "step-000004" / "manifest.json", 50)
    (root / "step-000003" / "rank-00000.safetensors").unlink()
    shutil.copytree(root / "step-000002", root / "step-000002-good")
    shutil.copytree(root / "step-000002", root / "step-copy")
    shutil.copytree(root / "step-000002", root / "step-000006.partial")
    done = resume(forks, setting, run_dir)
    assert done.status == [0], done.stderr
    for words in (
        "step-000005/rank-00000.safetensors: not what its manifest says",
        "step-000004/manifest.json: damaged: not JSON",
    ):
        assert words in done.stderr
    for name in (
        "step-000003/rank-00000.safetensors: cannot be read",
        "step-000002-good: passed over",
        "step-copy: passed over",
        *(f"step-00000{step}: damaged, and moved to history/" for step in (3, 4, 5)),
    ):
        assert name in done.stderr
    assert_like_whole(setting, run_dir)
    assert sorted(p.name for p in root.iterdir()) == [
        *(f"step-{step:06d}" for step in (1, 2)),
        "step-000002-good",
        *(f"step-{step:06d}" for step in (3, 4, 5)),
        "step-copy",
    ]
    (history,) = (run_dir / "history").iterdir()
    assert len(list((history / "checkpoints").iterdir())) == 3


@pytest.mark.distributed
def test_all_ranks_skip_a_checkpoint_if_one_rank_finds_a_damaged_shard(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", "steps=3")
    done = forks.run(*arguments, f"run_dir={whole}", ranks=2)
    assert done.status == [0, 0], done.stderr
    shutil.copytree(whole, run_dir)
    damage(run_dir / "checkpoints" / "step-000003" / "rank-00001.safetensors")
    (run_dir / "ended.json").unlink()
    done = forks.run(*arguments, f"run_dir={run_dir}", "--resume", ranks=2)
    assert done.status == [0, 0], done.stderr
    assert "step-000003/rank-00001.safetensors: not what its manifest says" in done.stderr
    assert [line["step"] for line in read_metrics(run_dir / "history" / "0" / "metrics.jsonl")] == [3]
    assert figures(run_dir) == figures(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run_dir)[name]), name


def test_resume_is_refused_if_every_checkpoint_is_damaged(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run", until=1)
    damage(run_dir / "checkpoints" / "step-000001" / "rank-00000.safetensors")
    before = contents(run_dir)
    done = resume(forks, setting, run_dir)
    assert_refused(done, "no whole checkpoint", "rank-00000.safetensors: not what its manifest says; passed over\n")
    assert "history/" not in done.stderr, "nothing has been moved"
    assert contents(run_dir) == before


def test_resume_refuses_a_checkpoint_of_another_run(forks: Forks, setting: Path, tmp_path: Path) -> None:
    done = forks.run(*SFT, setting / "sft.yaml", f"run_dir={tmp_path / 'other'}", "seed=3", "steps=2")
    assert done.status == [0]
    run_dir = copy(setting, tmp_path / "run", until=1)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-000002", run_dir / "checkpoints" / "step-000002")
    before = contents(run_dir)
    assert_refused(resume(forks, setting, run_dir), "step-000002: of another run")
    assert contents(run_dir) == before


def test_resume_refuses_another_model(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """The files at model.path are replaced: by other shapes, by another routing function, or by other weights."""
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 32, "num_experts": 4, "expert_hidden_size": 16}
    model, run_dir = tmp_path / "model", tmp_path / "run"
    make_tiny_model(model, **sizes)
    assert sft(forks, setting, run_dir, f"model.path={model}", "steps=2").status == [0]
    before = contents(run_dir)
    for change, words in (
        ({"num_layers": 2}, "of another model than model.path: num_layers 1, not 2"),
        ({"norm_topk_prob": False}, "of another model than model.path: router.pre_softmax False, not True"),
        ({"seed": 1}, "of another model than model.path: model.safetensors differ"),
    ):
        shutil.rmtree(model)
        make_tiny_model(model, **{**sizes, **change})
        assert_refused(resume(forks, setting, run_dir, f"model.path={model}"), f"step-000002: {words}")
        assert contents(run_dir) == before


def test_resume_refuses_changed_data(forks: Forks, setting: Path, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "run"
    first = (setting / "data.jsonl").read_bytes()
    data.write_bytes(first)
    assert sft(forks, setting, run_dir, f"data.train={data}", "steps=1").status == [0]
    before = contents(run_dir)
    data.write_bytes(first + b'{"prompt": "9+9=", "response": "18"}\n')
    told = "data.train: not the data set that the run began with; its records or their order have changed"
    assert_refused(resume(forks, setting, run_dir, f"data.train={data}"), "step-000001: ", told)
    lines = first.splitlines(keepends=True)
    data.write_bytes(b"".join(lines[::-1]))
    assert_refused(resume(forks, setting, run_dir, f"data.train={data}"), told)
    assert contents(run_dir) == before


def test_the_error_names_a_truncated_run_file(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run")
    config = (run_dir / "config.yaml").read_bytes()
    (run_dir / "config.yaml").write_bytes(b"run_dir: [")
    assert_refused(resume(forks, setting, run_dir), "config.yaml, line 1: not YAML")
    (run_dir / "config.yaml").write_bytes(b"")
    assert_refused(resume(forks, setting, run_dir), "config.yaml: found nothing, expected the keys")
    (run_dir / "config.yaml").write_bytes(config)
    (run_dir / "run.json").write_bytes(b"{")
    assert_refused(resume(forks, setting, run_dir), "run.json: damaged")


def test_an_sft_run_can_be_extended_on_resume(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "steps=2").status == [0]
    refused = resume(forks, setting, run_dir, "batch_size=4")
    assert_refused(refused, "batch_size: 3 in the run, 4 now", "may differ on resume: ", " steps, ")
    assert "train.steps" not in refused.stderr
    assert "rollout" not in refused.stderr
    assert resume(forks, setting, run_dir).status == [0]
    assert_like_whole(setting, run_dir)
