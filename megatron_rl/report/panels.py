"""Lists the figures of a report: which metrics each shows, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_rl.report.loaded_runs import LoadedRun, MetricColumns

Form = Literal["curves", "layers", "mini-batches"]


@dataclass(frozen=True)
class Panel:
    """One figure. `names` are written names; a name that ends in * stands for all names that begin so."""

    key: str
    """Name of its PNG file."""
    title: str
    names: tuple[str, ...]
    form: Form = "curves"
    log: bool = False
    """Whether the vertical axis is logarithmic; zeros are then left out."""
    file: str = "metrics.jsonl"


@dataclass(frozen=True)
class PanelGroup:
    title: str
    panels: tuple[Panel, ...]


def _tail(name: str) -> tuple[str, ...]:
    return tuple(f"{name}/{statistic}" for statistic in ("max", "p99", "p50", "p1", "min"))


def _layers(name: str) -> tuple[str, ...]:
    return tuple(f"routing/{name}/{statistic}" for statistic in ("max", "mean", "min"))


def _clips(unit: str) -> Iterator[str]:
    """Yields any and active of both sides, and the dual clip."""
    yield from (f"clip/{side}/{acts}/{unit}" for side in ("high", "low") for acts in ("any", "active"))
    yield f"clip/dual/{unit}"


CHANGE = "routing/expert_change"
PANELS = (
    PanelGroup(
        "Rewards",
        (
            Panel("accuracy", "Accuracy", ("rollout/accuracy",)),
            Panel("evaluation", "Held-out accuracy", ("avg_at_k", "pass_at_*"), file="eval.jsonl"),
            Panel("reward", "Reward", ("rollout/reward/mean", "rollout/reward/min", "rollout/reward/max")),
            Panel("dead_groups", "Dead groups", ("rollout/group/dead", "rollout/group/dead/*")),
            Panel("loss", "Loss", ("loss", "nll/mean", "critic/loss")),
            Panel("entropy", "Entropy", ("entropy/mean", "entropy/p50", "entropy/p99")),
        ),
    ),
    PanelGroup(
        "Clip, KL and ratios",
        (
            Panel("clip_token", "Clip fractions of tokens", tuple(_clips("token")), log=True),
            Panel("clip_sequence", "Clip fractions of sequences", tuple(_clips("sequence")), log=True),
            Panel(
                "kl", "KLs", tuple(f"kl/{p}/k3" for p in ("rollout_old", "old_policy", "policy_reference")), log=True
            ),
            Panel("beyond", "F(tau): tokens with heavy rho", ("rho/beyond_2", "rho/beyond_10"), log=True),
            Panel("ratio", "r = pi_theta/pi_old", _tail("ratio"), log=True),
            Panel("rho", "rho = pi_old/mu", _tail("rho"), log=True),
            Panel("omega", "omega = pi_theta/mu", _tail("omega"), log=True),
            Panel("sequence_ratio", "s, the sequence ratio", _tail("sequence_ratio"), log=True),
            Panel("log_s", "|log s|", tuple(f"abs_log_sequence_ratio/{s}" for s in ("max", "p99", "p50")), log=True),
            Panel("correction", "Corrections", ("correction/*", "router_shift/floored"), log=True),
        ),
    ),
    PanelGroup(
        "Routing",
        (
            Panel("change_map", "Expert change by layer, live", (f"{CHANGE}/old_policy/live",), form="layers"),
            Panel("mismatch_map", "Mismatch by layer, live", (f"{CHANGE}/rollout_old/live",), form="layers"),
            Panel(
                "change",
                "Expert change, mean over layers",
                (
                    *(f"{CHANGE}/{p}/{k}/mean" for p in ("old_policy", "rollout_old") for k in ("live", "effective")),
                    f"{CHANGE}/rerun/mean",
                ),
                log=True,
            ),
            Panel(
                "change_mini_batch",
                "Expert change by mini-batch, live",
                (f"{CHANGE}/old_policy/live/mean", f"{CHANGE}/rollout_old/live/mean"),
                form="mini-batches",
            ),
            Panel("router_entropy", "Entropy of the routers", _layers("entropy")),
            Panel("margin", "Margin of the routers", _layers("margin")),
            Panel("max_vio", "MaxVio", _layers("max_vio")),
            Panel("max_vio_map", "MaxVio by layer", ("routing/max_vio",), form="layers"),
            Panel("dead_experts", "Dead experts", _layers("dead_experts")),
            Panel("fallback", "Rows that route live under replay", _layers("fallback")),
        ),
    ),
    PanelGroup(
        "Gradients",
        (
            Panel("grad_norm", "Gradient norms by kind of weight", ("grad_norm", "grad_norm/*"), log=True),
            Panel("lr", "Learning rate", ("lr", "critic/lr")),
            Panel("critic_norm", "Gradient norms of the critic", ("critic/grad_norm", "critic/grad_norm/*"), log=True),
            Panel("explained", "Explained variance of the critic", ("critic/explained_variance*",)),
        ),
    ),
    PanelGroup(
        "Lengths and costs",
        (
            Panel("length", "Response length", tuple(f"rollout/response_length/{s}" for s in ("max", "p99", "mean"))),
            Panel(
                "length_correct",
                "Response length by correctness",
                ("rollout/response_length/correct/mean", "rollout/response_length/wrong/mean"),
            ),
            Panel("truncated", "Truncated responses", ("rollout/truncated",)),
            Panel("time", "Seconds by phase", ("time/*", "trace/seconds"), log=True),
            Panel("bytes", "Bytes moved", ("trace/bytes_moved", "weights/bytes"), log=True),
        ),
    ),
)
COMPARED = (
    Panel("accuracy", "Accuracy", ("rollout/accuracy",)),
    Panel("evaluation", "Held-out accuracy", ("avg_at_k",), file="eval.jsonl"),
    Panel("reward", "Reward", ("rollout/reward/mean",)),
    Panel("loss", "Negative log-likelihood", ("nll/mean",)),
    Panel("entropy", "Entropy", ("entropy/mean",)),
    Panel("kl_updates", "KL(pi_old, pi_theta), k3", ("kl/old_policy/k3",), log=True),
    Panel("kl_engines", "KL(mu, pi_old), k3", ("kl/rollout_old/k3",), log=True),
    Panel("clip_high", "Tokens above the clip's band", ("clip/high/any/token",), log=True),
    Panel("clip_low", "Tokens below the clip's band", ("clip/low/any/token",), log=True),
    Panel("change", "Expert change, live, mean over layers", (f"{CHANGE}/old_policy/live/mean",), log=True),
    Panel("log_s", "|log s|, 99th percentile", ("abs_log_sequence_ratio/p99",), log=True),
    Panel("max_vio", "MaxVio, largest of the layers", ("routing/max_vio/max",)),
    Panel("grad_norm", "Gradient norm", ("grad_norm",), log=True),
    Panel("length", "Response length", ("rollout/response_length/mean",)),
    Panel("truncated", "Truncated responses", ("rollout/truncated",)),
)
"""Figures of one metric each, in which runs or the arms of a study lie over each other."""


def table_of(run: LoadedRun, panel: Panel) -> MetricColumns:
    return next(table for table in run.tables() if table.file == panel.file)


def names_in(columns: MetricColumns, panel: Panel) -> list[str]:
    """The panel's names that the run wrote, in the panel's order. For a map, the name above the layers."""
    found: list[str] = []
    for wanted in panel.names:
        if wanted.endswith("*"):
            found += sorted(name for name in columns.names if name.startswith(wanted[:-1]) and name not in found)
        elif wanted in columns.names or (panel.form == "layers" and f"{wanted}/max" in columns.names):
            found.append(wanted)
    return found
