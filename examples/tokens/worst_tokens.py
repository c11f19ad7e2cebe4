"""Prints where the trainer and the rollout engine, or two policies, disagree most, from an export of tokens.

    megatron-rl tokens RUN --out tokens.parquet
    python examples/tokens/worst_tokens.py tokens.parquet

With duckdb instead of pandas, which reads only the columns that a query names:

    SELECT text, count(*) AS n, avg(abs(log_pi_old - log_mu)) AS gap
    FROM 'tokens.parquet' WHERE trained GROUP BY text ORDER BY gap DESC LIMIT 10
"""

from __future__ import annotations

import sys

import pandas

COLUMNS = ["step", "prompt_id", "sample", "position", "text", "log_mu", "log_pi_old", "ratio", "advantage", "entropy"]


def main(file: str) -> None:
    tokens = pandas.read_parquet(file, columns=[*COLUMNS, "trained"])
    tokens = tokens[tokens.trained].drop(columns="trained")
    # In a run in which mu stands for pi_old there is no log_pi_old, and no gap.
    tokens["gap"] = (tokens.log_pi_old - tokens.log_mu).abs()
    print(f"{len(tokens)} trained tokens of {tokens['sample'].nunique()} responses in {tokens.step.nunique()} steps\n")
    by_step = tokens.groupby("step").agg(
        tokens=("text", "size"), gap=("gap", "mean"), entropy=("entropy", "mean"), largest_ratio=("ratio", "max")
    )
    print(by_step.to_string(float_format="%.4g"), end="\n\n")
    worst = tokens.loc[tokens.ratio.sub(1).abs().nlargest(10).index]
    print("tokens whose ratio is farthest from 1")
    print(worst[[*COLUMNS[:5], "ratio", "advantage", "gap"]].to_string(index=False, float_format="%.4g"))


if __name__ == "__main__":
    main(sys.argv[1])
