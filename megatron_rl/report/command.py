"""`megatron-rl report` and `inspect`: read runs, studies and steps, and write their pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rl.errors import FileInTheWayError, MissingFileError
from megatron_rl.report.inspected import InspectOptions, load_step
from megatron_rl.report.loaded_runs import LoadedRun, ReportError, is_run, load_run, name_runs
from megatron_rl.report.loaded_studies import LoadedStudy, is_study, load_study


def load(paths: Sequence[Path]) -> tuple[list[LoadedStudy], list[LoadedRun]]:
    """Reads studies and runs, each in the order given.

    Raises MissingFileError or ReportError for a path that is neither, or that occurs twice.
    """
    for path in paths:
        if not path.exists():
            raise MissingFileError(f"{path}: not there. Name the run_dir of a run, or the directory of a study.")
        if not is_study(path) and not is_run(path):
            raise MissingFileError(
                f"{path}: neither a run nor a study, because it has no metrics.jsonl, config.yaml or plan.json. "
                "Name the run_dir of a run, or the directory of a study."
            )
    resolved = [path.resolve() for path in paths]
    for path, whole in zip(paths, resolved, strict=True):
        if resolved.count(whole) > 1:
            raise ReportError(f"{path}: given twice. Name each run and study once.")
    runs = [path for path in paths if not is_study(path)]
    named = [load_run(path, name) for path, name in zip(runs, name_runs(runs), strict=True)]
    return [load_study(path) for path in paths if is_study(path)], named


def choose_directory(paths: Sequence[Path], out: Path | None) -> Path:
    """The directory of the report: `out`, or `report` in the only run or study.

    Raises ReportError if several are given without `out`, and FileInTheWayError if it is a file.
    """
    if out is None and len(paths) > 1:
        raise ReportError("--out: not given, but there are several runs or studies. Name a directory for the report.")
    directory = out or paths[0] / "report"
    if directory.exists() and not directory.is_dir():
        raise FileInTheWayError(f"{directory}: a file is in the way of the report. Name a directory with --out.")
    return directory


def run(paths: Sequence[Path], out: Path | None) -> Path:
    """Writes the report and returns the path of its page. Raises UserError."""
    check_extra()
    directory = choose_directory(paths, out)
    studies, runs = load(paths)
    from megatron_rl.report.page import compose, write  # here: the libraries of the extra are there

    return write(compose(studies, runs), directory)


def run_inspect(path: Path, options: InspectOptions, out: Path | None) -> Path:
    """Writes the page of one step and returns its path. Raises UserError."""
    check_extra()
    directory = choose_directory([path], out)
    from megatron_rl.report import token_page

    return token_page.write(token_page.compose(load_step(path, options), options.responses), directory)


def check_extra() -> None:
    """Raises ReportError if a library of the extra `lab` is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ReportError(
            f"reports need {error.name}, which is not installed. Install the extra: pip install 'megatron_rl[lab]'"
        ) from None
