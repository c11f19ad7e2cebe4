"""The directory of a study: what was fixed at its start, its results, and who does which run. Imports no torch.

Several processes may work on one study, also on several machines that share the directory. Each writes only files of
its own run, and files whose content does not depend on who writes them. Every file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_rl.config.load import dump_config
from megatron_rl.disk import create_once, writes
from megatron_rl.errors import UserError
from megatron_rl.lab.owner import Owner, OwnerError
from megatron_rl.study.fingerprint import Fingerprint, differences
from megatron_rl.study.outcome import RunOutcome
from megatron_rl.study.planning import Plan, PlannedRun
from megatron_rl.study.study_file import StudyFile
from megatron_rl.study.verdicts import Judgement, judge

FINGERPRINT = "fingerprint.json"


class StudyError(UserError):
    """The directory is no study's, or its results would not be comparable; or a run cannot be done now."""


class StudyDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.logs = path / "logs"
        self.results_file = path / "results.jsonl"
        self.verdict_file = path / "verdict.json"

    # ---- the start ---------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, plan: Plan, content: bytes, fingerprint: Fingerprint) -> StudyDir:
        """Begins the study, or goes on with it. Raises StudyError if something has changed since its start, and if the
        directory holds anything else."""
        directory = cls(plan.study.directory)
        with writes(f"the study in {directory.path}", directory.path):
            directory._begin(fingerprint)
            directory._check(fingerprint)
            directory._write_records(plan, content)
        return directory

    def _begin(self, fingerprint: Fingerprint) -> None:
        """Makes the directory a study's, unless it is. Of several processes one does; the others then compare."""
        file = self.path / FINGERPRINT
        if self.path.exists() and not self.path.is_dir():
            raise StudyError(f"directory: {self.path} is a file; name a new directory")
        self.path.mkdir(parents=True, exist_ok=True)
        others = sorted(each.name for each in self.path.iterdir() if not each.name.startswith("."))
        if file.exists():  # asked after the names: another process may begin the study now
            return
        if others:
            raise StudyError(
                f"directory: {self.path} is not empty and holds no study, but {others[0]}; name a new directory"
            )
        mine = self.path / f".{FINGERPRINT}.{uuid.uuid4().hex}"
        try:
            mine.write_bytes(_json(fingerprint))
            create_once(file, mine)
        finally:
            mine.unlink(missing_ok=True)

    def _write_records(self, plan: Plan, content: bytes) -> None:
        """Writes what a start leaves for people and for its ranks. All starts with one fingerprint write the same."""
        for name in ("configs", "runs", "logs", "results", "claims"):
            (self.path / name).mkdir(exist_ok=True)
        records = {"study.yaml": content, "plan.json": _json([run.as_json() for run in plan.runs])}
        records |= {f"configs/{run.run}.yaml": dump_config(run.config).encode() for run in plan.runs}
        for name, record in records.items():
            if not (self.path / name).exists():
                self._replace(name, record)

    def _check(self, now: Fingerprint) -> None:
        file = self.path / FINGERPRINT
        try:
            before = orjson.loads(file.read_bytes())
        except orjson.JSONDecodeError as error:
            raise StudyError(f"{file}: not JSON ({error}); restore it, or begin the study in a new directory") from None
        if changed := differences(before, now):
            raise StudyError(
                f"the study in {self.path} was begun with other code, files or versions, and never mixes results:\n"
                + "\n".join(f"  {line}" for line in changed)
                + "\nTo go on, restore what the study began with; or begin it anew: give the study file another "
                f"`directory`, or remove {self.path}"
            )

    # ---- results -----------------------------------------------------------------------------------------------

    def read_results(self, runs: Sequence[PlannedRun]) -> dict[str, RunOutcome]:
        """Results by run, in the order of the plan."""
        found = {}
        for run in runs:
            file = self.path / "results" / f"{run.run}.json"
            with contextlib.suppress(FileNotFoundError):
                found[run.run] = _outcome(file)
        return found

    def has_result(self, run: str) -> bool:
        return (self.path / "results" / f"{run}.json").exists()

    def has_what_it_needs(self, needs: str | None, model: bool) -> bool:
        """Whether the run that another needs has ended and gives its model, or its rollouts."""
        if needs is None:
            return True
        file = self.path / "results" / f"{needs}.json"
        return file.exists() and gives(_outcome(file), model)

    def record(self, outcome: RunOutcome) -> None:
        """Writes the result of one run. Raises DiskError."""
        with writes(f"the result of {outcome.run}", self.path):
            self._replace(f"results/{outcome.run}.json", _json(outcome.as_json()))

    def refresh(self, study: StudyFile, runs: Sequence[PlannedRun]) -> dict[str, Any]:
        """Rewrites results.jsonl and verdict.json, and returns the verdict.

        Looks again afterwards: if another process has recorded a result meanwhile, it may have rewritten them before.
        """
        with writes("the results", self.path):
            while True:
                results = self.read_results(runs)
                lines = (orjson.dumps(each.as_json(), option=orjson.OPT_APPEND_NEWLINE) for each in results.values())
                verdict = verdict_of(study, runs, list(results.values()))
                self._replace("results.jsonl", b"".join(lines))
                self._replace("verdict.json", _json(verdict))
                if self.read_results(runs) == results:
                    return verdict

    # ---- one run -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, run: str) -> Iterator[bool]:
        """Whether this process may do the run now: it has no result, and no other process is doing it."""
        directory = self.path / "claims" / run
        directory.mkdir(exist_ok=True)
        try:
            owner = Owner.take(directory)
        except OwnerError:
            yield False
            return
        try:
            owner.settle()
            yield not self.has_result(run)
        finally:
            owner.release()

    def make_way(self, run: str) -> bool:
        """Whether the run is to be resumed. Moves away what an earlier try left that has no checkpoint."""
        run_dir = self.path / "runs" / run
        if (run_dir / "config.yaml").is_file() and any(run_dir.glob("checkpoints/step-*/manifest.json")):
            return True
        if run_dir.exists():
            abandoned = self.path / "abandoned"
            abandoned.mkdir(exist_ok=True)
            names = (abandoned / f"{run}-{number}" for number in itertools.count())
            run_dir.rename(next(name for name in names if not name.exists()))
        return False

    def prune(self, run: str, keep: Sequence[str]) -> None:
        """Removes what the study does not keep of a run that has ended."""
        run_dir = self.path / "runs" / run
        for name in {"checkpoints", "model", "critic"} - set(keep) - ({"critic"} if "model" in keep else set()):
            shutil.rmtree(run_dir / name, ignore_errors=True)
        shutil.rmtree(self.path / "models" / run, ignore_errors=True)

    def _replace(self, name: str, content: bytes) -> None:
        """Replaces a file's content at once, also if another process does the same."""
        file = self.path / name
        mine = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            with mine.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(mine, file)
        finally:
            mine.unlink(missing_ok=True)


def verdict_of(study: StudyFile, runs: Sequence[PlannedRun], results: Sequence[RunOutcome]) -> dict[str, Any]:
    """What verdict.json holds. While runs are left the verdict is `incomplete`, whatever the numbers so far are.

    A run is not left if the rollouts or the model that it needs cannot come.
    """
    counts = Counter(each.status for each in results)
    left = len(runs_left(runs, results))
    ended = {each.run for each in results}
    left_out = [] if left else [run.as_left_out() for run in runs if run.run not in ended]
    seen = [*results, *left_out]
    decided = judge(study.rule, seen)
    if left:
        text = f"{left} of {len(runs)} runs are left; so far: {decided.verdict}: {decided.text}"
        decided = Judgement("undecided", text, decided.numbers)
    return {
        "verdict": "incomplete" if left else decided.verdict,
        "text": decided.text,
        "done": counts["done"],
        "stopped": counts["stopped"],
        "failed": counts["failed"],
        "left": left,
        "left_out": len(left_out),
        "rule": study.rule.model_dump(mode="json"),
        "numbers": decided.numbers,
        "also": {name: _shown(judge(rule, seen), rule) for name, rule in study.also.items()},
    }


def _shown(judgement: Judgement, rule: Any) -> dict[str, Any]:
    return {
        "verdict": judgement.verdict,
        "text": judgement.text,
        "rule": rule.model_dump(mode="json"),
        "numbers": judgement.numbers,
    }


def runs_left(runs: Sequence[PlannedRun], results: Sequence[RunOutcome]) -> list[PlannedRun]:
    """Runs without a result that can still have one, in the order of the plan, where each comes after what it needs."""
    ended = {each.run: each for each in results}
    left: dict[str, PlannedRun] = {}
    for run in runs:
        can_come = run.needs is None or run.needs in left or gives(ended.get(run.needs), run.needs_model)
        if run.run not in ended and can_come:
            left[run.run] = run
    return list(left.values())


def gives(source: RunOutcome | None, model: bool) -> bool:
    """Whether a run that has ended gives what another needs: its model, or its rollouts. A run that was stopped, or had
    no more time, has saved rollouts and made no model."""
    if source is None:
        return False
    return source.status == "done" and not source.reason if model else source.has_values


def _outcome(file: Path) -> RunOutcome:
    try:
        return RunOutcome(**orjson.loads(file.read_bytes()))
    except (orjson.JSONDecodeError, TypeError) as error:
        raise StudyError(f"{file}: not a result ({error}); remove it to do the run again") from None


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
