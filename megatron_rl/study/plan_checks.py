"""What the arms and rules of a study say together, beyond what each says alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from megatron_rl.config.resolve import Resolved
from megatron_rl.config.schema import Config
from megatron_rl.config.sources import nearest
from megatron_rl.models.architecture import differences
from megatron_rl.study.arms import ArmPoint, depth
from megatron_rl.study.decision_rules import Banded, BySeed, EdgeShiftRule, GridEdgeRule, SlopeRule
from megatron_rl.study.study_file import StudyFile


def names_that_rules_miss(study: StudyFile, arms: Mapping[str, ArmPoint]) -> Iterator[str]:
    for key, rule in study.rules:
        for arm in rule.arms:
            if arm not in arms:
                yield f"{key}: no arm is called {arm!r}{nearest(arm, list(arms))}"
        yield from _too_many_seeds(key, rule, arms)
        yield from (f"{key}{what}" for what in _too_few_arms(rule, arms, bool(study.stops)))
        known = {factor for arm in arms.values() for factor in arm.at}
        for factor in rule.factors:
            if factor not in known:
                yield f"{key}: no arm has {factor!r} in its `at` or `grid`"
        numeric = {factor for factor in known if all(not isinstance(a.at.get(factor), str) for a in arms.values())}
        for factor in _numbers(rule):
            if factor in known - numeric:
                yield f"{key}: {factor!r} must be a number in every arm that has it"


def _too_many_seeds(key: str, rule: object, arms: Mapping[str, ArmPoint]) -> Iterator[str]:
    """A rule that asks for more seeds than there are would never decide."""
    if not isinstance(rule, Banded):
        return
    there = min((len(arms[arm].seeds) for arm in rule.arms if arm in arms), default=None)
    there = max(len(arm.seeds) for arm in arms.values()) if there is None else there
    asked = {"min_seeds": rule.min_seeds, "seeds": rule.seeds if isinstance(rule, BySeed) else None}
    for name, number in asked.items():
        if number is not None and number > there:
            yield f"{key}.{name}: found {number}, but the runs have {there} seeds"


def _too_few_arms(rule: object, arms: Mapping[str, ArmPoint], may_stop: bool) -> Iterator[str]:
    """A rule about several arms, of which the study has too few, would never decide."""
    if not isinstance(rule, SlopeRule | GridEdgeRule | EdgeShiftRule):
        return
    meant = [arm for arm in arms.values() if all(arm.at.get(name) == value for name, value in rule.where.items())]
    if not meant:
        yield f".where: no arm has {rule.where}"
        return

    def values(factor: str) -> set[int | float | str]:
        return {arm.at[factor] for arm in meant if factor in arm.at}

    spread = _numbers(rule)
    if isinstance(rule, SlopeRule) and not spread and len(meant) < 2:
        yield ": a slope needs two arms at least"
    if isinstance(rule, EdgeShiftRule):
        for key, value in (("value", rule.value), ("against", rule.against)):
            if (there := values(rule.factor)) and value not in there:
                yield f".{key}: found {value!r}; the arms have {', '.join(map(str, there))} in {rule.factor!r}"
    for factor in spread:
        if len(there := values(factor)) == 1:
            yield f": all its arms have {there.pop()} in {factor!r}; it needs two values at least"
    if not isinstance(rule, SlopeRule) and not may_stop:
        yield ": without `stops` only a run that fails could be beyond an edge; add a stop rule"


def _numbers(rule: object) -> tuple[str, ...]:
    if isinstance(rule, GridEdgeRule):
        return rule.along, rule.over
    if isinstance(rule, EdgeShiftRule):
        return (rule.along,)
    return (rule.x_factor,) if isinstance(rule, SlopeRule) and rule.x_factor else ()


def missing_sources(arms: Mapping[str, ArmPoint]) -> Iterator[str]:
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
        elif depth(source.name, arms) >= depth(name, arms):
            yield f"{key}: {source.name} needs {name} itself, directly or through other arms"
        wanted = arm.seeds if needed.seed is None else (needed.seed,)
        if missing := [seed for seed in wanted if seed not in source.seeds]:
            yield f"{key}: {source.name} has no seed {missing[0]}; its seeds are {list(source.seeds)}"


def unfit_plans(
    study: StudyFile, arms: Mapping[str, ArmPoint], resolved: Mapping[str, Resolved[Config]]
) -> Iterator[str]:
    """One line for each thing that a run would refuse, or never measure, only after others have been done."""
    for name, arm in arms.items():
        mine = resolved[name]
        if mine.config.rollout.servers.colocate:
            yield (
                f"arms.{name}: rollout.servers.colocate: true, but a study keeps servers from one run to the next; set "
                "it to false"
            )
        if arm.replay is not None:
            theirs = resolved[arm.replay.source].config
            yield from (f"arms.{name}: {what}" for what in _unfit_replay(mine.config, theirs, arm.replay.source))
        elif arm.start is not None and (differing := differences(mine.arch, resolved[arm.start.source].arch)):
            yield (
                f"arms.{name}.start: model.path is of another architecture than that of {arm.start.source}: "
                f"{'; '.join(differing)}"
            )
    most = max(each.config.train.mini_batches for each in resolved.values())
    for metric, asked in study.metrics.items():
        if asked.mini_batches and min(asked.mini_batches) >= most:
            yield (
                f"metrics.{metric}.mini_batches: found {list(asked.mini_batches)}, but the arms have at most {most}, "
                "from 0 on"
            )


def _unfit_replay(mine: Config, theirs: Config, source: str) -> Iterator[str]:
    if (elsewhere := theirs.rollout.replay_from) is not None:
        yield f"replay: {source} has rollout.replay_from, so it saves no rollouts; name {elsewhere}"
    for key in ("prompts_per_step", "group_size", "temperature"):
        own, saved = getattr(mine.rollout, key), getattr(theirs.rollout, key)
        if own != saved:
            yield f"rollout.{key}: {own}, but {source} saves rollouts with {saved}"
    if mine.train.steps > theirs.train.steps:
        yield f"train.steps: {mine.train.steps}, but {source} saves {theirs.train.steps} steps"
