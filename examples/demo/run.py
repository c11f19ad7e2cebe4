"""The demo: make a small Qwen3-MoE, fine-tune its cold start, train it by RL, and print the held-out accuracy.

    python examples/demo/run.py --preset gspo        (what `make demo` runs)

Everything is kept under .demo; the cold start is made once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_rl.cores import threads_per_process

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = Path(".demo")
RANKS = 2


def run(*command: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def on_ranks(*arguments: str) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads_per_process(RANKS))
    run("-m", "megatron_rl.ranks.launch", str(RANKS), "-m", "megatron_rl", *arguments)


def cold_start() -> None:
    if (WORK / "cold-start").is_dir():
        print(f"cold start: {WORK / 'cold-start'} is there already")
        return
    if not (WORK / "random").is_dir():
        run("tools/make_demo_model.py", str(WORK / "random"))
    shutil.rmtree(WORK / "runs" / "cold-start", ignore_errors=True)
    on_ranks("sft", str(HERE / "sft.yaml"))
    (WORK / "runs" / "cold-start" / "model").rename(WORK / "cold-start")


def preset_names() -> list[str]:
    return sorted(p.stem for p in HERE.glob("*.yaml") if p.stem not in ("base", "sft"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=preset_names(), default="gspo")
    parser.add_argument("--cold-start", action="store_true", help="make the cold start, and stop")
    arguments = parser.parse_args()
    preset = arguments.preset
    os.chdir(ROOT)
    cold_start()
    if arguments.cold_start:
        return
    run_dir = WORK / "runs" / preset
    shutil.rmtree(run_dir, ignore_errors=True)
    on_ranks("train", str(HERE / f"{preset}.yaml"))

    from megatron_rl.lab.run import read_metrics

    evaluations = read_metrics(run_dir / "eval.jsonl")
    before, after = (e["avg_at_k"] for e in (evaluations[0], evaluations[-1]))
    print(f"held-out accuracy: {before:.2f} -> {after:.2f}")


if __name__ == "__main__":
    main()
