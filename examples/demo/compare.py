"""Trains several presets on the demo's cold start, one after another, and prints a table of them.

    python examples/demo/compare.py --steps 30                     every preset
    python examples/demo/compare.py --steps 30 --presets grpo gspo

All start from the same weights, with the same seed and the same order of prompts. A preset whose run is complete is not
trained again; remove .demo/compare to start again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from megatron_rl.demo.first_run import CONFIGS, WORK, make_cold_start, on_ranks, preset_names

RUNS = WORK / "compare"
# The same for all, whatever a preset's own configuration says.
COMMON = ("rollout.prompts_per_step=32", "rollout.group_size=8", "eval.samples=4")


def train(preset: str, steps: int) -> Path:
    """The preset's run, of `steps` rollout steps; its learning rate falls over all of them."""
    run_dir = RUNS / f"{preset}-{steps}"
    if (run_dir / "model").is_dir():
        print(f"{preset}: {run_dir} is there already")
        return run_dir
    shutil.rmtree(run_dir, ignore_errors=True)
    # Four mini-batches to a step, in all of the demo's configurations.
    lengths = (f"train.steps={steps}", f"optim.decay_steps={4 * steps}")
    on_ranks("train", str(CONFIGS / f"{preset}.yaml"), f"run_dir={run_dir}", *lengths, *COMMON)
    return run_dir


def summary(run_dir: Path) -> dict[str, Any]:
    """What the table says of a run; rewards, gradients and clips are means over the last five steps."""
    from megatron_rl.lab.run import read_metrics

    evaluations, lines = (read_metrics(run_dir / name) for name in ("eval.jsonl", "metrics.jsonl"))
    last = [line for line in lines if line["step"] > lines[-1]["step"] - 5]
    late = [line for line in last if line["mini_batch"] == lines[-1]["mini_batch"]]

    def mean(name: str, of: list[dict[str, Any]]) -> float | None:
        values = [line[name] for line in of if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    clipped = [mean(f"clip/{side}/active/token", late) or 0.0 for side in ("low", "high")]
    return {
        "preset": run_dir.name.rpartition("-")[0],
        "before": evaluations[0]["avg_at_k"],
        "after": evaluations[-1]["avg_at_k"],
        "train accuracy": mean("rollout/accuracy", last),
        "entropy": mean("entropy/mean", last),
        "grad norm": mean("grad_norm", last),
        "clipped tokens": sum(clipped),
        "sd log s": mean("abs_log_sequence_ratio/std", late),
        "explained variance of returns": mean("critic/explained_variance", last),
        "of outcomes": mean("critic/explained_variance/outcome", last),
        "seconds a step": (lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"] or 1),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, at its full width wherever it is printed."""
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [["" if v is None else v if isinstance(v, str) else f"{v:.3g}" for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--presets", nargs="+", choices=preset_names(), default=preset_names())
    arguments = parser.parse_args()
    make_cold_start()
    rows = [summary(train(preset, arguments.steps)) for preset in arguments.presets]

    print(f"\n{arguments.steps} steps; before and after: accuracy on held-out prompts\n")
    print(_table(sorted(rows, key=lambda row: -row["after"])))
    (RUNS / f"table-{arguments.steps}.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
