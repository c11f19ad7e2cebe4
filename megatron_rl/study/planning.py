"""The runs of a study in order, each with its resolved configuration. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_rl.config.load import raise_all
from megatron_rl.config.resolve import Resolved, local_files, model_dirs, resolve
from megatron_rl.config.schema import Config
from megatron_rl.config.sources import ConfigError, nearest
from megatron_rl.data.arithmetic_task import PREFIX, ArithmeticTask
from megatron_rl.errors import UserError
from megatron_rl.models.kinds import PolicyKind
from megatron_rl.study.decision_rules import EdgeShiftRule, GridEdgeRule, SlopeRule
from megatron_rl.study.outcome import RunOutcome
from megatron_rl.study.study_file import NAME, Coordinate, Replay, Start, StudyArm, StudyFile

S = TypeVar("S", Replay, Start)
FACTOR = re.compile(r"\{(\w+)\}")
MAX_RUNS = 10_000


@dataclass(frozen=True)
class ArmPoint:
    """An arm of the study file, or one point of its grid."""

    name: str
    values: dict[str, Any]
    """What it changes, in sections of the configuration."""
    point: dict[str, Coordinate]
    """The point of its grid."""
    base: Path
    seeds: tuple[int, ...]
    ranks: int
    replay: Replay | None
    start: Start | None
    at: dict[str, Coordinate]

    @property
    def source(self) -> Replay | Start | None:
        """The arm whose run comes first, because this one needs its rollouts or its model."""
        return self.replay or self.start


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
    arms = _arms(study, file)
    problems = [*_names_that_rules_miss(study, arms)]
    problems += _missing_sources(arms)
    depths = {name: _depth(name, arms) for name in arms}
    raise_all([f"{file}: {each}" for each in problems])
    resolved: dict[str, Resolved[Config]] = {}
    for arm in arms.values():
        try:
            overrides = _overrides(study, arm)
            resolved[arm.name] = resolve(Config, arm.base, overrides, arm.ranks)
        except UserError as error:
            problems += [f"{file}: arms.{arm.name}: {line}" for line in str(error).splitlines()]
    raise_all(problems)
    problems += [f"{file}: arms.{arm}: {what}" for arm, what in _unfit_replays(arms, resolved)]
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
            _run_name(arm.name, seed),
            arm.name,
            seed,
            arm.at,
            arm.ranks,
            _source(arm, seed),
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
    """Checks that models and data are there and whole, and that own verifiers start; slower than a plan. Raises
    ConfigError, which names the arms."""
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
                if config.rollout.replay_from is None and (source or "").startswith(PREFIX) and source not in checked:
                    with _naming(key):
                        ArithmeticTask.parse(source or "").problems()
                    checked.add(source)
            if config.data.verifier not in checked:
                check_verifier(config)
                checked.add(config.data.verifier)
        except UserError as error:
            problems.append(f"arms.{arm}: {error}")
    raise_all(problems)


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from None


# ---- arms ------------------------------------------------------------------------------------------------------


def _arms(study: StudyFile, file: Path) -> dict[str, ArmPoint]:
    """The arms by name, grids written out. Raises ConfigError for names that cannot be or are double."""
    found: dict[str, ArmPoint] = {}
    problems = []
    for template, arm in study.arms.items():
        for point in _points(arm):
            name = _filled(template, point)
            if not isinstance(name, str) or not NAME.fullmatch(name) or (FACTOR.search(template) and not arm.grid):
                problems.append(f"arms: found {template!r}, expected a name of letters, digits and . _ + = -")
            elif name in found:
                problems.append(f"arms: two arms are called {name!r}; put every factor of a grid into its name")
            elif len(found) * len(study.seeds) > MAX_RUNS:
                problems.append(f"arms: more than {MAX_RUNS} runs")
                break
            else:
                found[name] = ArmPoint(
                    name=name,
                    values=_filled(arm.set, point),
                    point=point,
                    base=file.parent / (arm.base or study.base),
                    seeds=arm.seeds or study.seeds,
                    ranks=arm.ranks or study.ranks,
                    replay=arm.replay
                    and arm.replay.model_copy(update={"source": str(_filled(arm.replay.source, point))}),
                    start=arm.start and arm.start.model_copy(update={"source": str(_filled(arm.start.source, point))}),
                    at={**arm.at, **point},
                )
    raise_all([f"{file}: {each}" for each in dict.fromkeys(problems)])
    return found


def _source_filled(needed: S | None, point: Mapping[str, Coordinate]) -> S | None:
    return needed and needed.model_copy(update={"source": str(_filled(needed.source, point))})


def _points(arm: StudyArm) -> Iterator[dict[str, Coordinate]]:
    for values in itertools.product(*arm.grid.values()):
        yield dict(zip(arm.grid, values, strict=True))


def _filled(value: Any, point: Mapping[str, Coordinate]) -> Any:
    """The value with each {factor} of the point filled in; a text that is one factor becomes the factor's value."""
    if isinstance(value, dict):
        return {key: _filled(each, point) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, point) for each in value]
    if not isinstance(value, str):
        return value
    if (whole := FACTOR.fullmatch(value)) and whole[1] in point:
        return point[whole[1]]
    return FACTOR.sub(lambda match: str(point.get(match[1], match[0])), value)


def _names_that_rules_miss(study: StudyFile, arms: Mapping[str, ArmPoint]) -> Iterator[str]:
    for key, rule in study.rules:
        for arm in rule.arms:
            if arm not in arms:
                yield f"{key}: no arm is called {arm!r}{nearest(arm, list(arms))}"
        known = {factor for arm in arms.values() for factor in arm.at}
        for factor in rule.factors:
            if factor not in known:
                yield f"{key}: no arm has {factor!r} in its `at` or `grid`"
        numeric = {factor for factor in known if all(not isinstance(a.at.get(factor), str) for a in arms.values())}
        for factor in _numbers(rule):
            if factor in known - numeric:
                yield f"{key}: {factor!r} must be a number in every arm that has it"


def _numbers(rule: object) -> tuple[str, ...]:
    if isinstance(rule, GridEdgeRule):
        return rule.along, rule.over
    if isinstance(rule, EdgeShiftRule):
        return (rule.along,)
    return (rule.x_factor,) if isinstance(rule, SlopeRule) and rule.x_factor else ()


def _overrides(study: StudyFile, arm: ArmPoint) -> list[str]:
    """Later ones win: budget, the study's values, the arm's values, and what the study sets itself."""
    seed = arm.seeds[0]
    budget: dict[str, Any] = {"train.steps": study.budget.steps, "train.max_minutes": study.budget.minutes}
    own: dict[str, Any] = {"seed": seed, "run_dir": str(study.directory / "runs" / _run_name(arm.name, seed))}
    if arm.replay is not None:
        own["rollout.replay_from"] = str(study.directory / "runs" / str(_source(arm, seed)))
    given = [(key, value) for key, value in budget.items() if value is not None]
    given += [*_filled(study.set, arm.point).items(), *arm.values.items(), *own.items()]
    return [f"{key}={json.dumps(value)}" for key, value in given]


def _config_of(study: StudyFile, config: Config, arm: ArmPoint, seed: int) -> Config:
    """The arm's configuration with another seed."""
    update: dict[str, Any] = {"seed": seed, "run_dir": study.directory / "runs" / _run_name(arm.name, seed)}
    if arm.replay is not None:
        replay_from = study.directory / "runs" / str(_source(arm, seed))
        update["rollout"] = config.rollout.model_copy(update={"replay_from": replay_from})
    if arm.start is not None:
        graft = _graft(study, config, arm, seed)
        path = Path(graft.out) if graft else _trained(study, arm, seed)
        update["model"] = config.model.model_copy(update={"path": path})
    return config.model_copy(update=update)


def _graft(study: StudyFile, config: Config, arm: ArmPoint, seed: int) -> Grafting | None:
    if arm.start is None or not arm.start.graft:
        return None
    out = study.directory / "models" / _run_name(arm.name, seed)
    return Grafting(str(config.model.path), str(_trained(study, arm, seed)), str(out), arm.start.graft)


def _trained(study: StudyFile, arm: ArmPoint, seed: int) -> Path:
    return study.directory / "runs" / str(_source(arm, seed)) / "model"


def _run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed-{seed}"


def _servers(config: Config) -> tuple[object, ...]:
    """Equal for runs whose servers are started alike (rollout/kept_pool.py); all runs that replay are."""
    rollout, engine = config.rollout, config.engine
    if rollout.replay_from is not None:
        return ()
    return rollout.servers, rollout.concurrency, engine.dtype, config.model.path, config.routing.needs_rollout_routes


# ---- arms that need others -------------------------------------------------------------------------------------


def _source(arm: ArmPoint, seed: int) -> str | None:
    """The run that this arm's run of `seed` needs."""
    needed = arm.source
    return None if needed is None else _run_name(needed.source, seed if needed.seed is None else needed.seed)


def _depth(name: str, arms: Mapping[str, ArmPoint]) -> int:
    """How many arms come before this one, each because the next one needs it."""
    chain = [name]
    while (needed := arms[chain[-1]].source) is not None and needed.source in arms and needed.source not in chain:
        chain.append(needed.source)
    return len(chain) - 1


def _missing_sources(arms: Mapping[str, ArmPoint]) -> Iterator[str]:
    """One line for each arm whose source does not exist, does not come first, or has not what the arm needs."""
    for name, arm in arms.items():
        needed = arm.source
        if needed is None:
            continue
        key = f"arms.{name}.{'start' if arm.replay is None else 'replay'}"
        source = arms.get(needed.source)
        if source is None:
            yield f"{key}: no arm is called {needed.source!r}{nearest(needed.source, list(arms))}"
            continue
        if arm.replay is not None and source.replay is not None:  # it saves no rollouts
            yield f"{key}: {source.name} replays rollouts itself and saves none; name {source.replay.source}"
        elif _depth(source.name, arms) >= _depth(name, arms):
            yield f"{key}: {source.name} needs {name} itself, directly or through other arms"
        wanted = arm.seeds if needed.seed is None else (needed.seed,)
        if missing := [seed for seed in wanted if seed not in source.seeds]:
            yield f"{key}: {source.name} has no seed {missing[0]}; its seeds are {list(source.seeds)}"


def _unfit_replays(arms: Mapping[str, ArmPoint], resolved: Mapping[str, Resolved[Config]]) -> Iterator[tuple[str, str]]:
    """What a replay would refuse only when it starts: the arm and the problem."""
    for name, arm in arms.items():
        if arm.replay is None:
            continue
        mine, theirs = resolved[name].config, resolved[arm.replay.source].config
        if (elsewhere := theirs.rollout.replay_from) is not None:
            yield (
                name,
                f"replay: {arm.replay.source} has rollout.replay_from, so it saves no rollouts; name {elsewhere}",
            )
        for key in ("prompts_per_step", "group_size", "temperature"):
            own, saved = getattr(mine.rollout, key), getattr(theirs.rollout, key)
            if own != saved:
                yield name, f"rollout.{key}: {own}, but {arm.replay.source} saves rollouts with {saved}"
        if mine.train.steps > theirs.train.steps:
            yield name, f"train.steps: {mine.train.steps}, but {arm.replay.source} saves {theirs.train.steps} steps"
