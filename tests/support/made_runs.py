"""Made-up run and study directories for tests of reports: every declared metric, healthy values, no model."""

from __future__ import annotations

import html.parser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.lab.metric_kinds import LAYER

OPEN_NAMES = {"pass_at_{j}": ["pass_at_4"], "alarm/{metric}/{action}": ["alarm/ratio/p99/warn"]}
OPEN_NAMES["grad_norm/router/layer_{layer}"] = ["grad_norm/router/layer_01"]
HEALTHY = {
    "skipped": 0.0,
    "lost_verdicts": 0.0,
    "alarm": 0.0,
    "not_finite": 0.0,
    "truncated": 0.01,
    "dead": 0.1,
    "accuracy": 0.5,
}


def declared_names(file: str, layers: int) -> Iterator[str]:
    """Yields every name that a run with so many MoE layers can write, but no not_finite."""
    for table in DECLARATION.tables:
        for metric in table.metrics if table.file == file else ():
            for name in OPEN_NAMES.get(metric.name) or metric.names():
                for statistic in metric.kind.statistics or ("",):
                    if statistic == LAYER:
                        yield from (f"{table.prefix}{name}/layer_{layer:02d}" for layer in range(1, layers + 1))
                    elif statistic != "not_finite":
                        yield f"{table.prefix}{name}/{statistic}" if statistic else table.prefix + name


def healthy_value(name: str, rng: np.random.Generator) -> float:
    parts = name.split("/")
    if found := [HEALTHY[part] for part in parts if part in HEALTHY]:
        return found[-1]
    if parts[0] == "entropy":
        return 2 + 0.1 * rng.random()
    if "expert_change" in parts or "kl" in parts or "weights" in parts:
        return 0.01 * rng.random()
    return 1e-4 * rng.random() if "beyond" in name else 0.1 + 0.3 * rng.random()


def write_run(
    path: Path,
    *,
    steps: int = 6,
    mini_batches: int = 2,
    layers: int = 3,
    seed: int = 0,
    names: Sequence[str] | None = None,
    config: str = "train: {steps: 6}\n",
) -> Path:
    """Writes a healthy run; `names` defaults to all that metrics.jsonl can have."""
    rng = np.random.default_rng(seed)
    names = list(declared_names("metrics.jsonl", layers)) if names is None else names
    lines = []
    for step in range(1, steps + 1):
        for mini_batch in range(mini_batches):
            line = {"step": step, "mini_batch": mini_batch, "weight_version": step - 1, "time": 1.0}
            there = [name for name in names if mini_batch == 0 or not name.startswith("rollout/")]
            lines.append({**line, **{name: healthy_value(name, rng) for name in there}})
    write_lines(path / "metrics.jsonl", lines)
    evaluations = [
        {"step": step, **{n: healthy_value(n, rng) for n in declared_names("eval.jsonl", 0)}} for step in (0, 3)
    ]
    write_lines(path / "eval.jsonl", evaluations)
    (path / "config.yaml").write_text(config)
    return path


def write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))


def write_study(path: Path, arms: Mapping[str, Sequence[int]], **texts: str) -> Path:
    """Writes a study whose arms have the seeds; its runs write accuracy and one KL only. `texts` replace study.yaml's.

    The last run of the last arm stopped after three steps; a run `left-seed-1` has not begun.
    """
    plan, places = [], [(arm, seed) for arm, seeds in arms.items() for seed in seeds]
    for arm, seed in places:
        name = f"{arm}-seed-{seed}"
        stopped = (arm, seed) == places[-1]
        names = ["rollout/accuracy", "rollout/prompts", "kl/old_policy/k3"]
        write_run(path / "runs" / name, steps=3 if stopped else 6, seed=seed, names=names, config=f"arm: {arm}\n")
        (path / "runs" / name / "eval.jsonl").unlink()
        plan.append({"run": name, "arm": arm, "seed": seed, "run_dir": f"runs/{name}"})
        result = {"status": "stopped", "reason": "accuracy halved"} if stopped else {"status": "done", "reason": ""}
        write_json(
            path / "results" / f"{name}.json",
            {**result, "metrics": {"gain": 0.1 * seed, "lost": None}, "errors": {"gain": 0.01}},
        )
    plan.append({"run": "left-seed-1", "arm": "left", "seed": 1, "run_dir": "runs/left-seed-1"})
    write_json(path / "plan.json", plan)
    asked = {"question": "Is it noise?", "hypothesis": "It is.", "source": "2507.18071", **texts}
    rule = "rule: {kind: slope, confirmed: [-0.6, -0.4]}\n"
    rule += "metrics: {gain: {name: kl/old_policy/k3}, lost: {file: eval, name: [avg_at_k]}}\n"
    (path / "study.yaml").write_text("".join(f"{k}: {orjson.dumps(v).decode()}\n" for k, v in asked.items()) + rule)
    numbers = {"slope": -0.512345678, "interval": {"low": -0.55, "high": -0.47}, "lengths": [17, 50]}
    also = {"steeper": {"verdict": "refuted", "text": "The slope of arm b is flat.", "rule": {}, "numbers": {}}}
    decided = {"verdict": "confirmed", "text": "The slope is -0.51.", "numbers": numbers, "also": also}
    write_json(path / "verdict.json", decided)
    return path


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(orjson.dumps(content))


class PageParser(html.parser.HTMLParser):
    """Collects the cells of all table rows, the text, and every URL that the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.urls: list[str] = []
        self.tags: set[str] = set()
        self._cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._cell:
            self.rows[-1][-1] += data


def parse(page: str) -> PageParser:
    parser = PageParser()
    parser.feed(page)
    parser.close()
    return parser
