"""The page of a report about runs: its numbers, its figures, and odd runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_runs import PageParser, declared_names, parse, write_lines, write_run

from megatron_rl.report.command import load
from megatron_rl.report.page import PAGE, ReportPage, compose, render, write
from megatron_rl.report.panels import PANELS

FEW = ("rollout/accuracy", "kl/old_policy/k3", "time/update")


def report_of(*paths: Path) -> ReportPage:
    return compose(*load(paths))


def page_of(*paths: Path) -> PageParser:
    return parse(render(report_of(*paths)))


def words(page: PageParser) -> str:
    return " ".join(" ".join(page.text).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportPage]:
    """A run with every declared metric, some of them null or spiked, and its report."""
    path = write_run(tmp_path_factory.mktemp("whole") / "run", steps=5, mini_batches=2, layers=4)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines[3]["ratio/max"] = None
    lines[6]["routing/expert_change/old_policy/live/mean"] = 0.5
    lines[6]["routing/expert_change/old_policy/live/layer_03"] = 0.9
    write_lines(path / "metrics.jsonl", lines)
    return path, report_of(path)


def numbers(page: PageParser) -> dict[tuple[str, str], list[list[str]]]:
    """Cells after run and metric of the rows of numbers, by (run, metric)."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for row in page.rows:
        if len(row) == 10 and row[0] != "Run":
            found.setdefault((row[0], row[1]), []).append(row[2:])
    return found


def expected_row(lines: list[dict[str, Any]], name: str) -> list[float]:
    """First, last, smallest and its step, largest and its step, lines, lines that are null: by plain loops."""
    pairs = [(line[name], line["step"]) for line in lines if line.get(name) is not None]
    low, high = pairs[0], pairs[0]
    for pair in pairs:
        low, high = (pair if pair[0] < low[0] else low), (pair if pair[0] > high[0] else high)
    nulls = len([1 for line in lines if name in line and line[name] is None])
    return [pairs[0][0], pairs[-1][0], *low, *high, len(pairs), nulls]


def assert_numbers(page: PageParser, path: Path, run: str) -> int:
    """Compares all rows of a run with its files; returns their number."""
    files: dict[str, list[dict[str, Any]]] = {}
    for file in ("metrics.jsonl", "eval.jsonl"):
        text = (path / file).read_text() if (path / file).exists() else ""
        files[file] = [json.loads(line) for line in text.splitlines()]
    count = 0
    for (name, metric), rows in numbers(page).items():
        for row in rows if name == run else ():
            lines = files["eval.jsonl" if metric.startswith(("avg_at", "pass_at")) else "metrics.jsonl"]
            for cell, value in zip(row, expected_row(lines, metric), strict=True):
                assert float(cell) == pytest.approx(value, rel=1e-5), (metric, row)
            count += 1
    return count


def test_numbers_equal_those_in_the_files(whole: tuple[Path, ReportPage]) -> None:
    page = parse(render(whole[1]))
    assert assert_numbers(page, whole[0], "run") > 80
    assert numbers(page)["run", "ratio/max"][0][-2:] == ["9", "1"]


def test_every_figure_of_the_panels_is_drawn(whole: tuple[Path, ReportPage]) -> None:
    (section,) = whole[1].runs
    drawn = {figure.key for group in section.groups for figure in group.figures}
    assert drawn == {panel.key for group in PANELS for panel in group.panels}
    images = list(whole[1].images())
    assert len(images) == len(dict(images)) == len(drawn)
    for key in ("accuracy", "ratio", "change_map"):  # lines, a logarithmic axis, a heat map
        assert dict(images)[f"run-{key}.png"].png().startswith(b"\x89PNG")


def test_each_figure_has_the_definitions_of_its_metrics(whole: tuple[Path, ReportPage]) -> None:
    figures = {figure.key: figure for group in whole[1].runs[0].groups for figure in group.figures}
    for figure in figures.values():
        assert figure.definitions, figure.key
    (kl,) = [each for each in figures["kl"].definitions if each.name == "kl/old_policy/k3"]
    assert "(pi_old, pi_theta)" in kl.meaning
    assert len(figures["ratio"].definitions) == 1  # five statistics of one metric
    text = words(parse(render(whole[1])))
    assert "Largest load of an expert above the mean load" in text


def test_the_verdict_names_rule_step_and_layer(whole: tuple[Path, ReportPage]) -> None:
    page = parse(render(whole[1]))
    assert "step 2, mini-batch 1: ratio/max not finite. Rule not finite : a metric is null" in words(page)
    found = {row[0].partition(":")[0]: row[1:5] for row in page.rows if len(row) == 7}
    change = "routing/expert_change/old_policy/live/mean 0.5"
    assert found["experts change"] == ["warning", "step 4, mini-batch 0, layer 3", change, "1"]


def test_the_page_needs_no_network_and_no_script(whole: tuple[Path, ReportPage]) -> None:
    page = parse(render(whole[1]))
    assert len(page.urls) > 30
    assert all(url.startswith("data:") for url in page.urls)
    assert "script" not in page.tags
    assert "default-src 'none'" in render(whole[1])
    assert "url(" not in render(whole[1])


def test_figures_and_page_are_the_same_bytes_again(whole: tuple[Path, ReportPage], tmp_path: Path) -> None:
    one, other = (report_of(write_run(tmp_path / "x" / "run", names=FEW)) for _ in range(2))
    assert render(one) == render(other)


def test_text_is_escaped(tmp_path: Path) -> None:
    name = "<script>alert('a') & $x$ \"b\""
    path = write_run(tmp_path / name, steps=2, names=FEW, config="model: {path: '<img src=x onerror=y>'}\n")
    text = render(report_of(path))
    assert "<script" not in text
    assert "<img src=x" not in text
    assert f"Report: {name}" in words(parse(text))
    assert "<img src=x onerror=y>" in words(parse(text))


def test_runs_side_by_side_are_overlaid_with_their_differences(tmp_path: Path) -> None:
    config = "run_dir: {0}\noptim: {{lr: {0}, eps: 1e-8}}\n"
    a = write_run(tmp_path / "a" / "run", names=FEW, seed=1, config=config.format("1e-4"))
    b = write_run(tmp_path / "b" / "run", names=FEW, seed=2, config=config.format("2e-4") + "extra: 1\n")
    report = report_of(a, b)
    assert report.differences == [("extra", ["absent", "1"]), ("optim.lr", ["1e-4", "2e-4"])]
    assert [figure.key for figure in report.compared] == ["accuracy", "evaluation", "kl_updates"]
    page = parse(render(report))
    assert ["optim.lr", "1e-4", "2e-4"] in page.rows
    assert assert_numbers(page, a, "a/run") == assert_numbers(page, b, "b/run") > 3
    names = [name for name, _ in report.images()]
    assert {"compared-accuracy.png", "a_run-accuracy.png", "b_run-accuracy.png"} <= set(names)  # in no other folder
    assert len(names) == len(set(names))


def test_figures_of_runs_with_equal_names_have_names_of_their_own(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, names=FEW[:1], steps=2) for name in ("a b", "a_b")]
    names = [name for name, _ in report_of(*paths).images()]
    assert len(names) == len(set(names))
    assert sum(name.startswith("a_b-") for name in names) == 2 * sum(name.endswith("-2.png") for name in names) > 0


def test_many_runs_are_compared_without_their_single_figures(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / str(n), names=FEW[:1], seed=n, steps=2) for n in range(5)]
    report = report_of(*paths)
    assert [section.groups for section in report.runs] == [[]] * 5
    assert "A page of more than 4 runs leaves them out." in words(parse(render(report)))


# ---- odd runs --------------------------------------------------------------------------------------------------------


def test_a_run_of_one_step_has_a_page(tmp_path: Path) -> None:
    names = [*FEW, *(n for n in declared_names("metrics.jsonl", 2) if "expert_change/old_policy/live" in n)]
    page = page_of(write_run(tmp_path / "run", steps=1, mini_batches=1, names=names))
    assert assert_numbers(page, tmp_path / "run", "run") > 3
    assert "HEALTHY" in words(page).upper()


def test_a_run_in_progress_has_a_page_without_its_torn_line(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=3, names=FEW)
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step":4,"mini_batch":0,"rollout/acc')
    text = words(page_of(path))
    assert "3 of 6 steps: in progress, or ended early" in text
    (path / "config.yaml").write_text("train: {steps: 3}\n")
    assert "3 of 3 steps: model not written yet" in words(page_of(path))
    (path / "model").mkdir()
    assert "ended after 3 of 3 steps" in words(page_of(path))


def test_a_run_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {steps: 6}\n")
    text = words(page_of(tmp_path))
    assert "No optimizer step is written yet" in text
    assert "0 of 6 steps" in text


def test_a_run_of_an_older_version_has_a_page_with_what_it_wrote(tmp_path: Path) -> None:
    line = {"step": 1, "mini_batch": 0, "weight_version": 0, "time": 1.0}
    write_lines(tmp_path / "metrics.jsonl", [{**line, "loss": 0.5, "a_forgotten_metric": 1}, {**line, "loss": 0.25}])
    report = report_of(tmp_path)
    assert [figure.key for group in report.runs[0].groups for figure in group.figures] == ["loss"]
    text = words(parse(render(report)))
    assert "Not judged, because the run has no such metric: accuracy halved; held-out accuracy halved" in text


def test_a_metric_that_is_always_null_or_zero_has_a_page(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"step": step, "mini_batch": 0, "loss": None, "kl/old_policy/k3": 0.0, "rho/beyond_2": -math.inf and 0.0}
        for step in (1, 2)
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    report = report_of(tmp_path)
    drawn = [figure.key for group in report.runs[0].groups for figure in group.figures]
    assert drawn == ["kl", "beyond"]  # a curve of nulls has no figure ...
    assert "loss not finite" in words(parse(render(report)))  # ... but a rule


# ---- files -----------------------------------------------------------------------------------------------------------


def test_what_resumes_have_changed_and_what_a_run_was_forked_from_is_on_its_page(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", names=FEW)
    assert "Changed by resumes" not in words(page_of(path))
    change = {"step": 3, "time": 1.0, "key": "optim.lr", "old": "1.0e-06", "new": "2.0e-06"}
    (path / "changes.jsonl").write_text(json.dumps(change) + "\n")
    (path / "fork.json").write_text('{"run": "/runs/<first>", "step": 2}')
    text = words(page_of(path))
    assert "Changed by resumes optim.lr: 1.0e-06 up to step 3, 2.0e-06 from then on" in text
    assert "Forked from step 2 of /runs/<first> ." in text


def test_the_report_is_one_page_and_its_figures(tmp_path: Path) -> None:
    report = report_of(write_run(tmp_path / "run", names=FEW[:1], steps=2))
    page = write(report, tmp_path / "out" / "below")
    assert page == tmp_path / "out" / "below" / PAGE
    assert page.read_text() == render(report)
    found = sorted(file.name for file in (tmp_path / "out" / "below" / "figures").iterdir())
    assert found == ["run-accuracy.png", "run-evaluation.png"]
    write(report, tmp_path / "out" / "below")  # again, over itself


@pytest.mark.parametrize(
    ("steps", "layers"), [(60, 8), pytest.param(1000, 48, marks=pytest.mark.slow)], ids=["small", "big"]
)
def test_a_long_run_has_a_page_below_eight_megabytes(steps: int, layers: int, tmp_path: Path) -> None:
    names = [
        n for n in declared_names("metrics.jsonl", layers) if steps == 1000 or n.startswith(("ratio", "routing/max"))
    ]
    page = render(report_of(write_run(tmp_path / "run", steps=steps, mini_batches=4, layers=layers, names=names)))
    assert len(page.encode()) < 8e6 * (1 if steps == 1000 else 0.05)
