"""Prints the table of docs/scale.md: Transformer Engine's layers, over tests/support/te_stub, beside plain PyTorch's.

    python tools/te_table.py .venv/bin/python .venv-py312/bin/python

takes five minutes on two cores. Arguments are the interpreters of environments that `make install` made; defaults to
this one. Each has its own Megatron-Core, and Transformer Engine's Python in its folders te*. Ends with status 1 if a
cell is out of bounds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from te_layers import BOUNDS, compare, errors, make_model
from te_worker import LAYOUTS

ASKED = "import sys; from importlib.metadata import version; print(sys.prefix, version('megatron-core'))"


def installed(python: str) -> Iterator[tuple[str, Path]]:
    """Yields the versions of Megatron-Core and of each Transformer Engine, and the folder of the latter."""
    asked = subprocess.run([python, "-c", ASKED], capture_output=True, text=True, check=True)
    prefix, megatron = asked.stdout.rsplit(maxsplit=1)
    for package in sorted(Path(prefix).glob("te*/transformer_engine-*.dist-info")):
        engine = package.name.removeprefix("transformer_engine-").removesuffix(".dist-info")
        yield f"{megatron}, {engine}", package.parent


def main(pythons: list[str]) -> int:
    cells: dict[str, dict[str, str]] = {}  # by versions and layout
    held = True
    with tempfile.TemporaryDirectory(prefix="te-table-") as scratch:
        model = make_model(Path(scratch) / "model")
        for python in pythons:
            for versions, directory in installed(python):
                print(versions, file=sys.stderr, flush=True)
                out = Path(tempfile.mkdtemp(dir=scratch))
                column = cells[versions] = {}
                for layout, found in compare(python, model, directory, out, tuple(LAYOUTS)).items():
                    largest = errors(found)
                    within = all(0 <= largest[name] <= bound for name, bound in BOUNDS.items())
                    column[layout] = " ".join(f"{error:.1e}" for error in largest.values())
                    column[layout] += "" if within else " **out of bounds**"
                    held &= within
    print(f"| layout | {' | '.join(cells)} |\n|{'---|' * (1 + len(cells))}")
    for layouts in LAYOUTS.values():
        for layout in layouts:
            print(f"| `{layout}` | {' | '.join(column[layout] for column in cells.values())} |")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [sys.executable]))
