"""Compares the names that a run wrote with the declaration of metrics."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from megatron_rl.lab.declared import OPEN, TAGS
from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.lab.run import read_metrics

DYNAMIC = frozenset(
    ("metrics.jsonl", f"rollout/dynamic_sampling/{what}")
    for what in ("prompts", "kept", "surplus", "all_correct", "all_wrong", "refills")
)
OVER_SAMPLED = frozenset(
    ("metrics.jsonl", f"rollout/over_sampling/{what}") for what in ("carried_over", "left_done", "left_unfinished")
)
UNFILLED = frozenset(
    ("metrics.jsonl", f"mismatch/{measure}/{bin_}")
    for measure in ("abs_logprob_gap", "k1", "k3", "beyond_2", "beyond_10")
    for bin_ in ("entropy_low", "entropy_middle", "lag_1", "lag_2_3", "lag_4_7", "lag_8_up")
)
"""Bins without a token in a run of one step of a random model: no token is certain, and none is of an older version."""
ELSEWHERE = frozenset(
    ("metrics.jsonl", name)
    for name in ("weights/seconds/write", "weights/changed", "time/turns", "throughput/mfu", "memory/gpu")
)
"""Names that only weights.route disk and delta, rollout.servers.colocate, and runs on a GPU write."""
LIVE = frozenset(
    {
        *(("metrics.jsonl", f"time/{phase}") for phase in ("rollout", "weight_sync")),
        *(("metrics.jsonl", f"weights/{what}") for what in ("bytes", "probe_max_abs_diff", "probe_mean_abs_diff")),
        ("metrics.jsonl", "weights/sampled_mean_abs_diff"),
        *(("metrics.jsonl", f"weights/{what}") for what in ("servers", "seconds", "bytes_per_second", "checksum")),
        *(("metrics.jsonl", f"weights/seconds/{phase}") for phase in ("gather", "broadcast", "load")),
        *(("eval.jsonl", name) for name in ("prompts", "k", "avg_at_k", "pass_at_{j}", "reward", "lost_verdicts")),
        *(("eval.jsonl", f"response_length/{statistic}") for statistic in ("mean", "p99", "max")),
        ("eval.jsonl", "truncated"),
        ("eval.jsonl", "time/evaluation"),
    }
)
"""Names that only a run with servers writes, by file."""


def declared() -> set[tuple[str, str]]:
    """Returns file and name of every declared metric, without statistics; an open field stays a field."""
    return {
        (table.file, table.prefix + name)
        for table in DECLARATION.tables
        for metric in table.metrics
        for values in itertools.product(*_choices(metric.fields))
        for name in [metric.name.format(**dict(zip(metric.fields, values, strict=True)))]
    }


def _choices(fields: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    return [["{" + name + "}"] if values in OPEN else list(values) for name, values in fields.items()]


def written(run_dir: Path) -> set[tuple[str, str]]:
    """Returns file and name of every metric that the run wrote, as `declared` does. Fails if one is not declared."""
    names: set[tuple[str, str]] = set()
    for file in ("metrics.jsonl", "eval.jsonl", "checkpoints.jsonl"):
        lines = read_metrics(run_dir / file) if (run_dir / file).exists() else []
        for name in sorted({name for line in lines for name in line} - set(TAGS)):
            found = DECLARATION.find(file, name)
            assert found is not None, f"{file}: {name} is not declared in megatron_rl/lab/declared_*.py"
            values = {
                key: "{" + key + "}" if found.metric.fields[key] in OPEN else v for key, v in found.values.items()
            }
            names.add((file, found.table.prefix + found.metric.name.format(**values)))
    return names
