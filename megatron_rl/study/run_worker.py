"""Ranks that do several runs of a study, one after another, so that processes start and import once.

    python -m megatron_rl.ranks.launch RANKS -m megatron_rl.study.run_worker ORDER.json

The conductor (conductor.py) starts them and waits for their end. Servers are kept from one run to the next if both are
started alike. The first run that fails ends the ranks, and the conductor starts new ones for the rest. The ranks end
too if the conductor is gone.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import psutil

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.stop import SIGNALS, TIME_UP, Stopped
from megatron_rl.study.outcome import RunOutcome, measure, measure_error, read_lines
from megatron_rl.study.planning import PlannedRun
from megatron_rl.study.stop_rules import StopRule, stop_reason
from megatron_rl.study.study_dir import StudyDir
from megatron_rl.study.study_file import StudyFile, load_study

LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Order:
    """What the conductor asks of the ranks, as a JSON file."""

    directory: str
    runs: tuple[str, ...]
    """Names of runs, to be done in this order."""
    conductor: int
    """Its process number."""
    conductor_since: float
    """When it was started, as the system tells it."""

    @classmethod
    def by_this_process(cls, directory: Path, runs: Sequence[str]) -> Order:
        return cls(str(directory), tuple(runs), os.getpid(), psutil.Process().create_time())

    def write(self, file: Path) -> None:
        file.write_bytes(orjson.dumps(asdict(self)))

    @classmethod
    def read(cls, file: Path) -> Order:
        return cls(**orjson.loads(file.read_bytes()))


def begun_file(order_file: Path) -> Path:
    """The file to which rank 0 appends the name of each run that it begins, and the time."""
    return order_file.with_suffix(".begun")


def read_begun(order_file: Path) -> dict[str, float]:
    """The Unix time at which each run began."""
    file = begun_file(order_file)
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name: float(began) for name, began in map(str.split, lines)}


def main(order_file: Path) -> None:
    import torch.distributed as dist

    from megatron_rl.engine.device import use_device
    from megatron_rl.ranks.place import backend
    from megatron_rl.ranks.world import read_world
    from megatron_rl.rollout.kept_pool import KeptPool

    order = Order.read(order_file)
    directory = StudyDir(Path(order.directory))
    _end_with(order)
    _redirect(directory.logs / "ranks.log")
    study = load_study(directory.path / "study.yaml")
    plan = {each["run"]: each for each in json.loads((directory.path / "plan.json").read_bytes())}
    device = use_device(_config(directory, order.runs[0]).engine.device)
    if read_world().size > 1:
        dist.init_process_group(backend(device))
    else:
        dist.init_process_group(backend(device), store=dist.HashStore(), rank=0, world_size=1)
    kept_models = {run["needs"] for run in plan.values() if run["needs_model"]}
    pool = KeptPool(directory.logs)
    ranks = Ranks(directory, study, dist.new_group(backend="gloo"), pool, begun_file(order_file), kept_models)
    try:
        for name in order.runs:
            ranks.do(plan[name])
            gc.collect()  # networks of the run refer to each other in circles
    finally:
        pool.close()
    dist.destroy_process_group()


class Ranks:
    """This rank, for the runs that the ranks do together."""

    def __init__(
        self, directory: StudyDir, study: StudyFile, control: Any, pool: Any, begun: Path, kept_models: Collection[str]
    ) -> None:
        """`kept_models`: the runs from whose models others start."""
        import torch.distributed as dist

        self._pool = pool
        self._kept_models = kept_models
        self._directory = directory
        self._study = study
        self._control = control
        self._begun = begun
        self._leads = dist.get_rank() == 0

    def do(self, planned: dict[str, Any]) -> None:
        """Does one run and records its result, unless it has one, another process is at it, or what it needs has not
        come. Collective."""
        name = planned["run"]
        if not self._leads:
            word = self._told(None)
            if word is not None:
                self._run(planned, resume=word, tells=False)
            return
        with self._directory.claim(name) as mine:
            can = mine and self._directory.has_what_it_needs(planned["needs"], planned["needs_model"])
            resume = self._directory.make_way(name) if can else None
            if resume is not None:
                with self._begun.open("a") as file:
                    file.write(f"{name} {time.time()}\n")
            self._told(resume)
            if resume is not None:
                self._run(planned, resume=resume, tells=True)

    def _told(self, resume: bool | None) -> bool | None:
        """What rank 0 says of the next run: whether to resume it; None: not to do it. Collective."""
        from megatron_rl.ranks.collectives import broadcast_bytes

        answer: bool | None = json.loads(broadcast_bytes(json.dumps(resume).encode(), self._control))
        return answer

    def _run(self, planned: dict[str, Any], *, resume: bool, tells: bool) -> None:
        from megatron_rl.loop.start_checks import check_start
        from megatron_rl.ranks.collectives import together
        from megatron_rl.train import train

        directory, name = self._directory, planned["run"]
        _redirect(directory.logs / f"{name}.log")
        with together(self._control):
            if self._leads and planned["graft"]:
                _graft(planned["graft"])
        config = _config(directory, name)
        check_start(config)
        halt = Halt(self._study.stops, config.run_dir)
        began = time.time()
        reason = ""
        try:
            train(config, resume, halt=halt if self._study.stops else None, open_pool=self._pool.open)
        except Stopped as stopped:
            if stopped.reason in ("", *(each.name for each in SIGNALS)):
                raise
            reason = stopped.reason
        if tells:
            directory.record(_outcome(self._study, directory, planned, reason, began))
            directory.prune(name, (*self._study.keep, *(["model"] if name in self._kept_models else [])))
        _redirect(directory.logs / "ranks.log")


def _graft(order: dict[str, Any]) -> None:
    """Makes the run's model, unless an earlier try did. Raises ModelError and DiskError."""
    from megatron_rl.models.graft import graft

    out = Path(order["out"])
    if not out.is_dir():
        out.parent.mkdir(exist_ok=True)
        graft(Path(order["donor"]), Path(order["base"]), out, order["kinds"])


class Halt:
    """Tells rank 0 why a run is to stop, from its lines so far."""

    def __init__(self, rules: Sequence[StopRule], run_dir: Path) -> None:
        self._rules = rules
        self._run_dir = run_dir

    def __call__(self) -> str:
        return stop_reason(self._rules, read_lines(self._run_dir))


def _config(directory: StudyDir, name: str) -> Config:
    return load_config(Config, directory.path / "configs" / f"{name}.yaml")


def _outcome(study: StudyFile, directory: StudyDir, planned: dict[str, Any], reason: str, began: float) -> RunOutcome:
    """The result of a run that has not failed."""
    lines = read_lines(directory.path / planned["run_dir"])
    now = time.time()
    return RunOutcome(
        **{key: planned[key] for key in ("task", "run", "arm", "seed", "at", "run_dir", "log")},
        status="done" if reason in ("", TIME_UP) else "stopped",
        reason=reason,
        steps=lines["metrics"][-1]["step"] if lines["metrics"] else 0,
        seconds=now - began,
        began=began,
        ended=now,
        metrics={name: measure(metric, lines) for name, metric in study.metrics.items()},
        errors={name: measure_error(metric, lines) for name, metric in study.metrics.items() if metric.error},
    )


def failure(planned: PlannedRun, reason: str, status: int, began: float) -> RunOutcome:
    """The result of a run that has failed."""
    now = time.time()
    known = {key: value for key, value in planned.as_json().items() if key in ("run_dir", "log")}
    return RunOutcome(
        planned.task,
        planned.run,
        planned.arm,
        planned.seed,
        planned.at,
        status="failed",
        reason=reason,
        exit_status=status,
        seconds=now - began,
        began=began,
        ended=now,
        **known,
    )


def _redirect(log: Path) -> None:
    """Appends what this process and its children print from now on to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


def _end_with(order: Order) -> None:
    """Kills this process soon after the conductor has ended, even by kill -9: a restart of the study needs its run."""
    threading.Thread(target=_watch, args=(order,), name="conductor", daemon=True).start()


def _watch(order: Order, sleep: Callable[[float], None] = time.sleep) -> None:
    while _runs(order):
        sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _runs(order: Order) -> bool:
    try:
        process = psutil.Process(order.conductor)
        same = abs(process.create_time() - order.conductor_since) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


if __name__ == "__main__":
    from megatron_rl.garbage import collect_rarely
    from megatron_rl.ranks.agreement import explain_fault

    collect_rarely()
    try:
        main(Path(sys.argv[1]))
    except UserError as error:  # it names the ranks that found it
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.status)
    except Exception as error:
        explain_fault(error)
        sys.exit(1)
