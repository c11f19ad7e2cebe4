"""The page of one step: colours, order, what is left out, and files that do not belong together."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_runs import parse
from recorded_steps import LIVE, STEP, columns_of, write_recorded, write_step

from megatron_rl.data.sample import LOST, Group, Verdict
from megatron_rl.data.step_files import rollout_file
from megatron_rl.data.store import read_groups, write_groups
from megatron_rl.errors import MissingFileError, UserError
from megatron_rl.lab.token_records import COLUMNS, OLD, TokenFileError, read_tokens, token_file, write_tokens
from megatron_rl.report.command import run_inspect
from megatron_rl.report.inspected import InspectOptions, load_step
from megatron_rl.report.token_measures import MEASURES
from megatron_rl.report.token_page import LONG, StepPage, compose, render

BY_KEY = {measure.key: measure for measure in MEASURES}


def page_of(path: Path, most: int = 16) -> StepPage:
    return compose(load_step(path, InspectOptions(STEP)), most)


def classes(page: StepPage, response: int) -> list[list[str]]:
    """Classes of each token of the shown response with this number."""
    (shown,) = [each for each in page.responses if each.response.number == response]
    (tokens,) = shown.parts
    assert not isinstance(tokens, int)
    return [token.classes.split() for token in tokens]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two groups of two responses, one of which was not trained on."""
    path = tmp_path / "run"
    verdicts = [Verdict(1.0, True), Verdict(0.0, False), LOST, Verdict(0.5, False)]
    samples = write_step(path, ["12", "3", "45", "<6"], verdicts=verdicts)
    trained = {0: samples[0], 1: samples[1], 3: samples[3]}
    columns = columns_of(
        trained,
        old_logprob=[-0.25, -0.25, -0.25, -0.75, -3.0],
        rollout_logprob=[-0.25, -0.25, -0.25, -0.25, -0.25],
        logprob=[-0.25, -0.255, -0.25, -0.25, -3.5],
        advantage=[0.5, 0.5, -0.5, 1.0, 1.0],
        clipped=[0, -1, 0, 1, 0],
        dropped=[False, False, False, False, True],
        **{LIVE[0]: [0.0, 0.25, 0.0, 0.0, 0.6], LIVE[1]: [0.0, 0.0, np.nan, 0.04, 0.0]},
    )
    write_recorded(path, columns)
    return path


def test_tokens_have_the_colours_of_their_values(run: Path) -> None:
    page = page_of(run)
    assert [each.measure.key for each in page.measures] == [measure.key for measure in MEASURES]
    assert classes(page, 0) == [["logprob-1"], ["ratio-n1", "logprob-1", "change-4", "clipped"]]
    assert classes(page, 1) == [["logprob-1"]]
    expected = [
        ["ratio-5", "mismatch-n5", "logprob-1", "rollout_change-1", "clipped"],
        ["ratio-n5", "mismatch-n6", "logprob-4", "change-6", "dropped"],
    ]
    assert classes(page, 3) == expected


def test_responses_and_tokens_stand_worst_first(run: Path) -> None:
    page = page_of(run)
    places = {each.response.number: each.ranks for each in page.responses}
    assert sorted(places, key=lambda n: places[n]["ratio"])[:2] == [3, 0]
    assert sorted(places, key=lambda n: places[n]["rollout_change"])[0] == 3
    worst = {each.measure.key: [(t.response, t.position, t.value) for t in each.worst] for each in page.measures}
    assert worst["ratio"] == [(3, 0, 0.5), (3, 1, -0.5), (0, 1, pytest.approx(-0.005, abs=1e-6))]
    assert worst["change"] == [(3, 1, pytest.approx(0.6)), (0, 1, pytest.approx(0.25))]
    assert worst["logprob"][0] == (3, 1, -3.5)
    mean = {each.measure.key: each.mean for each in page.measures}
    assert mean["mismatch"] == pytest.approx((0 + 0 + 0 - 0.5 - 2.75) / 5)
    assert mean["rollout_change"] == pytest.approx(0.04 / 4)  # a token that was not compared does not count
    p99 = {each.measure.key: each.p99 for each in page.measures}
    assert p99["mismatch"] == pytest.approx(np.percentile([0, 0, 0, 0.5, 2.75], 99))  # of the size ...
    assert p99["logprob"] == pytest.approx(np.percentile([0.25, 0.255, 0.25, 0.25, 3.5], 99))  # ... and of the fall


def test_only_the_worst_responses_of_each_measure_are_shown(run: Path) -> None:
    assert [each.response.number for each in page_of(run, most=1).responses] == [3]
    text = render(page_of(run, most=1))
    assert all(f'id="{target}"' in text for target in re.findall(r'href="#([^"]+)"', text))
    assert "<td>0</td>" in text  # a worst token of a response that is not shown has no link
    assert len(page_of(run, most=2).responses) < len(page_of(run).responses) == 4


def test_the_page_names_each_response_and_escapes_its_text(run: Path) -> None:
    text = render(page_of(run))
    page = parse(text)
    words = " ".join(" ".join(page.text).split())
    assert (
        "prompt p1, sample 0; verdict lost; advantage -; 2 tokens, stop; expected answer: 2 ; not trained on" in words
    )
    assert "prompt p0, sample 0; reward 1, correct; advantage 0.5; mini-batch 0; 2 tokens, stop" in words
    assert "prompt p1, sample 1; reward 0.5, wrong; advantage 1;" in words
    assert ">&lt;pad&gt;</span>" in text
    assert "<pad>" not in text
    assert "&amp;" not in text  # the page's own signs are escaped once
    assert not [url for url in page.urls if not url.startswith(("#", "data:"))]
    assert "script" not in page.tags


def test_a_step_that_was_not_recorded_shows_the_rollouts_log_probs(tmp_path: Path) -> None:
    write_step(tmp_path / "run", ["12", "3"])
    page = page_of(tmp_path / "run")
    assert [each.measure.key for each in page.measures] == ["logprob"]
    assert page.measures[0].mean == pytest.approx(-0.25)
    text = render(page)
    assert "lab.record_steps" in text
    assert "not trained on" not in text


def test_a_long_response_shows_its_ends_and_its_worst_tokens(tmp_path: Path) -> None:
    path, count = tmp_path / "run", 2 * LONG
    samples = write_step(path, ["1" * count, "3"])
    logprobs = np.full(count, -0.25)
    logprobs[700] = -9.0
    numbered = dict(enumerate(samples))
    recorded = columns_of(numbered, logprob=[*logprobs, -0.25], old_logprob=[-0.25] * (count + 1))
    write_recorded(path, recorded)
    (long,) = [each for each in page_of(path).responses if each.response.number == 0]
    runs = [part if isinstance(part, int) else len(part) for part in long.parts]
    assert sum(runs) == count
    assert [isinstance(part, int) for part in long.parts] == [False, True, False, True, False]
    (middle,) = [part for part in long.parts[1:-1] if not isinstance(part, int)]
    assert "ratio-n6" in " ".join(token.classes for token in middle)
    assert "left out" in render(page_of(path))


def test_files_of_several_replicas_are_read_together(tmp_path: Path) -> None:
    path = tmp_path / "run"
    samples = write_step(path, ["12", "3", "45", "6"])
    for dp in (0, 1):
        numbered = {n: s for n, s in enumerate(samples) if n % 2 == dp}
        recorded = columns_of(numbered)
        recorded["logprob"][:] = -1 - dp
        if dp:  # its expert changes were not measured
            recorded = {name: values for name, values in recorded.items() if name not in LIVE}
        write_recorded(path, recorded, dp, replicas=2)
    assert "Here are the token values" not in render(page_of(path))
    step = load_step(path, InspectOptions(STEP))
    assert [each.columns["logprob"].tolist() for each in step.responses] == [[-1, -1], [-2], [-1, -1], [-2]]


def test_pieces_of_characters_and_unknown_ids_have_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {5: ("the", "\u2581the"), 6: ("\ufffd", "<0xE2>"), 7: ("", None)}

    class Pieces:
        def decode(self, ids: list[int], **_: Any) -> str:
            return texts.get(ids[0], ("a", "a"))[0]

        def convert_ids_to_tokens(self, token: int) -> str | None:
            return texts.get(token, ("a", "a"))[1]

    monkeypatch.setattr("megatron_rl.report.inspected.load_tokenizer", lambda _: Pieces())
    path = tmp_path / "run"
    samples = write_step(path, ["1234", "3"])
    ids = np.array([*samples[0].prompt.token_ids, 5, 6, 7, 5], dtype=np.int32)
    samples[0] = dataclasses.replace(samples[0], token_ids=ids)
    file = path / "rollouts" / f"step-{STEP:06d}-dp-0000.jsonl"
    write_groups(file, [Group(0, samples[0].prompt, tuple(samples))], weight_version=STEP - 1)
    assert load_step(path, InspectOptions(STEP)).responses[0].texts == [" the", "<0xE2>", "<7>", " the"]


def test_badness_orders_absent_and_infinite_values() -> None:
    values = np.array([np.nan, -np.inf, 0.5, -2.0])
    untrained, trained = np.zeros(4, dtype=bool), np.ones(4, dtype=bool)
    assert BY_KEY["ratio"].badness(values, untrained).tolist() == [0.0, np.inf, 0.5, 2.0]
    assert BY_KEY["ratio"].badness(values, trained).tolist() == [np.inf, np.inf, 0.5, 2.0]
    assert BY_KEY["ratio"].levels(values, untrained).tolist() == [0, -6, 5, -6]
    assert BY_KEY["logprob"].badness(values, untrained).tolist() == [0.0, np.inf, 0.0, 2.0]
    assert BY_KEY["logprob"].levels(values, untrained).tolist() == [0, 6, 0, 3]
    assert BY_KEY["change"].levels(np.array([np.nan, 0.0, 0.01, 0.51]), trained).tolist() == [0, 0, 1, 6]


# Files that are missing, damaged, or of another run


def refuse(path: Path, kind: type[UserError], *texts: str, step: int = STEP) -> None:
    with pytest.raises(kind) as caught:
        run_inspect(path, InspectOptions(step), None)
    for text in texts:
        assert text in str(caught.value)
    assert not (path / "report").exists()


def test_what_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", MissingFileError, "nowhere: not there")
    refuse(run, MissingFileError, "no rollouts of step 7; it has those of steps 3 to 3. Name another --step.", step=7)
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    refuse(run, MissingFileError, "tokenizer: the model whose tokenizer", "--model")
    page = run_inspect(run, InspectOptions(STEP, model=tmp_path / "moved"), None)
    assert page == run / "report" / "step-000003.html"
    assert page.read_text().startswith("<!doctype html>")


def test_token_values_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    other = write_step(tmp_path / "other" / "run", ["99", "9", "99", "99"])
    write_recorded(run, columns_of({0: other[0]}), dp=1)
    refuse(run, TokenFileError, "step-000003-dp-0001.parquet: its sample 0 has other tokens than that of the rollouts")
    write_recorded(run, columns_of({8: other[0]}), dp=1)
    refuse(run, TokenFileError, "dp-0001.parquet: has sample 8, which is not among the step's rollouts", "all replicas")


def test_damaged_token_values_are_refused(run: Path) -> None:
    file = token_file(run / "tokens", STEP, 0)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refuse(run, TokenFileError, "step-000003-dp-0000.parquet: not a file of token values, or damaged")
    write_tokens(file, {"sample": np.zeros(1)}, replicas=1)
    refuse(run, TokenFileError, "has no column 'advantage'")


def test_a_run_of_sft_is_refused(run: Path) -> None:
    (run / "config.yaml").write_text("steps: 3\n")
    shutil.rmtree(run / "rollouts")
    refuse(run, UserError, "config.yaml: has no rollout.group_size", "Runs of `sft` have no rollouts to read")


def test_half_of_a_steps_rollouts_is_refused(run: Path) -> None:
    file, other = (rollout_file(run / "rollouts", STEP, dp) for dp in (0, 1))
    first, second = read_groups(file)
    write_groups(file, [first], weight_version=STEP - 1, files=2)
    refuse(run, MissingFileError, f"{other}: not there, but each of the run's 2 data-parallel replicas wrote a file")
    write_groups(other, [second], weight_version=STEP - 1, files=2)
    assert len(load_step(run, InspectOptions(STEP)).responses) == 4


def test_a_group_that_is_there_twice_is_refused(run: Path) -> None:
    file = run / "rollouts" / "step-000003-dp-0000.jsonl"
    (run / "rollouts" / "step-000003-dp-0001.jsonl").write_bytes(file.read_bytes())
    refuse(run, UserError, "step 3 has sample 0 twice")


def test_written_token_values_are_read_back(tmp_path: Path) -> None:
    columns = {name: np.arange(3).astype(kind.to_pandas_dtype()) for name, kind in COLUMNS.items()}
    columns["logprob"][1] = np.nan
    columns["expert_change/rerun"] = np.array([0.5, np.nan, 0.0], dtype=np.float32)
    write_tokens(tmp_path / "tokens.parquet", columns, replicas=7)
    found = read_tokens(tmp_path / "tokens.parquet")
    assert found.replicas == 7
    assert found.columns.keys() == columns.keys()
    for name, values in columns.items():
        np.testing.assert_array_equal(found.columns[name], values)
        assert found.columns[name].dtype == values.dtype
    written = pq.read_table(tmp_path / "tokens.parquet")
    assert [written.column(name).null_count for name in ("logprob", "expert_change/rerun")] == [0, 1]


# Steps that went wrong, and runs without some of the values


def test_values_that_are_not_finite_are_the_worst(tmp_path: Path) -> None:
    path = tmp_path / "run"
    samples = write_step(path, ["12", "3"])
    logprobs = [-3.0, -0.25, np.nan]
    recorded = columns_of(dict(enumerate(samples)), logprob=logprobs, old_logprob=[-0.25] * 3)
    write_recorded(path, recorded)
    page = page_of(path)
    shown = page.responses[1]
    assert (shown.response.number, shown.mini_batch, shown.advantage) == (1, 0, 0.0)
    assert (shown.ranks["ratio"], shown.ranks["logprob"]) == (0, 0)
    assert classes(page, 1) == [["ratio-6", "logprob-6"]]
    found = {each.measure.key: (each.lost, [(t.response, t.position) for t in each.worst]) for each in page.measures}
    assert found["ratio"] == (1, [(1, 0), (0, 0)])
    assert found["logprob"] == (1, [(1, 0), (0, 0), (0, 1)])
    text = render(page)
    assert "1 values are not finite" in text
    assert "not trained on" not in text


def test_without_pi_old_there_is_no_mismatch_and_the_ratio_is_to_mu(tmp_path: Path) -> None:
    path = tmp_path / "run"
    samples = write_step(path, ["12", "3"])
    recorded = columns_of(dict(enumerate(samples)), logprob=[-0.25, -0.3, -0.75])
    del recorded[OLD]
    write_recorded(path, recorded)
    means = {each.measure.key: each.mean for each in page_of(path).measures}
    assert "mismatch" not in means
    assert means["ratio"] == pytest.approx((0 - 0.05 - 0.5) / 3, abs=1e-6)


def test_the_page_says_why_a_step_has_no_values(tmp_path: Path) -> None:
    path = tmp_path / "run"
    samples = write_step(path, ["12", "3", "45", "6"])
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(config + f"lab: {{record_steps: [1, {STEP}]}}\n")
    assert "names the step, but its policy was not updated" in render(page_of(path))
    (path / "config.yaml").write_text(config + f"lab: {{record_steps: [1, {STEP}0]}}\n")
    assert "to record log-probs" in render(page_of(path))
    write_recorded(path, columns_of({0: samples[0]}), replicas=2)
    assert "Here are the token values of 1 of the run's 2 data-parallel replicas." in render(page_of(path))


def test_replayed_rollouts_that_have_moved_are_named(run: Path, tmp_path: Path) -> None:
    config = (run / "config.yaml").read_text().replace("null", str(tmp_path / "elsewhere"))
    (run / "config.yaml").write_text(config)
    refuse(run, MissingFileError, "the run has made 0 steps of those that it replays", "another --step")
    (run / "metrics.jsonl").write_text(f'{{"step": {STEP}, "loss": 0.5}}\n')
    (run / "rollouts").rename(tmp_path / "copied")
    refuse(run, MissingFileError, "elsewhere/rollouts, which the run replays: no rollouts of step 3", "--rollouts")
    step = load_step(run, InspectOptions(STEP, rollouts=tmp_path / "copied"))
    assert len(step.responses) == 4


def test_a_run_without_its_configuration_is_named(run: Path) -> None:
    (run / "metrics.jsonl").write_text(f'{{"step": {STEP}, "loss": 0.5}}\n')
    (run / "config.yaml").unlink()
    refuse(run, MissingFileError, "config.yaml: not there")


def test_links_lead_to_tokens_that_are_shown(tmp_path: Path) -> None:
    """All worst tokens are in one long response, more of them than its own windows would show."""
    path, count = tmp_path / "run", 20 * LONG
    samples = write_step(path, ["1" * count, "3"])
    logprobs = np.full(count, -0.25)
    logprobs[500 : 500 + 12 * LONG : LONG] = -9.0 - np.arange(12)
    recorded = columns_of(dict(enumerate(samples)), logprob=[*logprobs, -0.3], old_logprob=[-0.25] * (count + 1))
    write_recorded(path, recorded)
    for most in (1, 2):
        text = render(page_of(path, most))
        targets = re.findall(r'href="#([^"]+)"', text)
        assert len(targets) == 24  # of the ratio and of the log-prob
        assert all(f'id="{target}"' in text for target in targets)
