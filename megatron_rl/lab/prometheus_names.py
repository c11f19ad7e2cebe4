"""Names of the declared metrics for Prometheus: one name for a pattern, and its fields as labels.

ratio/p99                   megatron_rl_ratio{statistic="p99"}
kl/rollout_old/k3           megatron_rl_kl_by_pair_estimate_nats{pair="rollout_old",estimate="k3"}
time/weight_sync            megatron_rl_time_by_phase_seconds{phase="weight_sync"}
routing/entropy/layer_03    megatron_rl_routing_entropy_by_layer_nats{layer="3"}
avg_at_k of eval.jsonl      megatron_rl_eval_avg_at_k
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rl.lab.declared import WrittenName
from megatron_rl.lab.declared_all import DECLARATION

PREFIX = "megatron_rl"
UNITS = {"s": "seconds", "byte": "bytes", "byte/s": "bytes_per_second", "token/s": "tokens_per_second", "nat": "nats"}
"""Units that are a part of the name; the others are in the help text."""


@dataclass(frozen=True)
class Exported:
    """A written metric as Prometheus has it."""

    name: str
    labels: Mapping[str, str]
    help: str

    @property
    def selector(self) -> str:
        """The expression that selects this series."""
        inside = ",".join(f'{label}="{value}"' for label, value in self.labels.items())
        return f"{self.name}{{{inside}}}" if inside else self.name


def export(file: str, name: str) -> Exported | None:
    """Returns what a metric in a line of `file`, such as metrics.jsonl, is called; None if it is not declared."""
    found = DECLARATION.find(file, name)
    return None if found is None else exported(found)


def exported(found: WrittenName) -> Exported:
    metric, table = found.metric, found.table
    literal = re.sub(r"\{\w+\}", "", metric.name)
    fields = [*metric.fields]
    labels = {field: str(found.values[field]) for field in fields}
    if found.layer is not None:
        fields, labels = [*fields, "layer"], {**labels, "layer": str(found.layer)}
    elif found.statistic:
        labels["statistic"] = found.statistic
    words = [
        PREFIX,
        *(["eval"] if table.file == "eval.jsonl" else []),
        *re.findall(r"[a-z0-9]+", table.prefix + literal),
    ]
    if fields:
        words += ["by", *fields]
    unit = UNITS.get(metric.unit, "")
    if unit and unit not in "_".join(words):
        words.append(unit)
    return Exported("_".join(words), labels, f"{table.prefix}{metric.name}, {metric.unit}: {metric.meaning}")
