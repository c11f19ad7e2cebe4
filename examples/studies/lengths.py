"""Makes the cold start of study A: one model that answers chains of 3, 9, 27 and 45 terms about equally surely.

    python examples/studies/lengths.py            (after `megatron-rl demo --cold-start`)

One model for all lengths: cold starts of their own would differ in more than the length of what they write. Chains of
45 terms, with up to 480 tokens, are the longest that the demo's model has positions for.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_rl.cores import threads_per_process
from megatron_rl.data.arithmetic_task import ArithmeticTask, prompt_text, response_text
from megatron_rl.demo.first_run import CONFIGS

ROOT = Path(__file__).parents[2]
WORK = Path(".demo/lengths")
TERMS = (3, 9, 27, 45)
EXAMPLES = 5000  # of each length
RANKS = 2


def write_examples(file: Path) -> None:
    lines = []
    for terms in TERMS:
        count = 600 if terms == 3 else EXAMPLES  # there are few chains of three
        problems = ArithmeticTask(terms=terms, count=count).problems()
        repeated = (problems * -(-EXAMPLES // len(problems)))[:EXAMPLES]
        lines += [{"prompt": prompt_text(each), "response": response_text(each)} for each in repeated]
    random.Random(0).shuffle(lines)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    os.chdir(ROOT)
    if (WORK / "cold-start").is_dir():
        print(f"cold start: {WORK / 'cold-start'} is there already")
        return
    write_examples(WORK / "examples.jsonl")
    shutil.rmtree(WORK / "run", ignore_errors=True)
    os.environ["OMP_NUM_THREADS"] = str(threads_per_process(RANKS))
    options = {
        "run_dir": WORK / "run",
        "data.train": WORK / "examples.jsonl",
        "data.max_tokens": 512,
        "steps": 320,
        "batch_size": 32,
    }
    sft = ["sft", str(CONFIGS / "sft.yaml"), *(f"{key}={value}" for key, value in options.items())]
    subprocess.run(
        [sys.executable, "-m", "megatron_rl.ranks.launch", str(RANKS), "-m", "megatron_rl", *sft], check=True
    )
    (WORK / "run" / "model").rename(WORK / "cold-start")


if __name__ == "__main__":
    main()
