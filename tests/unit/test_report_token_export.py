"""`megatron-rl tokens`: what a row holds, what is absent, and files that are in the way."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from paths import ROOT
from recorded_steps import PROMPT, STEP, columns_of, write_recorded, write_step

from megatron_rl.data.sample import LOST, Group, Verdict
from megatron_rl.data.step_files import rollout_file
from megatron_rl.data.store import read_groups, write_groups
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.errors import FileInTheWayError, MissingFileError
from megatron_rl.lab.token_records import read_tokens, token_file, write_tokens
from megatron_rl.report.loaded_runs import ReportError
from megatron_rl.report.token_export import export_tokens, schema_of

WORDS = ("12", "7", "345", "")
VERDICTS = (Verdict(1.0, True), Verdict(0.5, False), LOST, Verdict(0.0, False))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with four responses to two prompts: the routes of all, and the recorded values of those to the first."""
    path = tmp_path / "run"
    samples = write_step(path, WORDS, verdicts=VERDICTS)
    routed = []
    for sample in samples:
        rows = len(sample.token_ids) - 1
        ids = np.arange(rows)[:, None, None] % 4 + np.arange(2)[None, :, None] * 2 + np.arange(2)
        trace = RoutingTrace.from_ids(
            ids, layers=(0, 1), num_experts=8, source="rollout", versions=(VersionSpan(STEP - 1, 0, rows),)
        )
        routed.append(dataclasses.replace(sample, trace=trace))
    groups = [Group(i, routed[2 * i].prompt, tuple(routed[2 * i : 2 * i + 2])) for i in range(2)]
    write_groups(path / "rollouts" / f"step-{STEP:06d}-dp-0000.jsonl", groups, weight_version=STEP - 1)
    recorded = {0: samples[0], 1: samples[1]}
    count = sum(sample.response_tokens for sample in recorded.values())
    logprobs = np.linspace(-1, -0.1, count)
    values = {"logprob": logprobs, "old_logprob": logprobs - 0.25, "rollout_logprob": np.full(count, -0.25)}
    write_recorded(path, columns_of(recorded, **values, advantage=np.arange(count), clipped=np.full(count, -1)))
    return path


def export(run: Path, step: int | None = None) -> pandas.DataFrame:
    out = run.parent / f"tokens-{step}.parquet"
    done = export_tokens(run, out, step, model=None, rollouts=None)
    assert not done.notes
    found = pq.read_table(out)
    assert found.schema.equals(schema_of())
    assert found.num_rows == done.count
    return found.to_pandas()


def test_a_row_has_the_token_its_values_its_sample_and_its_experts(run: Path) -> None:
    rows = export(run)
    lengths = rows.groupby("sample").size()
    assert list(rows["sample"]) == sorted(rows["sample"])
    assert ["".join(part.text) for _, part in rows.groupby("sample")] == [word for word in WORDS if word]
    first = len(PROMPT)
    assert list(rows.position) == [first + i for length in lengths for i in range(length)]
    trained = rows[rows.trained]
    assert set(trained["sample"]) == {0, 1}
    assert list(trained.prompt_id.unique()) == ["p0"]
    assert trained.ratio.to_numpy() == pytest.approx(np.exp(0.25), rel=1e-6)
    assert (trained.log_pi_theta - trained.log_pi_old).to_numpy() == pytest.approx(0.25, rel=1e-5)
    assert list(trained.advantage) == list(range(len(trained)))
    assert set(trained.clipped) == {-1}
    assert set(trained.dropped) == {False}
    others = rows[~rows.trained]
    assert others[["ratio", "log_pi_theta", "entropy", "advantage", "clipped", "dropped"]].isna().all(axis=None)
    assert (others.log_mu == -0.25).all(), "the rollouts have it"
    assert rows.loss_mask.all()
    judged = rows.groupby("sample")[["reward", "correct"]].first()
    assert judged.reward[[0, 1]].tolist() == [1.0, 0.5]
    assert np.isnan(judged.reward[2]), "its verdict was lost"
    for row in rows.itertuples():
        predicts = row.position - 1
        assert [list(layer) for layer in row.experts] == [
            [predicts % 4, predicts % 4 + 1],
            [predicts % 4 + 2, predicts % 4 + 3],
        ]


def test_a_step_that_was_not_recorded_has_its_rollouts_alone(run: Path) -> None:
    shutil.rmtree(run / "tokens")
    with pytest.raises(MissingFileError, match=r"tokens: no step was recorded\. Train with lab\.record_steps"):
        export(run)
    rows = export(run, STEP)
    assert not rows.trained.any()
    assert rows.ratio.isna().all()
    assert (rows.log_mu == -0.25).all()
    with pytest.raises(MissingFileError, match="no rollouts of step 4"):
        export(run, 4)
    assert not list(run.parent.glob("*4*")) + list(run.parent.glob(".*partial"))


@pytest.mark.parametrize("lost", [0, 1])
def test_half_of_a_steps_rollouts_is_refused(run: Path, lost: int) -> None:
    files = [rollout_file(run / "rollouts", STEP, dp) for dp in (0, 1)]
    for file, group in zip(files, read_groups(files[0]), strict=True):
        write_groups(file, [group], weight_version=STEP - 1, files=2)
    assert len(export(run)["sample"].unique()) == len([word for word in WORDS if word])
    files[lost].unlink()
    for step in (None, STEP):
        out = run.parent / "half.parquet"
        with pytest.raises(MissingFileError, match=rf"^{files[lost]}: not there.*2 data-parallel replicas"):
            export_tokens(run, out, step, model=None, rollouts=None)
        assert not out.exists()


def test_token_values_of_some_replicas_alone_are_noted(run: Path) -> None:
    file = token_file(run / "tokens", STEP, 0)
    write_tokens(file, read_tokens(file).columns, replicas=2)
    done = export_tokens(run, run.parent / "half.parquet", None, model=None, rollouts=None)
    (note,) = done.notes
    assert note.startswith(f"step {STEP}: tokens/ has the values of 1 of 2 data-parallel replicas.")


def test_rollouts_with_fewer_groups_than_the_run_trains_on_are_refused(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("group_size", "prompts_per_step: 2, group_size"))
    assert len(export(run))
    config.write_text(config.read_text().replace("prompts_per_step: 2", "prompts_per_step: 4"))
    with pytest.raises(ReportError, match=r"rollouts: .* step 3 have 2 groups, but rollout\.prompts_per_step is 4"):
        export(run, STEP)


@pytest.mark.parametrize("step", [None, STEP])
def test_what_is_no_run_of_train_is_told_as_such(run: Path, step: int | None) -> None:
    with pytest.raises(MissingFileError, match=r"nope: not there\. Name the run_dir of a run"):
        export(run.parent / "nope", step)
    (run / "config.yaml").write_text("steps: 3\n")
    with pytest.raises(ReportError, match=r"config\.yaml: has no rollout\.group_size.*Runs of `sft` have no") as caught:
        export(run, step)
    assert "inspect" not in str(caught.value)


def test_a_run_without_its_tokenizer_has_no_texts(run: Path) -> None:
    shutil.rmtree(run.parent / "tokenizer")
    rows = export(run)
    assert rows.text.isna().all()
    assert rows.trained.any()


def test_a_file_in_the_way_stays(run: Path) -> None:
    out = run.parent / "mine.parquet"
    out.write_text("mine")
    with pytest.raises(FileInTheWayError, match=r"mine\.parquet: exists\. Name another file with --out"):
        export_tokens(run, out, None, model=None, rollouts=None)
    assert out.read_text() == "mine"


def test_the_example_prints_its_tables(run: Path) -> None:
    out = run.parent / "tokens.parquet"
    export_tokens(run, out, None, model=None, rollouts=None)
    script = ROOT / "examples" / "tokens" / "worst_tokens.py"
    done = subprocess.run([sys.executable, script, out], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.startswith(f"{len(WORDS[0] + WORDS[1])} trained tokens of 2 responses in 1 steps")
    assert "1.284" in text
