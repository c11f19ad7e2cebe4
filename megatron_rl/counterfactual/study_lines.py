"""What a study found, as lines of JSON and as tables. A line's `kind` says what it is of: a routing's ratios, an
objective's clips, a gradient, or the cosine of two gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_rl.counterfactual.gradients import cosines, norms, relative_difference
from megatron_rl.counterfactual.objectives_compared import ObjectiveArm, TokenColumns, objective_figures
from megatron_rl.counterfactual.ratio_figures import SHARES, explained, ratio_figures
from megatron_rl.counterfactual.saved_batch import joined

Line = dict[str, Any]
Columns = Mapping[str, Sequence[TokenColumns]]


def ratio_lines(columns: Columns) -> Iterator[Line]:
    """Yields one line for each routing, pooled over the mini-batches, with the share that it explains of `none`."""
    figures = {}
    for name, each in columns.items():
        lengths = [len(values) for mini in each for values in mini.new.values() if len(values)]
        new, old, mu = (joined([getattr(mini, key) for mini in each]) for key in ("new", "old", "mu"))
        figures[name] = ratio_figures(new, old, mu, lengths) if lengths else {}
    for name, found in figures.items():
        shares = {f"share/{key}": explained(figures["none"][key], found[key]) for key in SHARES if found}
        yield {"kind": "ratios", "routing": name, **found, **shares}


def objective_lines(
    columns: Columns, objectives: Sequence[ObjectiveArm], advantages: Mapping[str, Mapping[int, float]]
) -> Iterator[Line]:
    """Yields one line for each routing and objective: a run's metrics of an optimizer step, pooled over the
    mini-batches."""
    for (name, each), arm in itertools.product(columns.items(), objectives):
        found = objective_figures(arm, each, advantages[arm.name])
        yield {"kind": "objective", "routing": name, "objective": arm.name, **found}


def gradient_lines(names: Sequence[tuple[str, str]], products: dict[str, Tensor]) -> Iterator[Line]:
    for index, (routing, objective) in enumerate(names):
        found = {f"norm/{kind}": value for kind, value in norms(products, index).items()}
        yield {"kind": "gradient", "routing": routing, "objective": objective, **found}


def cosine_lines(names: Sequence[tuple[str, str]], products: dict[str, Tensor]) -> Iterator[Line]:
    """Yields one line for each pair of gradients that differ in the routing or in the objective, but not in both."""
    for (a, one), (b, other) in itertools.combinations(enumerate(names), 2):
        if one[0] != other[0] and one[1] != other[1]:
            continue
        found = {f"cosine/{kind}": value for kind, value in cosines(products, a, b).items()}
        difference = relative_difference(products, a, b)
        yield {"kind": "cosine", "a": list(one), "b": list(other), **found, "relative_difference": difference}


# ---- tables -----------------------------------------------------------------------------------------------------

RATIOS = {
    "|log r| p50": "abs_log_r/p50",
    "|log r| p99": "abs_log_r/p99",
    "trimmed var": "log_r/trimmed_variance",
    "KL k3": "kl/old_policy/k3",
    "mean |log s|": "abs_log_s/mean",
    "ESS(r)": "ratio/ess",
}
SHARES_SHOWN = {
    "of trimmed var": "share/log_r/trimmed_variance",
    "of KL k3": "share/kl/old_policy/k3",
    "of |log s|": "share/abs_log_s/mean",
    "KL(mu, pi_old)": "kl/rollout_old/k3",
    "F(2)": "rho/beyond_2",
    "ESS(rho)": "rho/ess",
}
CLIPS = {
    "tokens low": "clip/low/active/token",
    "tokens high": "clip/high/active/token",
    "responses low": "clip/low/active/sequence",
    "responses high": "clip/high/active/sequence",
    "loss": "loss",
}
GRADIENTS = {
    "norm": "norm/all",
    "of routers": "norm/router",
    "cosine": "cosine/all",
    "routers' cosine": "cosine/router",
    "relative difference": "relative_difference",
}
COMPARED = ("cosine/all", "cosine/router", "relative_difference")


def print_study(lines: Sequence[Line]) -> None:
    """Prints the study as tables: a few columns of what the lines have."""
    from rich.console import Console

    console = Console()
    by_kind: dict[str, list[Line]] = {}
    for line in lines:
        by_kind.setdefault(line["kind"], []).append(line)
    (header,) = by_kind["study"]
    ratios, objectives = by_kind["ratios"], by_kind.get("objective", [])
    batch = f"{header['responses']} responses, {header['tokens']} tokens, {header['mini_batches']} mini-batches"
    _show(console, f"routings at the same weights ({batch})", ratios, ("routing",), RATIOS)
    _show(console, "the share that a routing explains, and the mismatch", ratios, ("routing",), SHARES_SHOWN)
    for routing in dict.fromkeys(line["routing"] for line in objectives):
        if routing in ("none", header["routing"], "rerun"):
            rows = [line for line in objectives if line["routing"] == routing]
            _show(console, f"active clips under routing {routing}", rows, ("objective",), CLIPS)
    if gradients := by_kind.get("gradient"):
        first = [header["routing"], header["objective"]]
        compared = _compared(by_kind.get("cosine", []), first)
        rows = [line | compared.get((line["routing"], line["objective"]), {}) for line in gradients]
        title = f"gradients, compared with routing {first[0]} and objective {first[1]}"
        _show(console, title, rows, ("routing", "objective"), GRADIENTS)
    for name, reason in header["unavailable"].items():
        console.print(f"not available: {name}: {reason}")


def _compared(cosines: Sequence[Line], first: list[str]) -> dict[tuple[str, ...], Line]:
    """Returns each gradient's comparison with the first one."""
    found = {}
    for line in cosines:
        for mine, other in (("a", "b"), ("b", "a")):
            if line[other] == first:
                found[tuple(line[mine])] = {key: line[key] for key in COMPARED}
    return found


def _show(console: Any, title: str, lines: Sequence[Line], keys: Sequence[str], columns: Mapping[str, str]) -> None:
    from rich.table import Table

    table = Table(title=title)
    for column in (*keys, *columns):
        table.add_column(column, no_wrap=column in keys)
    for line in lines:
        table.add_row(*(str(line[key]) for key in keys), *(_number(line.get(name)) for name in columns.values()))
    console.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
