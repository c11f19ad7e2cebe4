"""Writes examples/grafana/megatron_rl.json, a dashboard for Grafana, from declared metrics alone.

python tools/write_dashboard.py
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.lab.prometheus_names import PREFIX, export

PAGE = Path(__file__).parent.parent / "examples" / "grafana" / "megatron_rl.json"
WIDTH, HEIGHT, PER_ROW = 8, 7, 3
OWN = ("rollout_steps_total", "requests", "servers", "phase_info")
"""Series of lab/prometheus_sink.py that are of no metric."""


@dataclass(frozen=True)
class Panel:
    title: str
    names: tuple[str, ...]
    """Metrics as in the run's files; own series of the endpoint without megatron_rl_."""
    file: str = "metrics.jsonl"
    unit: str = "short"
    log: bool = False


PANELS = (
    Panel("Rollout steps", ("rollout_steps_total",)),
    Panel("Reward", ("rollout/reward/mean", "rollout/reward/min", "rollout/reward/max")),
    Panel("Accuracy", ("rollout/accuracy",), unit="percentunit"),
    Panel("Held-out accuracy", ("avg_at_k",), "eval.jsonl", "percentunit"),
    Panel("Dead groups", ("rollout/group/dead",), unit="percentunit"),
    Panel("Entropy, nat", ("entropy/mean", "entropy/p50", "entropy/p99")),
    Panel("KL, k3, nat", ("kl/old_policy/k3", "kl/rollout_old/k3"), log=True),
    Panel("Clipped tokens", ("clip/low/active/token", "clip/high/active/token"), unit="percentunit"),
    Panel("r = pi_theta/pi_old", ("ratio/max", "ratio/p99", "ratio/p1", "ratio/min"), log=True),
    Panel("rho = pi_old/mu", ("rho/max", "rho/p99", "rho/p1", "rho/min"), log=True),
    Panel("Gradient norm", ("grad_norm",)),
    Panel("Learning rate", ("lr",)),
    Panel("Response length, tokens", ("rollout/response_length/mean", "rollout/response_length/max")),
    Panel("Truncated responses", ("rollout/truncated",), unit="percentunit"),
    Panel("Lost verdicts", ("rollout/lost_verdicts",)),
    Panel("Expert change, live, mean over layers", ("routing/expert_change/old_policy/live/mean",)),
    Panel("MaxVio of the routers", ("routing/max_vio/max", "routing/max_vio/mean")),
    Panel("Entropy of the routers, nat", ("routing/entropy/mean", "routing/entropy/min")),
    Panel(
        "Seconds by phase",
        ("time/rollout", "time/schedule", "time/old_log-probs", "time/update", "time/weight_sync"),
        unit="s",
    ),
    Panel("Tokens a second", ("throughput/tokens_per_second",)),
    Panel("Memory of rank 0's process", ("memory/process",), unit="bytes"),
    Panel("Responses to come", ("requests",)),
    Panel("Rollout servers", ("servers",)),
    Panel("Checkpoint", ("time/checkpoint", "time/checkpoint_write"), "checkpoints.jsonl", "s"),
)


def expressions(panel: Panel) -> dict[str, str]:
    """Returns the PromQL of each curve by legend. Raises ValueError for a metric that is not declared."""
    found = {}
    for name in panel.names:
        if name in OWN:
            found["{{state}}" if name in ("requests", "servers") else name] = f"{PREFIX}_{name}" + _runs()
            continue
        series = export(panel.file, name)
        if series is None:
            raise ValueError(f"{panel.title}: {panel.file} has no metric {name}")
        labels = ",".join(f'{label}="{value}"' for label, value in series.labels.items())
        found[name] = series.name + _runs(labels)
    return found


def _runs(labels: str = "") -> str:
    return "{" + ",".join(filter(None, ['instance=~"$instance"', labels])) + "}"


def dashboard() -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "title": "megatron_rl",
        "uid": "megatron-rl",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
                {
                    "name": "instance",
                    "type": "query",
                    "label": "Run",
                    "datasource": source,
                    "query": {"query": f"label_values({PREFIX}_run_info, instance)", "refId": "runs"},
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
        "panels": [_panel(number, panel, source) for number, panel in enumerate(PANELS)],
    }


def _panel(number: int, panel: Panel, source: dict[str, str]) -> dict[str, Any]:
    scale = {"type": "log", "log": 10} if panel.log else {"type": "linear"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": {
            "x": number % PER_ROW * WIDTH,
            "y": number // PER_ROW * HEIGHT,
            "w": WIDTH,
            "h": HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": {"scaleDistribution": scale}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expression, "legendFormat": legend}
            for i, (legend, expression) in enumerate(expressions(panel).items())
        ],
    }


def write_page() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page())
