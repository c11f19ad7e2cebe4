"""Files with values of every trained token of a step, one row per token: run_dir/tokens, Parquet for pandas and others.

A token is found in the step's rollouts by its sample and its position. The expert changes are absent for a dense model;
those of rollout_old are there if the run has the rollout engine's routes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.disk import write_durably
from megatron_rl.errors import UserError

SAMPLE, POSITION, OLD = "sample", "position", "old_logprob"
COLUMNS = {
    "step": pa.int32(),  # rollout step
    "mini_batch": pa.int32(),
    SAMPLE: pa.int32(),  # group * rollout.group_size + number in the group
    "group": pa.int32(),  # number of the prompt in the rollout batch
    POSITION: pa.int32(),  # in prompt and response, from 0
    "token_id": pa.int32(),
    "weight_version": pa.int32(),  # under which it was sampled
    "rollout_logprob": pa.float32(),  # log mu
    OLD: pa.float32(),  # log pi_old; absent in a run in which mu stands for pi_old
    "logprob": pa.float32(),  # log pi_theta, before the optimizer step of its mini-batch
    "entropy": pa.float32(),  # of pi_theta, nat
    "advantage": pa.float32(),
    "clipped": pa.int8(),  # -1 under the lower bound, 1 over the upper one or the dual clip, if active (clip/*/active)
    "dropped": pa.bool_(),  # by the correction (correction/masked)
}
"""Columns of every file. `expert_change/PAIR` columns may follow: the mean over layers, null if not compared."""
_REPLICAS = b"replicas"
"""Key in a file's metadata: how many data-parallel replicas the run has, each with a file if it trained on a token."""


class TokenFileError(UserError):
    """A file of token values cannot be read."""


def token_file(directory: Path, step: int, dp: int) -> Path:
    return directory / f"step-{step:06d}-dp-{dp:04d}.parquet"


@dataclass(frozen=True)
class TokenFile:
    columns: dict[str, np.ndarray]
    """[N] each; null is NaN."""
    replicas: int


def write_tokens(path: Path, columns: Mapping[str, np.ndarray], *, replicas: int) -> None:
    """Writes [N] each; an expert change that is NaN becomes null. The file appears whole or not at all. Raises
    OSError."""
    arrays = {
        name: pa.array(values, COLUMNS.get(name, pa.float32()), from_pandas=name not in COLUMNS)
        for name, values in columns.items()
    }
    table = pa.table(arrays).replace_schema_metadata({_REPLICAS: str(replicas).encode()})
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data.getvalue())


WITHOUT = "Restore it. If it is removed, its tokens look as if they were not trained on."


def read_tokens(path: Path) -> TokenFile:
    """Raises TokenFileError, which names the file, if it is damaged or lacks a column."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise TokenFileError(f"{path}: not a file of token values, or damaged: {reason}. {WITHOUT}") from None
    replicas = (table.schema.metadata or {}).get(_REPLICAS, b"")
    missing = sorted(COLUMNS.keys() - {OLD} - set(table.column_names))
    if missing or not replicas.isdigit():
        what = f"has no column {missing[0]!r}" if missing else "does not say how many replicas the run has"
        raise TokenFileError(f"{path}: {what}; it is not a file of token values. {WITHOUT}")
    return TokenFile({name: table.column(name).to_numpy() for name in table.column_names}, int(replicas))
