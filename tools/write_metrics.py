"""Writes docs/metrics.md, the page of all metrics, from the declaration in megatron_rl/lab/declared_all.py.

python tools/write_metrics.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from megatron_rl.lab.declared import OPEN, DeclaredMetric, DeclaredTable, Healthy
from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.lab.synonyms import SYNONYMS

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
INTRODUCTION = """\
# Metrics

Every metric that a run writes. `python tools/write_metrics.py` writes this page from the declarations in
`megatron_rl/lab/declared_*.py`; edit them, not this page. docs/algorithms.md defines the policies and ratios: mu,
pi_old, pi_theta, pi_ref, r, rho, omega and s.

All but values are sums over tokens, sequences, responses, groups or rows, so layout, packing and order do not change
them. A metric without values is left out. A number that is not finite is null in the file. Quantiles are within 1% of
the exact ones; quantiles of ratios w are within 1e-6 if |w - 1| < 1e-4.

| Kind | Written as |
|---|---|
| sum | the sum |
| mean | the mean of numbers; of truth values, the fraction that is true |
| tail | `/mean`, `/std`, `/min`, `/max`, `/p1`, `/p50`, `/p99`; `/not_finite` counts such values, if there are any |
| ratio | as tail, of w, with `/chi2` = E[w^2] - 1 and `/ess` = E[w]^2/E[w^2] |
| layers | `/layer_NN` for each MoE layer, by its global number, and `/mean`, `/min`, `/max` over these layers |
| value | one number of the whole step |
"""


SYNONYMS_INTRODUCTION = """\
## Names in TRL, verl and slime

What the metrics are called there; `megatron_rl/lab/synonyms.py` names the files and revisions that were read. A `*`
stands for a part that depends on the run. Definitions may differ in details that the last column does not name.

| Here | TRL | verl | slime | Theirs |
|---|---|---|---|---|
"""


def write_page() -> str:
    return "\n".join([INTRODUCTION, *map(write_table, DECLARATION.tables), SYNONYMS_INTRODUCTION + write_synonyms()])


def write_synonyms() -> str:
    rows = []
    for each in SYNONYMS:
        name = f"`{each.name}`" + (" (eval.jsonl)" if each.file == "eval.jsonl" else "")
        theirs = [f"`{theirs}`" if theirs else "" for theirs in (each.trl, each.verl, each.slime)]
        rows.append(f"| {' | '.join([name, *theirs, each.note])} |\n")
    return "".join(rows)


def write_table(table: DeclaredTable) -> str:
    under = f", under `{table.prefix}`" if table.prefix else ""
    lines = [f"## {table.title}\n", f"In {table.file}{under}. {table.note}".strip() + "\n"]
    lines += ["| Name | Kind | Unit | Meaning | Source | Healthy |", "|---|---|---|---|---|---|"]
    lines += [_row(table, metric) for metric in table.metrics]
    lines += _field_lines(table)
    return "\n".join(lines) + "\n"


def _row(table: DeclaredTable, metric: DeclaredMetric) -> str:
    cells = [
        f"`{table.prefix}{metric.name}`",
        metric.kind.value,
        metric.unit,
        metric.meaning,
        metric.source,
        describe_range(metric.healthy),
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _field_lines(table: DeclaredTable) -> Iterator[str]:
    """Yields what the values of the patterns' fields mean, once for patterns with the same values."""
    patterns: dict[tuple[str, str], list[str]] = {}
    for metric in table.metrics:
        for name, values in metric.fields.items():
            if values not in OPEN and any(value != meaning for value, meaning in values.items()):
                choices = "; ".join(f"`{value}`: {meaning}" for value, meaning in values.items())
                patterns.setdefault((name, choices), []).append(f"`{table.prefix}{metric.name}`")
    for (name, choices), names in patterns.items():
        yield f"\n`{name}` of {', '.join(names)}: {choices}."


def describe_range(healthy: Healthy | None) -> str:
    """The range and its source in words; empty if there is none."""
    if healthy is None:
        return ""
    low, high = (math.nan if bound is None else bound for bound in (healthy.low, healthy.high))
    if low == high:
        bounds = f"{low:g}"
    elif math.isnan(low):
        bounds = f"at most {high:g}"
    elif math.isnan(high):
        bounds = f"at least {low:g}"
    else:
        bounds = f"{low:g} to {high:g}"
    return f"{bounds}: {healthy.source}"


if __name__ == "__main__":
    PAGE.write_text(write_page())
