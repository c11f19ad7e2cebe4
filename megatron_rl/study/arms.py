"""The arms of a study, grids written out, and which of them need others. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_rl.config.load import raise_all
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

    def source_run(self, seed: int) -> str | None:
        """The run that this arm's run of `seed` needs."""
        needed = self.source
        return None if needed is None else run_name(needed.source, seed if needed.seed is None else needed.seed)


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed-{seed}"


def arms_of(study: StudyFile, file: Path) -> dict[str, ArmPoint]:
    """The arms by name, grids written out. Raises ConfigError for names that cannot be or are double."""
    found: dict[str, ArmPoint] = {}
    problems = []
    for template, arm in study.arms.items():
        for point in _points(arm):
            name = str(filled(template, point))
            if not NAME.fullmatch(name) or (FACTOR.search(template) and not arm.grid):
                problems.append(f"arms: found {template!r}, expected a name of letters, digits and . _ + = -")
            elif name in found:
                problems.append(f"arms: two arms are called {name!r}; put every factor of a grid into its name")
            elif len(found) * len(study.seeds) > MAX_RUNS:
                problems.append(f"arms: more than {MAX_RUNS} runs")
                break
            else:
                found[name] = ArmPoint(
                    name=name,
                    values=filled(arm.set, point),
                    point=point,
                    base=file.parent / (arm.base or study.base),
                    seeds=arm.seeds or study.seeds,
                    ranks=arm.ranks or study.ranks,
                    replay=_from_point(arm.replay, point),
                    start=_from_point(arm.start, point),
                    at={**arm.at, **point},
                )
    raise_all([f"{file}: {each}" for each in dict.fromkeys(problems)])
    return found


def _from_point(needed: S | None, point: Mapping[str, Coordinate]) -> S | None:
    return needed and needed.model_copy(update={"source": str(filled(needed.source, point))})


def _points(arm: StudyArm) -> Iterator[dict[str, Coordinate]]:
    for values in itertools.product(*arm.grid.values()):
        yield dict(zip(arm.grid, values, strict=True))


def filled(value: Any, point: Mapping[str, Coordinate]) -> Any:
    """The value with each {factor} of the point filled in; a text that is one factor becomes the factor's value."""
    if isinstance(value, dict):
        return {key: filled(each, point) for key, each in value.items()}
    if isinstance(value, list):
        return [filled(each, point) for each in value]
    if not isinstance(value, str):
        return value
    if (whole := FACTOR.fullmatch(value)) and whole[1] in point:
        return point[whole[1]]
    return FACTOR.sub(lambda match: str(point.get(match[1], match[0])), value)


def depth(name: str, arms: Mapping[str, ArmPoint]) -> int:
    """How many arms come before this one, each because the next one needs it."""
    chain = [name]
    while (needed := arms[chain[-1]].source) is not None and needed.source in arms and needed.source not in chain:
        chain.append(needed.source)
    return len(chain) - 1
