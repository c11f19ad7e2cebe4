"""Writes the records of a start (configuration, versions, checkout), and checks what a resume may change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import orjson
import yaml

import megatron_rl
from megatron_rl.config.load import ConfigError, dump_config, load_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.config.sources import flatten
from megatron_rl.disk import write_durably
from megatron_rl.errors import MissingFileError, UserError
from megatron_rl.lab import provenance

MAY_CHANGE = (
    "merged_presets",
    "run_dir",
    "train.steps",
    "train.max_minutes",
    "steps",
    "max_minutes",
    "checkpoint",
    "parallel",
    "engine.dispatcher",
    "engine.heartbeat",
    "engine.logit_chunk_tokens",
    "engine.max_tokens_per_micro_batch",
    "engine.overlap",
    "engine.recompute",
    "eval",
    "lab",
    "rollout.servers",
    "rollout.concurrency",
    "rollout.deadline",
    "reward.workers",
    "reward.timeout",
    "reward.memory_mib",
    "reward.environment",
    "rollout.dynamic_sampling.oversample",
    "rollout.dynamic_sampling.max_refills",
    *(
        f"{section}.{key}"
        for section in ("optim", "critic.optim")
        for key in ("lr", "min_lr", "schedule", "warmup_steps", "decay_steps", "max_skipped", "offload")
    ),
    "weights",
)
"""Keys, with all keys below them, that may differ on resume: how long a run goes, where, under which layout, how
fast, what ends it, and the learning rate. Under the same layout it goes on to the bit, under another but for rounding.

A learning rate is a factor of each step, and no state of Adam depends on it. Its betas are in the moments and in their
bias correction, so a run under others is another run, as is one with another weight_decay or clip_grad.

The names of presets may differ, but the keys that they set are compared. A server's dtype and flags change mu, but a
run outlives its servers; the mismatch metrics show the change.
"""

Resume = bool | Literal["auto"]
"""Whether a start goes on with the run in run_dir. "auto": if there is one; else it begins one."""
Flat = Mapping[str, Any]
"""A configuration by dotted key; all values are the text of config.yaml, or lists of it."""
ABSENT = "absent"
"""Stands for the value of a key that a configuration does not have."""

# In the order of writing. config.yaml is last, because a directory with a config.yaml can be resumed.
RECORDS = ("versions.json", "git.json", "git.diff", "config.yaml")
RUN_FILE = "run.json"


class RunDirError(UserError):
    """The configuration does not fit the run, or a file of the run cannot be read."""


def check_resumable(path: Path, config_yaml: str) -> None:
    """Raises MissingFileError if there is no run, and RunDirError if its configuration differs in more than
    MAY_CHANGE."""
    config_file = path / "config.yaml"
    if not config_file.is_file():
        raise MissingFileError(
            f"run_dir {path} has no config.yaml, so there is no run to resume. "
            "Start without --resume, or correct the path."
        )
    asked = flat_config(config_yaml)
    refused = [
        f"  {key}: {shown_value(before)} in the run, {shown_value(now)} now"
        for key, before, now in differing(read_frozen(path), asked)
        if not _may_change(key)
    ]
    if refused:
        free = [key for key in MAY_CHANGE if any(_is_below(each, key) for each in asked)]
        raise RunDirError(
            f"run_dir {path} was started with another configuration:\n"
            + "\n".join(refused)
            + f"\nOnly these may differ on resume: {', '.join(free)}. "
            "Restore the values, or name another run_dir; --fork begins a new run from a checkpoint of this one."
        )


def flat_config(config_yaml: str) -> dict[str, Any]:
    """Returns a configuration by dotted key, with all values as text."""
    return flatten(yaml.load(config_yaml, yaml.BaseLoader))


def read_frozen(path: Path) -> dict[str, Any]:
    """Returns the configuration that the newest start of a run has frozen, as `flat_config` does, with the defaults of
    keys that are newer. Raises RunDirError if it is damaged."""
    file = path / "config.yaml"
    frozen = _read_frozen(file)
    return _with_defaults(file, is_sft="steps" in frozen) | frozen


def _read_frozen(file: Path) -> dict[str, Any]:
    """Returns the configuration by dotted key. All values are text, so a damaged file cannot create other objects."""
    fix = "restore the file; history/ may have an earlier one"
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
        if isinstance(tree, dict):
            return flatten(tree)
    except UnicodeDecodeError:
        raise RunDirError(f"{file}: not text in UTF-8; {fix}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise RunDirError(
            f"{file}{line}: not YAML ({getattr(error, 'problem', None) or 'nested too deep'}); {fix}"
        ) from None
    found = "nothing" if tree is None else type(tree).__name__
    raise RunDirError(f"{file}: found {found}, expected the keys of the run's configuration; {fix}")


def _with_defaults(file: Path, *, is_sft: bool) -> dict[str, Any]:
    """Returns the frozen configuration by dotted key, with the defaults of keys that did not exist when it was written;
    nothing if it cannot be loaded."""
    try:
        config = load_config(SftConfig, file) if is_sft else load_config(Config, file)
    except ConfigError:
        return {}
    return flatten(yaml.load(dump_config(config), yaml.BaseLoader))


def differing(old: Flat, new: Flat) -> list[tuple[str, Any, Any]]:
    """Returns (key, old value, new value) of each key whose values differ; a key may be absent on one side."""
    keys = sorted(old.keys() | new.keys())
    values = ((key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in keys)
    return [(key, before, now) for key, before, now in values if before != now]


def shown_value(value: Any) -> str:
    """Returns a value of a flat configuration as YAML writes it in one line."""
    return f"[{', '.join(map(shown_value, value))}]" if isinstance(value, list) else str(value)


def _may_change(key: str) -> bool:
    return any(_is_below(key, free) for free in MAY_CHANGE)


def _is_below(key: str, section: str) -> bool:
    return key == section or key.startswith(section + ".")


# ---- the run's name --------------------------------------------------------------------------------------------


def name_run(path: Path, name: str) -> None:
    """Writes a new run's id into the directory. Every checkpoint of the run carries it."""
    write_durably(path / RUN_FILE, _json({"id": name}))


def read_run_id(path: Path) -> str:
    """Reads the id of the run in the directory. Raises RunDirError if it is missing or damaged."""
    file = path / RUN_FILE
    try:
        content = orjson.loads(file.read_bytes())
        if isinstance(content, dict) and re.fullmatch("[0-9a-f]{32}", str(content.get("id"))):
            return content["id"]
        found = "damaged"
    except FileNotFoundError:
        found = "not there"
    except orjson.JSONDecodeError:
        found = "damaged"
    raise RunDirError(
        f"{file}: {found}, so which checkpoints are this run's cannot be told. Copy `run` from the manifest.json of a "
        f'checkpoint that you trust into it, as {{"id": "..."}}; or start a new run from exported weights'
    )


# ---- records ---------------------------------------------------------------------------------------------------


class History:
    """history/N, into which this start moves what it removes from the run's files. Created when first needed."""

    def __init__(self, path: Path) -> None:
        taken = [int(each.name) for each in path.glob("history/*") if each.name.isdecimal()]
        self.path = path / "history" / str(max(taken, default=-1) + 1)

    def keep(self, name: str, data: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_durably(self.path / name, data)

    def take(self, file: Path, below: str) -> None:
        """Moves a file or directory into the folder `below`."""
        folder = self.path / below
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)


def write_records(path: Path, config_yaml: str, history: History) -> None:
    """Writes the records of this start. Records of an earlier start move to history/ if they differ."""
    new = {"versions.json": _json(provenance.versions()), "config.yaml": config_yaml.encode()}
    git = provenance.git_state(Path(megatron_rl.__file__))
    if git is not None:
        new["git.json"] = _json({"commit": git.commit, "dirty": git.dirty, "untracked": git.untracked})
        new["git.diff"] = git.diff.encode()
    old = {name: (path / name).read_bytes() for name in RECORDS if (path / name).is_file()}
    if old == new:
        return
    for name, data in old.items():
        history.keep(name, data)
    for name in RECORDS:
        if name in new:
            write_durably(path / name, new[name])
    for name in old.keys() - new.keys():
        (path / name).unlink()


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
