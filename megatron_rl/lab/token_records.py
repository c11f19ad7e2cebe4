"""Files with values of every trained token of a step, one row per token: run_dir/tokens, Parquet for pandas and others.

A token is found in the step's rollouts by its sample and its position. The expert changes are absent for a dense model;
those of rollout_old are there if the run has the rollout engine's routes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.errors import UserError

SAMPLE, POSITION = "sample", "position"
COLUMNS = {
    "step": pa.int32(),  # rollout step
    "mini_batch": pa.int32(),
    SAMPLE: pa.int32(),  # group * rollout.group_size + number in the group
    "group": pa.int32(),  # number of the prompt in the rollout batch
    POSITION: pa.int32(),  # in prompt and response, from 0
    "token_id": pa.int32(),
    "weight_version": pa.int32(),  # under which it was sampled
    "rollout_logprob": pa.float32(),  # log mu
    "old_logprob": pa.float32(),  # log pi_old
    "logprob": pa.float32(),  # log pi_theta, before the optimizer step of its mini-batch
    "entropy": pa.float32(),  # of pi_theta, nat
    "advantage": pa.float32(),
    "clipped": pa.int8(),  # -1 under the lower bound, 1 over the upper one or the dual clip, if active (clip/*/active)
    "dropped": pa.bool_(),  # by the correction (correction/masked)
}
"""Columns of every file. `expert_change/PAIR` columns may follow: the mean over layers, null if not compared."""


class TokenFileError(UserError):
    """A file of token values cannot be read."""


def token_file(directory: Path, step: int, dp: int) -> Path:
    return directory / f"step-{step:06d}-dp-{dp:04d}.parquet"


def write_tokens(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes [N] each; NaN becomes null. The file appears whole or not at all. Raises OSError."""
    types = {name: COLUMNS.get(name, pa.float32()) for name in columns}
    arrays = {name: pa.array(values, types[name], from_pandas=True) for name, values in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        pq.write_table(pa.table(arrays), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_tokens(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """Reads the files of one step into [N] each; null becomes NaN.

    Raises TokenFileError, which names the file, if one is damaged or lacks a column.
    """
    tables = []
    for path in paths:
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise TokenFileError(f"{path}: not a file of token values, or damaged: {reason}. Remove it.") from None
        if missing := sorted(COLUMNS.keys() - set(table.column_names)):
            raise TokenFileError(f"{path}: has no column {missing[0]!r}; it is not a file of token values. Remove it.")
        tables.append(table)
    whole = pa.concat_tables(tables, promote_options="default")
    return {name: whole.column(name).to_numpy() for name in whole.column_names}
