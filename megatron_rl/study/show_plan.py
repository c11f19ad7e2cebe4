"""Prints a study's plan and its verdict. Imports no torch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rl.study.planning import Plan
from megatron_rl.study.study_dir import StudyDir
from megatron_rl.study.study_file import StudyFile

MAX_ROWS = 200


def show_plan(plan: Plan) -> None:
    """Prints question, arms with what each changes, and the runs in order with their tasks."""
    console, study = Console(), plan.study
    for name in ("question", "hypothesis", "source", "directory"):
        _say(console, f"{name}: {getattr(study, name)}")
    for note in plan.notes:
        _say(console, f"note: {note}")
    arms = Table(title=f"{len(plan.resolved)} arms")
    for column in ("arm", "changes", "ranks", "steps", "seeds", "needs"):
        arms.add_column(column)
    for name, resolved in plan.resolved.items():
        runs = [run for run in plan.runs if run.arm == name]
        changes = ", ".join(f"{key}={value}" for key, value in runs[0].at.items()) or "-"
        needs = {run.needs for run in runs if run.needs}
        arms.add_row(
            name,
            changes,
            str(runs[0].ranks),
            str(resolved.config.train.steps),
            " ".join(str(run.seed) for run in runs),
            " ".join(sorted(needs)) or "-",
        )
    console.print(arms)
    table = Table(title=f"{len(plan.runs)} runs")
    for column in ("task", "run", "after"):
        table.add_column(column)
    for run in plan.runs[:MAX_ROWS]:
        table.add_row(str(run.task), run.run, run.needs or "-")
    console.print(table)
    if len(plan.runs) > MAX_ROWS:
        _say(console, f"... and {len(plan.runs) - MAX_ROWS} runs more")
    steps = sum(run.config.train.steps for run in plan.runs)
    _say(console, f"{len(plan.runs)} runs, {steps} rollout steps in all{_limit(study, len(plan.runs))}")


def _limit(study: StudyFile, runs: int) -> str:
    minutes = study.budget.minutes
    return f", at most {minutes * runs:g} minutes one after another" if minutes else ""


def show_verdict(verdict: dict[str, Any], directory: StudyDir) -> None:
    """Prints the verdict with its reason, the further rules, and where the results are."""
    console = Console()
    counts = ", ".join(f"{verdict[status]} {status}" for status in ("done", "stopped", "failed", "left"))
    counts += f", {verdict['left_out']} left out" if verdict["left_out"] else ""
    _say(console, f"runs: {counts}; {directory.results_file}")
    for name, also in verdict["also"].items():
        _say(console, f"{name}: {also['verdict']}: {also['text']}")
    _say(console, f"verdict: {verdict['verdict']}: {verdict['text']}")


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)
