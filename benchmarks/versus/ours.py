"""One rank of our trainer in benchmarks/versus_trl.py: trains step by step, as it is granted.

python -m megatron_rl.ranks.launch RANKS benchmarks/versus/ours.py DIRECTORY CONFIG [KEY=VALUE]...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from versus.turns import Turns

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.train import train


def main(directory: Path, config_file: Path, overrides: list[str]) -> None:
    config = load_config(Config, config_file, overrides)
    turns = Turns.within(directory)

    def step_done() -> str:
        last = json.loads((Path(config.run_dir) / "metrics.jsonl").read_bytes().splitlines()[-1])
        seconds = {
            key.removeprefix("time/").replace("_", " "): value for key, value in last.items() if key.startswith("time/")
        }
        turns.step_done({"seconds": seconds})
        return ""

    train(config, halt=step_done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
