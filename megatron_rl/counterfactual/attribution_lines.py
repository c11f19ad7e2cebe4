"""What an attribution found, the cause that it names, and its lines of JSON and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_rl.counterfactual.contrasts import ExpertContrast
from megatron_rl.counterfactual.ratio_figures import Doubles

ROUTING, GATES, PRECISION = "routing", "gate weights", "precision"
ROUNDING = 1e-5
"""Mean gap, in nats, up to which two engines in fp32 agree."""
NAMES_CAUSE = 0.5
"""Share of the mean gap from which on a part is called its cause."""
CLEAR_T = 5.0
"""Welch's t from which on an expert is named: beyond chance among all experts of a large model."""
CLEAR_LEAD = 1.5
"""How many times the t of the next expert the named one must have."""
SHOWN_EXPERTS = 5
Line = dict[str, Any]


@dataclass(frozen=True)
class Gap:
    """|log pi_old - log mu| over all tokens, in nats."""

    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Doubles) -> Gap:
        return cls(float(values.mean()), float(np.quantile(values, 0.99, method="inverted_cdf")), float(values.max()))

    def explained_by(self, after: Gap) -> float:
        """Returns the share of the mean gap that a substitution took away; negative if it made the gap larger."""
        return 1 - after.mean / self.mean if self.mean else 0.0


@dataclass(frozen=True)
class Substitution:
    name: str
    meaning: str
    gap: Gap | None
    """The gap that is left; None if the part could not be substituted."""
    reason: str = ""


@dataclass(frozen=True)
class LayerShare:
    """One layer's routes."""

    layer: int
    set_mismatch: float
    """Share of the rows whose set of experts differs from the rollout's, under live routing."""
    gap: Gap
    """The gap that is left if this layer alone replays the rollout's experts."""


@dataclass(frozen=True)
class Findings:
    before: Gap
    substitutions: tuple[Substitution, ...]
    joint_parts: tuple[str, ...]
    joint: Gap | None
    """The gap that is left if all joint_parts are substituted; None if there are fewer than two."""
    layers: tuple[LayerShare, ...]
    experts: tuple[ExpertContrast, ...]


def cause(found: Findings) -> str:
    """Names what the mismatch comes from, in words.

    A part is the cause if it alone explains at least NAMES_CAUSE of the mean gap and more than the others; a layer is
    named with routing by the same rule. Otherwise an expert is named if its tokens stand out: t at least CLEAR_T, and
    CLEAR_LEAD times the next one's. A gap up to ROUNDING has no cause.
    """
    if found.before.mean <= ROUNDING:
        return "none"
    shares = {row.name: found.before.explained_by(row.gap) for row in found.substitutions if row.gap}
    shares.pop(PRECISION)
    name, share = max(shares.items(), key=lambda item: item[1])
    if share >= NAMES_CAUSE:
        layers = {each.layer: found.before.explained_by(each.gap) for each in found.layers}
        best = max(layers, key=lambda layer: layers[layer], default=None)
        if name == ROUTING and best is not None and layers[best] >= NAMES_CAUSE:
            return f"routing of layer {best}"
        return name
    first, second = [*found.experts, None, None][:2]
    if first is not None and first.t >= max(CLEAR_T, CLEAR_LEAD * max(second.t if second else 0.0, 0.0)):
        return f"expert {first.expert} of layer {first.layer}"
    return "not attributed"


def attribution_lines(found: Findings, rollouts: str, step: int, tokens: int) -> list[Line]:
    """Returns the lines; each has a `kind`, and gaps are in nats."""
    before = found.before
    lines: list[Line] = [
        {
            "kind": "attribution",
            "rollouts": rollouts,
            "step": step,
            "tokens": tokens,
            "cause": cause(found),
            **_figures("before", before),
        }
    ]
    single = 0.0
    for row in found.substitutions:
        line: Line = {"kind": "substitution", "part": row.name, "meaning": row.meaning}
        if row.gap is None:
            line["unavailable"] = row.reason
        else:
            line |= {**_figures("after", row.gap), "share": before.explained_by(row.gap)}
        lines.append(line)
        if row.name in found.joint_parts and row.gap is not None:
            single += before.explained_by(row.gap)
    share = before.explained_by(found.joint) if found.joint else single
    lines.append(
        {
            "kind": "joint",
            "parts": list(found.joint_parts),
            **(_figures("after", found.joint) if found.joint else {}),
            "share": share,
            "interaction": share - single,
            "unattributed": 1 - share if before.mean else 0.0,
        }
    )
    lines += [
        {
            "kind": "layer",
            "layer": each.layer,
            "set_mismatch": each.set_mismatch,
            **_figures("after", each.gap),
            "share": before.explained_by(each.gap),
        }
        for each in found.layers
    ]
    return [*lines, *({"kind": "expert", **asdict(each)} for each in found.experts)]


def _figures(prefix: str, gap: Gap) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in asdict(gap).items()}


def print_attribution(lines: Sequence[Line]) -> None:
    """Prints the attribution as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    head = lines[0]
    of_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("substitution", "layer", "expert")}
    (joint,) = (line for line in lines if line["kind"] == "joint")

    def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        table = Table(title=title)
        for number, column in enumerate(columns):
            table.add_column(column, no_wrap=number == 0)
        for row in rows:
            table.add_row(*(f"{each:.3g}" if isinstance(each, float) else str(each) for each in row))
        console.print(table)

    def gap(line: Line, prefix: str = "after") -> list[object]:
        return [line.get(f"{prefix}/{name}", "") for name in ("mean", "p99", "max")]

    rows = [["nothing", *gap(head, "before"), "", "the trainer in fp32, live routing"]]
    for line in of_kind["substitution"]:
        why = line.get("unavailable")
        rows.append(
            [line["part"], *gap(line), line.get("share", ""), f"not available: {why}" if why else line["meaning"]]
        )
    if len(joint["parts"]) > 1:
        rows.append(["all that explain", *gap(joint), joint["share"], ", ".join(joint["parts"])])
    title = f"|log pi_old - log mu| in nats over {head['tokens']} tokens, one part substituted at a time"
    show(title, ("part", "mean", "p99", "max", "share", "what"), rows)
    if of_kind["layer"]:
        layers = [[str(each["layer"]), each["set_mismatch"], *gap(each), each["share"]] for each in of_kind["layer"]]
        show("routes replayed in one layer", ("layer", "set mismatch", "mean", "p99", "max", "share"), layers)
    if of_kind["expert"]:
        keys = ("layer", "expert", "tokens", "mean", "others", "t")
        experts = [[each[key] for key in keys] for each in of_kind["expert"][:SHOWN_EXPERTS]]
        show("experts whose tokens have the largest gaps", keys, experts)
    console.print(
        f"cause: {head['cause']}; interaction {joint['interaction']:.3g}, unattributed {joint['unattributed']:.3g}"
    )
