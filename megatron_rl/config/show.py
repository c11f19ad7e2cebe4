"""What a dry run shows: who holds what under a layout."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_rl.config.layout import Layout
from megatron_rl.models.architecture import Architecture

MAX_RANKS = 64


def show_layout(layout: Layout, arch: Architecture) -> None:
    """Prints the degrees, and for each rank its coordinates, layers and experts."""
    degrees = ", ".join(f"{k}={getattr(layout, k)}" for k in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp"))
    table = Table(title=f"{layout.world_size} ranks: {degrees}")
    for column in ("rank", "tp", "cp", "dp", "pp", "etp", "ep", "layers", "experts"):
        table.add_column(column, justify="right")
    for rank in range(min(layout.world_size, MAX_RANKS)):
        table.add_row(*map(str, _row(rank, layout, arch)))
    console = Console()
    console.print(table)
    if layout.world_size > MAX_RANKS:
        console.print(f"... and {layout.world_size - MAX_RANKS} ranks more")


def _row(rank: int, layout: Layout, arch: Architecture) -> tuple[object, ...]:
    """Megatron-Core's order: tp (etp for experts) is fastest, then cp and dp (ep), pp slowest."""
    per_stage = layout.world_size // layout.pp
    pp, inner = divmod(rank, per_stage)
    tp, cp, dp = inner % layout.tp, inner // layout.tp % layout.cp, inner // (layout.tp * layout.cp)
    etp, ep = inner % layout.etp, inner // layout.etp % layout.ep
    per_chunk = arch.num_layers // (layout.pp * layout.vpp)
    starts = [(v * layout.pp + pp) * per_chunk for v in range(layout.vpp)]
    layers = " ".join(f"{start}-{start + per_chunk - 1}" for start in starts)
    experts = "-"
    if arch.num_experts:
        share = arch.num_experts // layout.ep
        experts = f"{ep * share}-{(ep + 1) * share - 1}"
    return rank, tp, cp, dp, pp, etp, ep, layers, experts
