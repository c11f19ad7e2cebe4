"""Writes study files on a tiny model's saved rollouts, and makes results for decision rules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from megatron_rl.study.decision_rules import Rule
from megatron_rl.study.outcome import RunOutcome, Status
from megatron_rl.study.verdicts import Judgement, judge

QUESTION = {"question": "Does it hold?", "hypothesis": "It does.", "source": "a test"}


def write_study(path: Path, base: Path, arms: dict[str, Any], **keys: Any) -> Path:
    """Writes a study of `arms` into `path`; its directory is `path` without the suffix."""
    study: dict[str, Any] = {
        **QUESTION,
        "directory": str(path.with_suffix("")),
        "base": str(base),
        "seeds": [0],
        "arms": arms,
        "rule": {"kind": "none"},
    }
    path.write_text(yaml.safe_dump({**study, **keys}, sort_keys=False))
    return path


def outcomes(
    arm: str, values: Iterable[float | None], *, metric: str = "m", status: Status = "done", **at: float | str
) -> list[RunOutcome]:
    """One result for each value, with seeds from 0 on; a run without a value has failed."""
    return [
        RunOutcome(
            0, f"{arm}-seed-{seed}", arm, seed, dict(at), "failed" if value is None else status, metrics={metric: value}
        )
        for seed, value in enumerate(values)
    ]


RULES: TypeAdapter[Rule] = TypeAdapter(Rule)


def says(results: list[RunOutcome], **rule: Any) -> Judgement:
    return judge(RULES.validate_python(rule), results)
