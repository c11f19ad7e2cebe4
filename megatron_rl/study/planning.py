"""The runs of a study in order, each with its resolved configuration. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.load import raise_all
from megatron_rl.config.resolve import Resolved, local_files, model_dirs, resolve
from megatron_rl.config.schema import Config
from megatron_rl.config.sources import ConfigError
from megatron_rl.data.arithmetic_task import PREFIX
from megatron_rl.data.generated import check_generated, is_generated
from megatron_rl.errors import UserError
from megatron_rl.models.kinds import PolicyKind
from megatron_rl.study.arms import ArmPoint, arms_of, depth, filled, run_name
from megatron_rl.study.outcome import RunOutcome
from megatron_rl.study.plan_checks import missing_sources, names_that_rules_miss, unfit_plans
from megatron_rl.study.study_file import Coordinate, StudyFile


@dataclass(frozen=True)
class Grafting:
    """The model of a run that starts from another run's: that model with some kinds of weights of a third one."""

    donor: str
    base: str
    out: str
    kinds: tuple[PolicyKind, ...]


@dataclass(frozen=True)
class PlannedRun:
    task: int
    """Number of the run in the plan, from 0."""
    run: str
    arm: str
    seed: int
    at: dict[str, Coordinate]
    ranks: int
    needs: str | None
    """The run whose rollouts it replays, or from whose model it starts."""
    config: Config
    needs_model: bool = False
    """Whether it needs the model of that run, and not the rollouts."""
    graft: Grafting | None = None
    """How its model is made; None if it starts from a model as it is."""

    def as_left_out(self) -> RunOutcome:
        """What rules see of a run that cannot be done."""
        return RunOutcome(self.task, self.run, self.arm, self.seed, self.at, "left out")

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name not in ("config", "graft")},
            "graft": self.graft and dataclasses.asdict(self.graft),
            "steps": self.config.train.steps,
            "run_dir": f"runs/{self.run}",
            "log": f"logs/{self.run}.log",
        }


@dataclass(frozen=True)
class Plan:
    study: StudyFile
    runs: tuple[PlannedRun, ...]
    bases: tuple[Path, ...]
    notes: tuple[str, ...]
    """What configurations leave out of their presets and files, one line each."""
    resolved: dict[str, Resolved[Config]]
    """By arm, with the arm's first seed."""


def make_plan(study: StudyFile, file: Path) -> Plan:
    """Resolves every arm by the loader of configurations. Raises ConfigError with the mistakes of all arms.

    Runs that others need come first. Runs that can share ranks follow one another, and among these the runs that can
    share servers. Within them all arms of one seed come before the next seed, so an unfinished study has compared what
    it can.
    """
    arms = arms_of(study, file)
    problems = [*names_that_rules_miss(study, arms)]
    problems += missing_sources(arms)
    depths = {name: depth(name, arms) for name in arms}
    raise_all([f"{file}: {each}" for each in problems])
    resolved: dict[str, Resolved[Config]] = {}
    for arm in arms.values():
        try:
            overrides = _overrides(study, arm)
            resolved[arm.name] = resolve(Config, arm.base, overrides, arm.ranks)
        except UserError as error:
            problems += [f"{file}: arms.{arm.name}: {line}" for line in str(error).splitlines()]
    raise_all(problems)
    problems += [f"{file}: {what}" for what in unfit_plans(study, arms, resolved)]
    raise_all(problems)
    servers = [_servers(each.config) for each in resolved.values()]
    order = {name: number for number, name in enumerate(arms)}

    def position(arm: ArmPoint, seed: int) -> tuple[int, int, str, int, int, int]:
        config = resolved[arm.name].config
        alike = servers.index(_servers(config))
        return depths[arm.name], arm.ranks, config.engine.device, alike, seed, order[arm.name]

    pairs = [(arm, seed) for arm in arms.values() for seed in arm.seeds]
    pairs.sort(key=lambda pair: position(*pair))
    runs = tuple(
        PlannedRun(
            task,
            run_name(arm.name, seed),
            arm.name,
            seed,
            arm.at,
            arm.ranks,
            arm.source_run(seed),
            _config_of(study, resolved[arm.name].config, arm, seed),
            needs_model=arm.start is not None,
            graft=_graft(study, resolved[arm.name].config, arm, seed),
        )
        for task, (arm, seed) in enumerate(pairs)
    )
    bases = tuple({arm.base: None for arm in arms.values()})
    return Plan(study, runs, bases, tuple(_notes(resolved)), resolved)


def _notes(resolved: Mapping[str, Resolved[Config]]) -> Iterator[str]:
    """Each note once, with the arms that it is about."""
    arms: dict[str, list[str]] = {}
    for name, each in resolved.items():
        for note in each.notes:
            arms.setdefault(note, []).append(name)
    for note, names in arms.items():
        many = "all arms" if len(names) == len(resolved) else f"{len(names)} arms, from {names[0]} on"
        yield f"{many if len(names) > 1 else f'arms.{names[0]}'}: {note}"


def check_files(plan: Plan) -> None:
    """Checks that models and data are there and whole, and that own verifiers and environments start; slower than a
    plan. Raises ConfigError, which names the arms."""
    from megatron_rl.environments.episodes import check_environment
    from megatron_rl.models.check import check_model
    from megatron_rl.rewards import check_verifier

    problems: list[str] = []
    checked: set[object] = set()
    for arm, resolved in plan.resolved.items():
        config = resolved.config
        replays = config.rollout.replay_from
        if replays is not None and replays.is_relative_to(plan.study.directory):  # the study makes them
            made = config.rollout.model_copy(update={"replay_from": None})
            no_data = config.data.model_copy(update={"train": f"{PREFIX}count=1"})
            config = config.model_copy(update={"rollout": made, "data": no_data})
        try:
            local_files(dataclasses.replace(resolved, config=config), 0)
            for key, directory, value_head in model_dirs(config):
                if (directory, value_head) not in checked:
                    with _naming(key):
                        check_model(directory, value_head)
                    checked.add((directory, value_head))
            for key, source in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
                if config.rollout.replay_from is None and is_generated(source or "") and source not in checked:
                    with _naming(key):
                        check_generated(source or "")
                    checked.add(source)
            for name, check in (
                (config.data.verifier, check_verifier),
                (config.rollout.environment, check_environment),
            ):
                if name not in checked:
                    check(config)
                    checked.add(name)
        except UserError as error:
            problems.append(f"arms.{arm}: {error}")
    raise_all(problems)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from None


def _overrides(study: StudyFile, arm: ArmPoint) -> list[str]:
    """Later ones win: budget, the study's values, the arm's values, and what the study sets itself."""
    seed = arm.seeds[0]
    budget: dict[str, Any] = {"train.steps": study.budget.steps, "train.max_minutes": study.budget.minutes}
    own: dict[str, Any] = {"seed": seed, "run_dir": str(study.directory / "runs" / run_name(arm.name, seed))}
    if arm.replay is not None:
        own["rollout.replay_from"] = str(study.directory / "runs" / str(arm.source_run(seed)))
    given = [(key, value) for key, value in budget.items() if value is not None]
    given += [*filled(study.set, arm.point).items(), *arm.values.items(), *own.items()]
    return [f"{key}={json.dumps(value)}" for key, value in given]


def _config_of(study: StudyFile, config: Config, arm: ArmPoint, seed: int) -> Config:
    """The arm's configuration with another seed."""
    update: dict[str, Any] = {"seed": seed, "run_dir": study.directory / "runs" / run_name(arm.name, seed)}
    if arm.replay is not None:
        replay_from = study.directory / "runs" / str(arm.source_run(seed))
        update["rollout"] = config.rollout.model_copy(update={"replay_from": replay_from})
    if arm.start is not None:
        graft = _graft(study, config, arm, seed)
        path = Path(graft.out) if graft else _trained(study, arm, seed)
        update["model"] = config.model.model_copy(update={"path": path})
    return config.model_copy(update=update)


def _graft(study: StudyFile, config: Config, arm: ArmPoint, seed: int) -> Grafting | None:
    if arm.start is None or not arm.start.graft:
        return None
    out = study.directory / "models" / run_name(arm.name, seed)
    return Grafting(str(config.model.path), str(_trained(study, arm, seed)), str(out), arm.start.graft)


def _trained(study: StudyFile, arm: ArmPoint, seed: int) -> Path:
    return study.directory / "runs" / str(arm.source_run(seed)) / "model"


def _servers(config: Config) -> tuple[object, ...]:
    """Equal for runs whose servers are started alike (rollout/kept_pool.py); all runs that replay are."""
    rollout, engine = config.rollout, config.engine
    if rollout.replay_from is not None:
        return ()
    return rollout.servers, rollout.concurrency, engine.dtype, config.model.path, config.routing.needs_rollout_routes
