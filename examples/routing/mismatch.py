"""How much of the mismatch between rollout engine and trainer the routes explain: none, R2 and R3 on the same rollouts.

    python examples/routing/mismatch.py [--seeds 3]        (after `make demo`, whose cold start it uses)

For each seed one server, in bf16, samples a rollout batch; the trainer, in fp32, then computes pi_old under each mode
with the very same weights. A table of KL(mu, pi_old) (k3), of F(2), the share of tokens whose probabilities differ more
than twofold, and of the routers that chose otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_rl.cores import threads_per_process
from megatron_rl.lab.run import read_metrics

HERE = Path(__file__).parent
RUNS = Path(".demo/runs/mismatch")
MODES = ("none", "r2", "r3")
FIGURES = {
    "KL(mu, pi_old)": "kl/rollout_old/k3",
    "F(2)": "rho/beyond_2",
    "|log-prob gap|": "abs_logprob_gap/mean",
    "routers that differ": "routing/set_mismatch/rollout_old/effective/mean",
    "tokens with one that does": "routing/token_layers/rollout_old/effective/any",
}
# One step that moves nothing: what is measured is pi_old.
STEP = ("train.steps=1", "train.mini_batches=1", "optim.lr=1e-12", "optim.min_lr=0", "data.heldout=null")
NO_EVALUATION = ("eval.samples=1", "eval.temperature=0")


def train(mode: str, seed: int, model: Path) -> Path:
    run_dir = RUNS / f"{mode}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    options = [f"run_dir={run_dir}", f"seed={seed}", f"model.path={model}", *STEP, *NO_EVALUATION]
    if mode != MODES[0]:  # the rollouts of the first mode, without a server
        options += [f"rollout.replay_from={RUNS / f'{MODES[0]}-{seed}'}", "weights.verify=0"]
    command = [sys.executable, "-m", "megatron_rl.ranks.launch", "1"]
    command += ["-m", "megatron_rl", "train", str(HERE / f"grpo-{mode}.yaml"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads_per_process(1))}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return run_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=Path(".demo/cold-start"))
    arguments = parser.parse_args()
    for seed in range(arguments.seeds):
        runs = {mode: read_metrics(train(mode, seed, arguments.model) / "metrics.jsonl") for mode in MODES}
        print(f"\nseed {seed:<23}" + "".join(f"{mode:>12}" for mode in MODES))
        for title, key in FIGURES.items():
            values = [np.mean([line[key] for line in lines]) for lines in runs.values()]
            print(f"{title:<28}" + "".join(f"{value:>12.3g}" for value in values), flush=True)


if __name__ == "__main__":
    main()
