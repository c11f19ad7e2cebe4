"""The page of a report about a study, and the errors of the command."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_runs import parse, write_json, write_run, write_study

from megatron_rl.errors import UserError
from megatron_rl.report.command import check_extra, choose_directory, load, run
from megatron_rl.report.curves import seed_band
from megatron_rl.report.figures import Curve, CurvePlot, draw_curves
from megatron_rl.report.loaded_runs import ReportError, name_runs
from megatron_rl.report.page import ReportPage, compose, render

SCRIPT = "Is <script>alert(1)</script> & $x$ noise?"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportPage]:
    path = write_study(tmp_path_factory.mktemp("study") / "noise", {"a": [1, 2, 3], "b": [1, 2]}, question=SCRIPT)
    return path, compose(*load([path]))


def test_the_end_of_a_stopped_run_is_marked(study: tuple[Path, ReportPage]) -> None:
    (section,) = study[1].studies
    assert section.study.stopped == {"b-seed-2"}
    curve = Curve("", np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    plain, marked = (draw_curves(CurvePlot([each], "1")).svg for each in (curve, replace(curve, stopped=True)))
    assert plain != marked


def test_a_study_shows_question_rule_verdict_and_numbers(study: tuple[Path, ReportPage]) -> None:
    page = parse(render(study[1]))
    text = " ".join(" ".join(page.text).split())
    assert SCRIPT in text
    assert "<script" not in render(study[1])
    assert "confirmed : The slope is -0.51." in text
    assert "4 done, 1 stopped, 0 failed, 1 left, 0 left out of 6 runs" in text
    for row in (
        ["kind", "slope"],
        ["confirmed", "[-0.6, -0.4]"],
        ["slope", "-0.512346"],
        ["interval.low", "-0.55"],
        ["lengths", "[17, 50]"],
        ["steeper", "refuted", "The slope of arm b is flat."],
    ):
        assert row in page.rows


def test_a_study_lists_its_runs_with_their_ends(study: tuple[Path, ReportPage]) -> None:
    rows = parse(render(study[1])).rows
    assert ["a-seed-2", "a", "2", "done", "healthy", "0.2 ± 0.01", "-", ""] in rows
    assert ["b-seed-2", "b", "2", "stopped", "healthy", "0.2 ± 0.01", "-", "accuracy halved"] in rows
    assert ["left-seed-1", "left", "1", "left", "-", "-", "-", ""] in rows
    assert ["arm", "a", "b"] in rows  # the difference of the configurations


def test_a_study_has_a_figure_of_each_metric_over_its_arms(study: tuple[Path, ReportPage]) -> None:
    (section,) = study[1].studies
    assert [figure.key for figure in section.figures] == ["accuracy", "kl_updates"]
    assert [figure.title for figure in section.measures] == ["gain by arm"]  # `lost` has no number
    assert [each.name for each in section.measures[0].definitions] == ["kl/old_policy/k3"]
    images = ["noise-measure-gain.png", "noise-accuracy.png", "noise-kl_updates.png"]
    assert [name for name, _ in study[1].images()] == images
    runs = section.study.arms["b"]
    assert [each.name for each in runs] == ["b-seed-1", "b-seed-2"]
    band = seed_band([each.metrics.by_step("kl/old_policy/k3") for each in runs])
    assert band.steps.tolist() == [1, 2, 3]  # the second seed stopped there


def test_a_study_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("question: Why?\nrule: {kind: none}\n")
    write_json(tmp_path / "plan.json", [{"run": "a-seed-1", "arm": "a", "seed": 1, "run_dir": "runs/a-seed-1"}])
    text = " ".join(parse(render(compose(*load([tmp_path])))).text)
    assert "incomplete" in text
    assert "No run of the study has ended yet." in text


def test_runs_are_named_by_as_many_folders_as_tell_them_apart() -> None:
    assert name_runs([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert name_runs([Path("/x/a/run"), Path("/y/a/run"), Path("/y/b/run")]) == ["x/a/run", "y/a/run", "y/b/run"]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_path_and_say_how_to_fix_it(tmp_path: Path) -> None:
    made = write_run(tmp_path / "run", steps=1, names=["loss"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for paths, out, expected in (
        ([tmp_path / "gone"], None, "gone: not there. Name the run_dir"),
        ([tmp_path / "empty"], None, "empty: neither a run nor a study"),
        ([made, tmp_path / "run" / ".." / "run"], tmp_path / "out", "given twice"),
        ([made, tmp_path / "empty"], None, "--out: not given"),
        ([made], tmp_path / "file", "a file is in the way of the report"),
        ([made], tmp_path / "file" / "below", "the report in"),
    ):
        with pytest.raises(UserError, match=expected):
            run(paths, out)
    assert not (tmp_path / "out").exists()
    assert choose_directory([made], None) == made / "report"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("metrics.jsonl", b'{"step": 1}\n[]\n', "metrics.jsonl, line 2: expected an object"),
        ("metrics.jsonl", b"nonsense\n", "metrics.jsonl, line 1: not JSON"),
        ("config.yaml", b"- a list\n", "config.yaml: found list, expected the keys of a configuration"),
        ("config.yaml", b"a: [\n", "config.yaml, line 2: not YAML"),
        ("config.yaml", b"\xff\n", "config.yaml: not YAML in UTF-8"),
        ("run.json", b"{", "run.json: damaged"),
        ("fork.json", b"{", "fork.json: damaged"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(file: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (write_run(tmp_path / "run", steps=1, names=["loss"]) / file).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load([tmp_path / "run"])


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("verdict.json", b"{", "verdict.json: not JSON"),
        ("verdict.json", b"[]", "verdict.json: found list, expected dict"),
        ("plan.json", b'[{"run": "a"}]', "plan.json: expected runs with run, arm, seed and run_dir"),
        ("study.yaml", b"- a\n", "study.yaml: found list, expected the keys of a study"),
        ("results/a-seed-1.json", b"\x00", "a-seed-1.json: not JSON"),
    ],
)
def test_a_damaged_file_of_a_study_is_named(file: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (write_study(tmp_path / "noise", {"a": [1]}) / file).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load([tmp_path / "noise"])


@pytest.mark.parametrize("file", ["config.yaml", "eval.jsonl", "checkpoints.jsonl", "changes.jsonl", "run.json"])
def test_a_directory_in_the_place_of_a_runs_file_is_named(file: str, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=1, names=["loss"])
    (path / file).unlink(missing_ok=True)
    (path / file).mkdir()
    with pytest.raises(ReportError, match=rf"{path / file}: cannot be read: is a directory"):
        load([path])


@pytest.mark.parametrize("file", ["verdict.json", "study.yaml", "results/a-seed-1.json"])
def test_a_directory_in_the_place_of_a_studys_file_is_named(file: str, tmp_path: Path) -> None:
    path = write_study(tmp_path / "noise", {"a": [1]})
    (path / file).unlink()
    (path / file).mkdir()
    with pytest.raises(ReportError, match=rf"{path / file}: cannot be read: is a directory"):
        load([path])


def test_a_study_without_its_question_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", [])
    with pytest.raises(UserError, match=r"plan\.json without study\.yaml"):
        load([tmp_path])


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_one_error(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"need {library}, .*pip install 'megatron_rl\[lab\]'"):
        check_extra()
