"""Lets ranks agree on a run before process groups exist, and ends all of them if one cannot start.

Every rank reads the configuration and looks for the files that it will use. Rank 0 sends its findings to all ranks.
Each rank compares its own findings and reports differences to rank 0. If a rank lacks something, its node prints what,
and all ranks end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_rl.config.load import C, ConfigError
from megatron_rl.config.resolve import Files, Resolved, differing_files, local_files, model_dirs, resolve
from megatron_rl.config.sources import flatten, shown
from megatron_rl.errors import UserError
from megatron_rl.ranks.marks import Mark, leave_mark
from megatron_rl.ranks.meeting import ANSWER_SECONDS, START_SECONDS, LaunchError, LostError, Meeting
from megatron_rl.ranks.world import World, WorldError, read_world

LISTED_KEYS = 5
END_SECONDS = 120.0
"""Seconds that the other ranks wait for rank 0 to say why a run has ended. Rank 0 ends its servers first."""
T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """What must be equal on every rank and rank 0."""

    command: str
    begins: str
    """Options that say what the run begins with, such as --resume; empty without any."""
    world_size: int
    config: dict[str, Any]
    files: Files
    mark: Mark | None = None


@contextlib.contextmanager
def agree(
    command: str,
    cls: type[C],
    path: Path,
    overrides: Sequence[str],
    *,
    check: Callable[[C], None],
    begins: str = "",
) -> Iterator[C]:
    """Gives the body the configuration once all ranks have the same one, have their files, and have passed `check`.

    `check` raises UserError. A single rank raises ConfigError. Several ranks all raise LaunchError if one of them
    cannot start, or if the body raises ConfigError. All ranks find the same ConfigError, so only rank 0 prints it.
    """
    world = read_world()
    if world.size == 1:
        alone = resolve(cls, path, overrides, 1)
        local_files(alone, 0)
        _check_models(alone)
        check(alone.config)
        tell(alone.notes)
        yield alone.config
        return
    if not world.joined:
        raise WorldError(f"WORLD_SIZE is {world.size}, but RANK is not set; torchrun sets both")
    # Rank 0 opens the meeting first, because others may be waiting. The others join once they have findings.
    meeting = _meet(world, "") if world.rank == 0 else None
    resolved: Resolved[C] | None = None
    facts, problem = None, ""
    fault: Exception | None = None
    try:
        resolved = resolve(cls, path, overrides, world.size)
        files = local_files(resolved, world.rank)
        facts = Facts(command, begins, world.size, resolved.config.model_dump(mode="json"), files)
    except UserError as error:
        problem = str(error)
    except Exception as error:  # the others need not wait for this rank
        problem, fault = _named(error), error
    meeting = meeting or _meet(world, problem)
    with _raising(fault):
        _settle_run(meeting, facts, problem, resolved.config.run_dir if resolved else Path())
    assert resolved is not None
    # Slow, so it follows the quick checks. Ranks of a node see the same files: one of them is enough.
    problem, fault = _problem_of(_check_models, resolved) if world.local_rank == 0 else ("", None)
    with _raising(fault):
        meeting.settle("models", problem)
    problem, fault = _problem_of(check, resolved.config)
    with _raising(fault):
        meeting.settle("ready", problem)
    tell(resolved.notes if world.rank == 0 else ())
    try:
        yield resolved.config
    except ConfigError as error:
        raise LaunchError(str(error) if world.rank == 0 else "", (0,), meeting, END_SECONDS) from error


def _meet(world: World, problem: str) -> Meeting:
    """Raises UserError if the meeting cannot be reached; if this rank has a problem, the error is that problem."""
    try:
        return Meeting(world, 2 * ANSWER_SECONDS if problem else START_SECONDS)
    except LostError as error:
        if problem:
            raise UserError(problem) from None
        raise error from None


def _settle_run(meeting: Meeting, facts: Facts | None, problem: str, run_dir: Path) -> None:
    """Raises LaunchError on every rank if a rank has a problem or differs from rank 0.

    A rank that has a problem passes None as `facts`.
    """
    with contextlib.ExitStack() as stack:
        if meeting.world.rank == 0:
            if facts is not None:
                try:
                    facts = dataclasses.replace(facts, mark=stack.enter_context(leave_mark(run_dir)))
                except ConfigError as error:
                    facts, problem = None, str(error)
            meeting.post("facts", facts and asdict(facts))
        elif facts is not None:
            try:
                problem = _compare(facts, meeting.read("facts", START_SECONDS), run_dir)
            except (LostError, TimeoutError):
                raise LostError("rank 0 did not say what it runs; its output says why") from None
        meeting.settle("run", problem)


def _problem_of(check: Callable[[T], None], what: T) -> tuple[str, Exception | None]:
    """Runs `check(what)`; returns its problem ("" for none), and the exception if it is a fault of the program."""
    try:
        check(what)
    except UserError as error:
        return str(error), None
    except Exception as error:
        return _named(error), error
    return "", None


def _named(fault: Exception) -> str:
    return f"{type(fault).__name__}: {fault}; a fault of the program, whose traceback is in its output"


@contextlib.contextmanager
def _raising(fault: Exception | None) -> Iterator[None]:
    """Ends a rank that has a fault of the program, with its traceback, after the others have heard of it."""
    try:
        yield
    except LaunchError as error:
        if fault is None:
            raise
        explain_fault(fault)
        error.told()
        raise SystemExit(1) from None


def _check_models(resolved: Resolved[C]) -> None:
    """Raises ConfigError, which names the key and the file."""
    from megatron_rl.models.check import check_model

    for key, directory, value_head in model_dirs(resolved.config):
        try:
            check_model(directory, value_head)
        except UserError as error:
            raise ConfigError(f"{key}: {error}") from None


def _compare(mine: Facts, content: dict[str, Any] | None, run_dir: Path) -> str:
    """Differences between this rank and rank 0, whose facts are `content`; "" if there are none."""
    if content is None:  # rank 0 cannot start, and says so itself
        return ""
    theirs = Facts(**{**content, "mark": None})
    if (mine.command, mine.world_size) != (theirs.command, theirs.world_size):
        return (
            f"started as `{mine.command}` of {mine.world_size} ranks, but rank 0 as `{theirs.command}` of "
            f"{theirs.world_size}; start every rank alike"
        )
    problems = []
    if mine.begins != theirs.begins:
        here, there = (f"with {each}" if each else "" for each in (mine.begins, theirs.begins))
        here, there = here or f"without {theirs.begins}", there or "without it"
        problems.append(f"started {here}, but rank 0 {there}; start every rank alike")
    own, common = flatten(mine.config), flatten(theirs.config)
    differing = [key for key in common | own if own.get(key) != common.get(key)]
    if differing:
        listed = [f"{key} is {shown(own.get(key))}, but {shown(common.get(key))} on rank 0" for key in differing]
        more = f"; and {len(listed) - LISTED_KEYS} keys more" if len(listed) > LISTED_KEYS else ""
        problems.append(
            f"another configuration than rank 0's: {'; '.join(listed[:LISTED_KEYS])}{more}; start every rank with the "
            "same file and overrides"
        )
        return "\n".join(problems)
    problems += differing_files(mine.files, theirs.files)
    mark = Mark(**content["mark"])
    if not mark.is_seen_from(run_dir):
        problems.append(
            f"run_dir: {run_dir.absolute()} is not the directory that rank 0 writes, {mark.run_dir} on host "
            f"{mark.host}; all ranks write into it, so name one on a file system that all nodes share"
        )
    return "\n".join(problems)


def end(error: UserError) -> int:
    """Prints this rank's part of the error; returns the exit status."""
    if isinstance(error, LaunchError):
        if error.text:
            _print(error.text)
            tell_launcher(error.text)
        error.told()
    else:
        _print(f"{_who()}{error}")
        tell_launcher(str(error))
    return error.status


def tell_launcher(text: str) -> None:
    """Gives torchrun, if it has started this rank, the text of its summary: it would show none for an exit status."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun counts whole seconds, and takes the first failure for the cause; another rank of this second may have
        # nothing to say.
        cause = {"message": text, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}
        Path(file).write_text(json.dumps({"message": cause}))


def explain_fault(error: Exception) -> None:
    """Prints the traceback of a fault of the program in one piece, under the name of the rank that had it."""
    trace = "".join(traceback.format_exception(error))
    print(f"{_who()}a fault that the program did not expect:\n{trace}", file=sys.stderr, end="", flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows it again, at the end, as the cause
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def tell(notes: Sequence[str]) -> None:
    """Prints what a configuration leaves out of its presets and file."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def _who() -> str:
    try:
        world = read_world()
    except WorldError:
        return ""
    return f"{world.me}: " if world.size > 1 else ""


def _print(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
