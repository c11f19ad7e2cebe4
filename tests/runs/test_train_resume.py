"""Real runs that are stopped, damaged, doubled or out of disk: nothing is lost, and nothing wrong goes on."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
import torch
from forks import Forks, Run
from rl_runs import weights, write_config
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics
from megatron_rl.stop import STATUS

STEPS = 5


SFT = ("-m", "megatron_rl", "sft")
TRAIN = ("-m", "megatron_rl", "train")
MADE_UP = [("patches:made_up_rollouts",)]


@pytest.fixture(scope="module")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, sft.yaml, and the uninterrupted run `whole` with a checkpoint of each step."""
    root = tmp_path_factory.mktemp("resume")
    make_tiny_model(root / "model", num_layers=1, hidden_size=32, num_experts=4, expert_hidden_size=16)
    lines = (orjson.dumps({"prompt": f"{i}+{i}=", "response": str(2 * i)}) for i in range(8))
    (root / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (root / "sft.yaml").write_text(
        f"""
run_dir: {root / "unset"}
model: {{path: {root / "model"}}}
engine: {{device: cpu, dtype: fp32}}
optim: {{lr: 1.0e-3}}
data: {{train: {root / "data.jsonl"}, max_tokens: 32}}
steps: {STEPS}
batch_size: 3
checkpoint: {{every: 1, keep: 9}}
"""
    )
    done = forks.run(*SFT, root / "sft.yaml", f"run_dir={root / 'whole'}")
    assert done.status == [0], done.stderr
    return root


def copy(setting: Path, run_dir: Path, *, until: int = STEPS) -> Path:
    """The whole run as it would be had it been killed after a later step than `until`, the last with a checkpoint."""
    shutil.copytree(setting / "whole", run_dir)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > until:
            shutil.rmtree(checkpoint)
    shutil.rmtree(run_dir / "model")
    return run_dir


def resume(forks: Forks, setting: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> Run:
    return forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", *overrides, "--resume", ranks=ranks)


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(directory.rglob("*"))
    }


def assert_refused(run: Run, *texts: str) -> None:
    assert run.status == [2], run.stderr
    assert "Traceback" not in run.stderr
    error = run.stderr[run.stderr.index("error: ") :]
    for text in texts:
        assert text in error


def figures(run_dir: Path) -> list[dict[str, float]]:
    """All that is logged but for times."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def assert_like_whole(setting: Path, run_dir: Path) -> None:
    expected = weights(setting / "whole")
    found = weights(run_dir)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name
    assert figures(run_dir) == figures(setting / "whole")


# ---- nothing is erased -----------------------------------------------------------------------------------------


def test_a_resume_without_a_checkpoint_is_refused_if_there_are_lines(
    forks: Forks, setting: Path, tmp_path: Path
) -> None:
    run_dir = copy(setting, tmp_path / "run", until=0)
    before = contents(run_dir)
    assert_refused(resume(forks, setting, run_dir), "no whole checkpoint", f"{STEPS} lines in metrics.jsonl")
    assert contents(run_dir) == before


def test_what_a_resume_takes_out_is_kept(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run", until=2)
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    done = resume(forks, setting, run_dir)
    assert done.status == [0], done.stderr
    assert_like_whole(setting, run_dir)
    (history,) = (run_dir / "history").iterdir()
    assert (history / "metrics.jsonl").read_bytes() == b"".join(lines[2:])


def test_a_failed_start_leaves_nothing_in_the_way_of_the_next(forks: Forks, setting: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(setting / "model", model)
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={tmp_path / 'run'}", f"model.path={model}", "steps=1")
    assert_refused(forks.run(*arguments), "model.safetensors")
    assert not (tmp_path / "run").exists()
    (model / "model.safetensors").write_bytes(whole)
    assert forks.run(*arguments).status == [0]


# ---- checkpoints that are not to be trusted ---------------------------------------------------------------------


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_damaged_checkpoints_are_passed_over(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run")
    root = run_dir / "checkpoints"
    damage(root / "step-000005" / "rank-00000.pt")
    os.truncate(root / "step-000004" / "manifest.json", 50)
    (root / "step-000003" / "rank-00000.pt").unlink()
    shutil.copytree(root / "step-000002", root / "step-000002-good")
    shutil.copytree(root / "step-000002", root / "step-copy")
    shutil.copytree(root / "step-000002", root / "step-000006.partial")
    done = resume(forks, setting, run_dir)
    assert done.status == [0], done.stderr
    for words in (
        "step-000005/rank-00000.pt: not what its manifest says",
        "step-000004/manifest.json: damaged: not JSON",
    ):
        assert words in done.stderr
    for name in (
        "step-000003/rank-00000.pt: cannot be read",
        "step-000002-good: passed over",
        "step-copy: passed over",
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
def test_a_shard_that_one_rank_finds_damaged_all_pass_over(forks: Forks, setting: Path, tmp_path: Path) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", "steps=3")
    done = forks.run(*arguments, f"run_dir={whole}", ranks=2)
    assert done.status == [0, 0], done.stderr
    shutil.copytree(whole, run_dir)
    damage(run_dir / "checkpoints" / "step-000003" / "rank-00001.pt")
    done = forks.run(*arguments, f"run_dir={run_dir}", "--resume", ranks=2)
    assert done.status == [0, 0], done.stderr
    assert "step-000003/rank-00001.pt: not what its manifest says" in done.stderr
    assert [line["step"] for line in read_metrics(run_dir / "history" / "0" / "metrics.jsonl")] == [3]
    assert figures(run_dir) == figures(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(run_dir)[name]), name


def test_if_no_checkpoint_is_whole_the_resume_is_refused(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run", until=1)
    damage(run_dir / "checkpoints" / "step-000001" / "rank-00000.pt")
    before = contents(run_dir)
    assert_refused(resume(forks, setting, run_dir), "no whole checkpoint", "rank-00000.pt: not what its manifest says")
    assert contents(run_dir) == before


def test_a_checkpoint_of_another_run_is_refused(forks: Forks, setting: Path, tmp_path: Path) -> None:
    done = forks.run(*SFT, setting / "sft.yaml", f"run_dir={tmp_path / 'other'}", "seed=3", "steps=2")
    assert done.status == [0]
    run_dir = copy(setting, tmp_path / "run", until=1)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-000002", run_dir / "checkpoints" / "step-000002")
    before = contents(run_dir)
    assert_refused(resume(forks, setting, run_dir), "step-000002: of another run")
    assert contents(run_dir) == before


def test_another_model_is_refused(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """Under the path that the run began with: of other shapes, of the same with another function, of other weights."""
    sizes = {"num_layers": 1, "hidden_size": 32, "num_experts": 4, "expert_hidden_size": 16}
    model, run_dir = tmp_path / "model", tmp_path / "run"
    make_tiny_model(model, **sizes)
    overrides = (f"model.path={model}", "steps=2")
    assert forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", *overrides).status == [0]
    before = contents(run_dir)
    for change, words in (
        ({"num_layers": 2}, "of another model than model.path: num_layers 1, not 2"),
        ({"norm_topk_prob": False}, "of another model than model.path: pre_softmax False, not True"),
        ({"seed": 1}, "of another model than model.path: model.safetensors differ"),
    ):
        shutil.rmtree(model)
        make_tiny_model(model, **{**sizes, **change})
        assert_refused(resume(forks, setting, run_dir, *overrides), f"step-000002: {words}")
        assert contents(run_dir) == before


def test_data_that_has_changed_is_refused(forks: Forks, setting: Path, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "data.jsonl", tmp_path / "run"
    first = (setting / "data.jsonl").read_bytes()
    data.write_bytes(first)
    overrides = (f"data.train={data}", "steps=1")
    assert forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", *overrides).status == [0]
    before = contents(run_dir)
    data.write_bytes(first + b'{"prompt": "9+9=", "response": "18"}\n')
    told = "data.train: not the data set that the run began with; its records or their order have changed"
    assert_refused(resume(forks, setting, run_dir, *overrides), "step-000001: ", told)
    lines = first.splitlines(keepends=True)
    data.write_bytes(b"".join(lines[::-1]))
    assert_refused(resume(forks, setting, run_dir, *overrides), told)
    assert contents(run_dir) == before


def test_run_files_that_are_cut_off_are_named(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = copy(setting, tmp_path / "run")
    config = (run_dir / "config.yaml").read_bytes()
    (run_dir / "config.yaml").write_bytes(b"run_dir: [")
    assert_refused(resume(forks, setting, run_dir), "config.yaml, line 1: not YAML")
    (run_dir / "config.yaml").write_bytes(b"")
    assert_refused(resume(forks, setting, run_dir), "config.yaml: found nothing, expected the keys")
    (run_dir / "config.yaml").write_bytes(config)
    (run_dir / "run.json").write_bytes(b"{")
    assert_refused(resume(forks, setting, run_dir), "run.json: damaged")


def test_sft_can_be_made_longer(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert forks.run(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "steps=2").status == [0]
    refused = resume(forks, setting, run_dir, "batch_size=4")
    assert_refused(refused, "batch_size: 3 in the run, 4 now", "may differ on resume: ", " steps, ")
    assert "train.steps" not in refused.stderr
    assert "rollout" not in refused.stderr
    assert resume(forks, setting, run_dir).status == [0]
    assert_like_whole(setting, run_dir)


# ---- signals and time ------------------------------------------------------------------------------------------


def stop(forks: Forks, run: Run, run_dir: Path, after: int, number: signal.Signals) -> Run:
    """Sends the signal to all ranks once so many lines are written."""
    deadline = time.monotonic() + 60
    file = run_dir / "metrics.jsonl"
    while not file.exists() or len(read_metrics(file)) < after:
        assert forks.poll(run), run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.002)
    for pid in run.pids:
        os.kill(pid, number)
    return forks.wait(run)


@pytest.mark.parametrize(("number", "seed"), [("SIGTERM", 0), ("SIGINT", 1), ("SIGUSR1", 2)])
def test_a_signal_saves_and_the_resumed_run_ends_like_the_whole(
    forks: Forks, setting: Path, tmp_path: Path, number: str, seed: int
) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0")
    after = random.Random(seed).randrange(1, STEPS - 1)
    stopped = stop(forks, forks.start(*arguments), run_dir, after, signal.Signals[number])
    assert stopped.status == [STATUS], stopped.stderr
    assert f"{number}: stopped after step" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    step = len(read_metrics(run_dir / "metrics.jsonl"))
    assert after <= step < STEPS
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert forks.run(*arguments, "--resume").status == [0]
    assert_like_whole(setting, run_dir)


def wait_for_line(forks: Forks, run: Run, run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists():
        assert forks.poll(run), run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for(forks: Forks, run: Run, said: str) -> None:
    deadline = time.monotonic() + 60
    while said not in run.stdout:
        assert forks.poll(run), run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.distributed
def test_a_signal_to_one_rank_stops_all_after_the_same_step(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0", "steps=2000")
    run = forks.start(*arguments, ranks=2)
    wait_for_line(forks, run, run_dir)
    os.kill(run.pids[1], signal.SIGTERM)
    forks.wait(run)
    assert run.status == [STATUS, STATUS], run.stderr
    step = len(read_metrics(run_dir / "metrics.jsonl"))
    assert f"SIGTERM: stopped after step {step} of 2000" in run.stderr
    assert (run_dir / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    more = forks.run(*arguments, f"steps={step + 1}", "--resume", ranks=2)
    assert more.status == [0, 0], more.stderr


def test_a_second_signal_ends_at_once(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0", "steps=2000")
    run = forks.start(*arguments, before=[("patches:slow_steps", 60.0)])
    wait_for(forks, run, "slow step")  # of a minute
    os.kill(run.pids[0], signal.SIGTERM)
    os.kill(run.pids[0], signal.SIGTERM)  # an echo
    time.sleep(1.0)
    assert forks.poll(run), "an echo of the first signal ended the run"
    time.sleep(5.0)
    os.kill(run.pids[0], signal.SIGTERM)
    assert forks.wait(run, timeout=10).status == [-signal.SIGTERM]
    # The dead process is no owner: the next start is let in.
    assert_refused(forks.run(*arguments, "--resume"), "no whole checkpoint")


def test_time_bounds(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """checkpoint.minutes and max_minutes; bounds that have passed by the first step act after each."""
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0")
    run = forks.run(*arguments, "checkpoint.minutes=0.00001", "checkpoint.keep=9")
    assert run.status == [0]
    assert len(list((run_dir / "checkpoints").iterdir())) == STEPS
    shutil.rmtree(run_dir)

    for step in range(1, STEPS):
        run = forks.run(*arguments, "max_minutes=0.00001", *(["--resume"] if step > 1 else []))
        assert run.status == [STATUS], run.stderr
        assert f"max_minutes: stopped after step {step} of {STEPS}" in run.stderr
    assert forks.run(*arguments, "--resume").status == [0]
    assert_like_whole(setting, run_dir)


@pytest.fixture(scope="module")
def rl(forks: Forks, setting: Path) -> Path:
    """The configuration of an RL run on made-up answers; `whole-rl` beside it is the uninterrupted one."""
    lines = (orjson.dumps({"id": f"p{i}", "prompt": f"{i} {i % 4}", "answer": "7"}) for i in range(12))
    (setting / "prompts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    config = write_config(setting / "rl.yaml", setting / "model", setting / "unused", preset="grpo")
    text = config.read_text().replace("train: unused", f"train: {setting / 'prompts.jsonl'}, verifier: math")
    text = text.replace("{steps: 3, mini_batches: 4}", "{steps: 3, mini_batches: 2}")
    config.write_text(text.replace(f"replay_from: {setting / 'unused'}", "replay_from: null"))
    whole = forks.run(*TRAIN, config, f"run_dir={setting / 'whole-rl'}", before=MADE_UP)
    assert whole.status == [0], whole.stderr
    return config


@pytest.mark.distributed
def test_a_signal_in_the_rollout_loses_no_more_than_its_step(
    forks: Forks, setting: Path, rl: Path, tmp_path: Path
) -> None:
    """On one rank, and on two of which the one that waits for the rollout hears it alone."""
    for ranks, layout in ((1, "parallel.tp=1"), (2, "parallel.tp=2")):
        run_dir = tmp_path / str(ranks)
        arguments = (*TRAIN, rl, f"run_dir={run_dir}", layout)
        run = forks.start(*arguments, ranks=ranks, before=[("patches:made_up_rollouts", 600.0)])
        wait_for(forks, run, "slow rollout")
        os.kill(run.pids[0], signal.SIGTERM)
        forks.wait(run)
        assert run.status == [STATUS] * ranks, run.stderr
        assert "SIGTERM: stopped after step 1 of 3" in run.stderr
        assert "Traceback" not in run.stderr
        assert read_steps(run_dir) == [1]
        more = forks.run(*arguments, "--resume", ranks=ranks, before=MADE_UP)
        assert more.status == [0] * ranks, more.stderr
        assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 1, 2, 2, 3, 3]
    expected, found = weights(setting / "whole-rl"), weights(tmp_path / "1")
    for name, weight in expected.items():
        assert torch.equal(weight, found[name]), name


# ---- two at a time ---------------------------------------------------------------------------------------------


def test_two_trainers_do_not_share_a_run_dir(forks: Forks, setting: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "checkpoint.every=0", "steps=2000")
    run = forks.start(*arguments)
    wait_for_line(forks, run, run_dir)
    for more in ([], ["--resume"]):
        second = forks.run(*arguments, *more)
        told = "not an empty directory" if not more else f"is in use by process {run.pids[0]} on "
        assert_refused(second, told)
    assert forks.poll(run), "the first went on"
    os.kill(run.pids[0], signal.SIGKILL)
    assert forks.wait(run).status == [-signal.SIGKILL]
    lines = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")]
    assert lines == list(range(1, len(lines) + 1))

    shutil.rmtree(run_dir)
    both = [forks.start(*SFT, setting / "sft.yaml", f"run_dir={run_dir}") for _ in range(2)]
    statuses = [forks.wait(run).status[0] for run in both]
    assert sorted(statuses) == [0, 2]  # type: ignore[type-var]
    assert_refused(both[statuses.index(2)], "run_dir")
    assert_like_whole(setting, run_dir)


# ---- full disks ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Leaves so many bytes free."""
    ballast = disk / "ballast"
    free = shutil.disk_usage(disk).free
    ballast.write_bytes(b"\0" * max(0, free - leave))
    return ballast


@pytest.mark.parametrize("leave", [100_000, 4096, 0])
def test_a_full_disk_costs_no_checkpoint(forks: Forks, setting: Path, small_disk: Path, leave: int) -> None:
    """With room for a part of a checkpoint, for some lines, and for nothing."""
    run_dir = small_disk / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}")
    run = forks.start(*arguments, before=[("patches:slow_steps", 1.0)])
    wait_for(forks, run, "slow step")
    ballast = fill(small_disk, leave)
    assert_refused(forks.wait(run), "was not written: ", "no space left on device", "free")
    assert read_steps(run_dir) == [1]
    if leave == 100_000:
        assert "the checkpoint of step-000002 was not written" in run.stderr
        assert "step-000001 (" in run.stderr
        assert not list((run_dir / "checkpoints").glob("*.partial"))
    before = contents(run_dir)
    if leave == 0:
        assert_refused(forks.run(*arguments, "--resume"), "was not written: ", "no space left on device")
        assert contents(run_dir) == before
    ballast.unlink()
    run = forks.run(*arguments, "checkpoint.keep=1", "--resume")
    assert run.status == [0], run.stderr
    assert_like_whole(setting, run_dir)


def read_steps(run_dir: Path) -> list[int]:
    return [
        orjson.loads(file.read_bytes())["state"]["step"]
        for file in sorted((run_dir / "checkpoints").glob("*/manifest.json"))
    ]


@pytest.mark.distributed
def test_all_ranks_end_on_a_full_disk(forks: Forks, setting: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    run = forks.start(*SFT, setting / "sft.yaml", f"run_dir={run_dir}", ranks=2, before=[("patches:slow_steps", 1.0)])
    wait_for(forks, run, "slow step")
    fill(small_disk, 60_000)
    forks.wait(run)
    assert run.status == [2, 2], run.stderr
    assert "no space left on device" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_model_that_cannot_be_exported_is_told(forks: Forks, setting: Path, small_disk: Path) -> None:
    run_dir = small_disk / "run"
    arguments = (*SFT, setting / "sft.yaml", f"run_dir={run_dir}", "steps=2")
    run = forks.start(*arguments, before=[("patches:slow_steps", 1.0)])
    wait_for(forks, run, "slow step")
    one = sum(file.stat().st_size for file in (run_dir / "checkpoints" / "step-000001").iterdir())
    ballast = fill(small_disk, one + 40_000)
    assert_refused(forks.wait(run), "the model in", "was not written: ", "no space left on device")
    assert read_steps(run_dir) == [1, 2]
    ballast.unlink()
    assert forks.run(*arguments, "--resume").status == [0]
    assert (run_dir / "model" / "model.safetensors").exists()
