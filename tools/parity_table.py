"""Prints docs/parity.md: errors of every family against transformers, by layout and recomputation.

    python tools/parity_table.py > docs/parity.md

takes half an hour on two cores. Names of families as arguments print their rows alone. Ends with status 1 if a row is
out of bounds.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import orjson
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from family_models import FAMILIES, make_family_model
from parity_checks import layouts_of, write_sequences

from megatron_rl import parity
from megatron_rl.lab.differences import Bounds

HEAD = """# Parity with transformers

Each row is a random model of one family in a layout: the largest difference of a token's log-prob, and the largest
relative error of a tensor's gradient, over 12 packed sequences in fp32 on CPUs. The bounds are {logprob:g} and
{grad:g}. Each cell has both errors, for a backward pass that recomputes nothing, whole layers, or attention.
`python tools/parity_table.py > docs/parity.md` prints this page; the models are made from tests/families. Layers are
plain PyTorch: Transformer Engine's have not been compared. DeepSeek's and GLM's norms of latents take rms_norm_eps, as
SGLang's do; transformers takes 1e-6 whatever config.json says, so the models compared have 1e-6.

| family | layout | none | full | core_attn |
|---|---|---|---|---|"""
RECOMPUTE = ("none", "full", "core_attn")


def rows(family: str, scratch: Path, progress: Console) -> Iterator[tuple[str, bool]]:
    """Yields the rows of a family, and whether each is within bounds."""
    model, tokens = make_family_model(scratch / family, family), write_sequences(scratch / "tokens.jsonl")
    layouts = layouts_of(model)
    cells: dict[str, list[str]] = {layout: [] for layout in layouts}
    passed = dict.fromkeys(layouts, True)
    for recompute in RECOMPUTE:
        progress.print(f"{family}: recompute {recompute}")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            parity.run(model, tokens, layouts, recompute=recompute, device="cpu", as_json=True)
        for line in printed.getvalue().splitlines():
            if line.startswith("{"):
                found = orjson.loads(line)
                cells[found["layout"]].append(f"{found['logprob_max']:.1e} {found['grad_max']:.1e}")
                passed[found["layout"]] &= found["passed"]
    for layout in layouts:
        yield f"| {family} | `{layout}` | {' | '.join(cells[layout])} |", passed[layout]


def main(families: list[str]) -> int:
    bounds, progress = Bounds.of(None), Console(stderr=True)
    print(HEAD.format(logprob=bounds.logprob, grad=bounds.grad), flush=True)
    held = True
    with tempfile.TemporaryDirectory(prefix="parity-table-") as scratch:
        for family in families or FAMILIES:
            for row, within in rows(family, Path(scratch), progress):
                print(row if within else f"{row} **out of bounds**", flush=True)
                held &= within
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
