"""`megatron-rl tokens`: one Parquet file with a row for each token of the recorded steps, joined with the rollouts."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_rl.data.sample import Sample
from megatron_rl.data.step_files import steps_of
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.disk import writes
from megatron_rl.errors import FileInTheWayError, MissingFileError
from megatron_rl.lab.token_records import COLUMNS, OLD
from megatron_rl.report.inspected import InspectedResponse, InspectedStep, InspectOptions, load_run_of_train, load_step

RENAMED = {"rollout_logprob": "log_mu", OLD: "log_pi_old", "logprob": "log_pi_theta"}
"""Columns of run_dir/tokens that have the names of docs/algorithms.md here."""
LEFT_OUT = ("step", "sample", "group", "position", "token_id")
"""Columns of run_dir/tokens that every row has anyway."""
KEYS = {
    "step": pa.int32(),
    "prompt_id": pa.string(),
    "group": pa.int32(),
    "sample": pa.int32(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "text": pa.string(),
    "loss_mask": pa.bool_(),
    "trained": pa.bool_(),
    "reward": pa.float32(),
    "correct": pa.bool_(),
    "ratio": pa.float32(),
}


@dataclass(frozen=True)
class ExportedTokens:
    count: int
    notes: Sequence[str]
    """A line for each step that has not the token values of all data-parallel replicas."""


def export_tokens(
    run: Path, out: Path, step: int | None, *, model: Path | None, rollouts: Path | None
) -> ExportedTokens:
    """Writes the tokens of one step, or of all that were recorded.

    A step is a row group, so that the largest step must fit into memory, and not the run. The file appears whole or not
    at all. Raises FileInTheWayError if `out` exists, MissingFileError if nothing was recorded, and as load_step does.
    """
    if out.exists():
        raise FileInTheWayError(f"{out}: exists. Name another file with --out, or remove it.")
    load_run_of_train(run)  # before its steps are counted: there may be no run
    steps = steps_of(run / "tokens") if step is None else [step]
    if not steps:
        raise MissingFileError(
            f"{run / 'tokens'}: no step was recorded. Train with lab.record_steps, or name a --step, whose saved "
            "rollouts then give log mu alone."
        )
    partial = out.with_name(f".{out.name}.partial")
    options = InspectOptions(0, model=model, rollouts=rollouts, needs_texts=model is not None, keeps_traces=True)
    count, notes = 0, []
    with writes(f"{out}", out.parent, then="try again"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pq.ParquetWriter(partial, schema_of(), compression="zstd") as writer:
                for number in steps:
                    loaded = load_step(run, dataclasses.replace(options, step=number))
                    table = step_table(loaded)
                    writer.write_table(table)
                    count += table.num_rows
                    if loaded.files < loaded.replicas:
                        notes.append(_note(loaded))
            os.replace(partial, out)
        finally:
            partial.unlink(missing_ok=True)
    return ExportedTokens(count, notes)


def _note(loaded: InspectedStep) -> str:
    return (
        f"step {loaded.step}: tokens/ has the values of {loaded.files} of {loaded.replicas} data-parallel replicas. A "
        "replica that trained on no token writes none; if a file was lost, its tokens look as if not trained on"
    )


def schema_of() -> pa.Schema:
    """Returns the columns of the file: the same for every run, so that files of several runs can be read together."""
    values = {RENAMED.get(name, name): kind for name, kind in COLUMNS.items() if name not in LEFT_OUT}
    changes = {_plain(f"expert_change/{pair}"): pa.float32() for pair in ("old_policy/live", "rollout_old/live")}
    return pa.schema({**KEYS, **values, **changes, "experts": pa.list_(pa.list_(pa.int16()))})


def step_table(loaded: InspectedStep) -> pa.Table:
    """Returns a row for each token of the step's responses, in the order of samples and positions."""
    schema = schema_of()
    parts = [_rows(loaded.step, response, loaded.group_size) for response in loaded.responses]
    columns: dict[str, pa.Array] = {}
    for field in schema:
        values = [part[field.name] if field.name in part else [None] * len(part["token_id"]) for part in parts]
        columns[field.name] = pa.array(list(itertools.chain.from_iterable(values)), field.type, from_pandas=True)
    return pa.table(columns, schema=schema)


def _rows(step: int, response: InspectedResponse, group_size: int) -> Mapping[str, Any]:
    """Returns the columns of one response; what a token does not have is None or NaN."""
    sample = response.sample
    first, count = len(sample.prompt.token_ids), len(response.trained)
    verdict = sample.verdict
    judged = verdict is not None and not verdict.lost
    values = {
        _plain(RENAMED.get(name, name)): _without_nan(column, name)
        for name, column in response.columns.items()
        if name not in LEFT_OUT
    }
    return {
        "step": [step] * count,
        "prompt_id": [sample.prompt.id] * count,
        "group": [response.number // group_size] * count,
        "sample": [response.number] * count,
        "position": range(first, first + count),
        "token_id": sample.response_ids.tolist(),
        "text": response.texts or [None] * count,
        "loss_mask": sample.loss_mask[first:].tolist(),
        "trained": response.trained.tolist(),
        "reward": [verdict.reward if verdict is not None and judged else None] * count,
        "correct": [verdict.correct if verdict is not None and judged else None] * count,
        "ratio": _ratio(response.columns),
        **values,
        "experts": _experts(sample, first, count),
    }


def _plain(name: str) -> str:
    """Returns a column name that needs no quotes in SQL."""
    return re.sub(r"\W", "_", name)


def _without_nan(column: np.ndarray, name: str) -> list[Any]:
    """Returns values of the column's own type, None for a token without one."""
    kind = COLUMNS.get(name, pa.float32())
    if pa.types.is_floating(kind):
        return column.tolist()
    convert = bool if pa.types.is_boolean(kind) else int
    return [None if np.isnan(value) else convert(value) for value in column.tolist()]


def _ratio(columns: Mapping[str, np.ndarray]) -> Any:
    """Returns r = pi_theta/pi_old, or pi_theta/mu in a run in which mu stands for pi_old."""
    if "logprob" not in columns:
        return [None] * len(columns["rollout_logprob"])
    return np.exp(columns["logprob"] - columns.get(OLD, columns["rollout_logprob"])).tolist()


def _experts(sample: Sample, first: int, count: int) -> list[list[list[int]] | None]:
    """Returns for each token the experts by MoE layer of the row that predicts it, the rollout engine's; None without
    a route."""
    trace: RoutingTrace | None = sample.trace
    if trace is None:
        return [None] * count
    rows = range(first - 1, first - 1 + count)
    return [trace.experts[row].tolist() if row < trace.rows and trace.present[row] else None for row in rows]
