"""Does the runs of a study that are left, and tells what the rule says of them.

Runs that need equally many ranks share one world of ranks (run_worker.py). If a run fails, its world ends with it: the
run is recorded as failed, and a new world does the rest.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.sources import ConfigError
from megatron_rl.stop import STATUS, Stopped
from megatron_rl.study.board import Board
from megatron_rl.study.fingerprint import take_fingerprint
from megatron_rl.study.planning import Plan, PlannedRun, check_files, make_plan
from megatron_rl.study.run_worker import Order, failure, read_begun
from megatron_rl.study.show_plan import show_plan, show_verdict
from megatron_rl.study.study_dir import StudyDir, StudyError, runs_left
from megatron_rl.study.study_file import load_study, read_study

WORKER = "megatron_rl.study.run_worker"
SIGNALLED = (STATUS, 128 + 2, 128 + 10, 128 + 15)
"""Statuses of ranks that a signal has stopped: after a checkpoint, or by SIGINT, SIGUSR1 or SIGTERM at once."""
TAIL_LINES = 20


def run_study(file: Path, *, task: int | None = None, dry_run: bool = False) -> None:
    """Does all runs that are left, or only run number `task`. With `dry_run` prints the plan.

    Raises ConfigError for a study that cannot be done, StudyError if anything has changed since the study began, and
    Stopped if a signal came.
    """
    content = read_study(file)
    study = load_study(file)
    plan = make_plan(study, file)
    if task is not None and not 0 <= task < len(plan.runs):
        raise ConfigError(f"--task: found {task}, expected a number from 0 to {len(plan.runs) - 1}, as --dry-run lists")
    if dry_run:
        show_plan(plan)
        return
    check_files(plan)
    configs = {run.run: run.config for run in plan.runs}
    donors = {Path(run.graft.donor) for run in plan.runs if run.graft is not None}
    fingerprint = take_fingerprint(file, content, plan.bases, configs, study.directory, donors)
    directory = StudyDir.open(plan, content, fingerprint)
    wanted = plan.runs if task is None else (plan.runs[task],)
    try:
        Conductor(plan, directory, wanted).conduct()
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        raise
    show_verdict(directory.refresh(study, plan.runs), directory)


class Conductor:
    def __init__(self, plan: Plan, directory: StudyDir, wanted: Sequence[PlannedRun]) -> None:
        """`wanted`: the runs that this process is to do."""
        self._plan = plan
        self._directory = directory
        self._wanted = wanted
        self._elsewhere: set[str] = set()
        """Runs that other processes are doing."""

    def conduct(self) -> None:
        """Does the wanted runs that are left. Raises Stopped if a signal came."""
        plan = self._plan
        self._directory.refresh(plan.study, plan.runs)
        with Board(self._directory, plan.runs, lambda: self._directory.refresh(plan.study, plan.runs)) as board:
            while group := self._next_group():
                board.group = group
                board.look()
                self._do(group)
        if self._elsewhere:
            print(
                f"{len(self._elsewhere)} runs are being done by other processes: {', '.join(sorted(self._elsewhere))}"
            )

    def _next_group(self) -> list[PlannedRun]:
        """The next runs that one world can do. Raises Stopped if a run has to wait for another process's."""
        ended = set(self._directory.read_results(self._plan.runs))
        possible = self._possible() - self._elsewhere
        todo = [run for run in self._wanted if run.run in possible]
        if not todo:
            return []
        first = todo[0]
        group: list[PlannedRun] = []
        for run in itertools.takewhile(lambda each: _world(each) == _world(first), todo):
            if run.needs is None or run.needs in ended or run.needs in {each.run for each in group}:
                group.append(run)
            elif not group:
                raise Stopped(
                    f"{run.run} needs the {'model' if run.needs_model else 'rollouts'} of {run.needs}, which has no "
                    f"result yet; start it again when task {self._task(run.needs)} is done (Slurm: --dependency)"
                )
        return group

    def _possible(self) -> set[str]:
        """Runs without a result that can still have one."""
        results = list(self._directory.read_results(self._plan.runs).values())
        return {run.run for run in runs_left(self._plan.runs, results)}

    def _task(self, name: str) -> int:
        return next(run.task for run in self._plan.runs if run.run == name)

    def _do(self, group: Sequence[PlannedRun]) -> None:
        """Has one world do the runs, until one fails. Raises Stopped if a signal came, and StudyError if the ranks
        cannot start."""
        from megatron_rl.ranks import launch

        with tempfile.TemporaryDirectory(prefix="megatron-rl-study-") as scratch:
            order = Path(scratch) / "order.json"
            Order.by_this_process(self._directory.path, [run.run for run in group]).write(order)
            status = launch.run_ranks(WORKER, [str(order)], group[0].ranks)
            begun = read_begun(order)
        unfinished = [run for run in group if not self._directory.has_result(run.run)]
        if status == 0:
            self._elsewhere |= {run.run for run in unfinished} & self._possible()
        elif status in SIGNALLED:
            raise Stopped("the study stopped; the same command goes on with it")
        elif broken := [run for run in unfinished if run.run in begun]:
            self._fail(broken[-1], status, begun[broken[-1].run])
        else:
            log = self._directory.logs / "ranks.log"
            raise StudyError(
                f"the ranks ended with status {status} before a run began; the end of {log}:\n{_tail(log)}"
            )
        self._directory.refresh(self._plan.study, self._plan.runs)

    def _fail(self, run: PlannedRun, status: int, began: float) -> None:
        reason = _reason(self._directory.logs / f"{run.run}.log") or f"a rank ended with status {status}"
        with self._directory.claim(run.run) as mine:
            if mine:
                self._directory.record(failure(run, reason, status, began))


def _world(run: PlannedRun) -> tuple[int, str]:
    """Runs with equal worlds can share one."""
    return run.ranks, run.config.engine.device


def _reason(log: Path) -> str:
    """The error that a run's log ends with: the last line that names one, or else the last line."""
    lines = [line for line in _tail(log).splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("error: ") or "Error: " in line.partition(" ")[0] + " "]
    return (named or lines or [""])[-1].strip()[:500]


def _tail(log: Path) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - (1 << 16), 0))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
