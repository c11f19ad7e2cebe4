"""Judged groups that no checkpoint has yet, on the disk: a resume trains on them again and samples only the rest.

Each group is a file, named by the number of its prompt. Steps that a resume makes again then have the same groups, and
if training repeats its bits, the same weights as a run that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

from megatron_rl.data.sample import Group, Prompt
from megatron_rl.data.store import StoreError, read_groups, write_groups

logger = logging.getLogger(__name__)
_NAME = re.compile(r"group-(\d{9,})\.jsonl")


class Ledger:
    def __init__(self, directory: Path, *, group_size: int, temperature: float, vocab_size: int) -> None:
        self._directory = directory
        self._group_size = group_size
        self._temperature = temperature
        self._vocab_size = vocab_size

    def write(self, group: Group) -> None:
        """Keeps a judged group, whose index is the number of its prompt. Raises OSError."""
        write_groups(
            self._file(group.index),
            [group],
            weight_version=newest_version(group),
            temperature=self._temperature,
            vocab_size=self._vocab_size,
        )

    def read(self, number: int, prompt: Prompt) -> Group | None:
        """Returns the group of this prompt; None if there is none that is whole."""
        file = self._file(number)
        try:
            (group,) = read_groups(file)
        except FileNotFoundError:
            return None
        except (OSError, StoreError, ValueError) as error:
            logger.warning("%s; it is sampled again", error)
            return None
        # An environment's opening messages have given the group's prompt its token ids.
        same_prompt = dataclasses.replace(group.prompt, token_ids=prompt.token_ids) == prompt
        as_asked = same_prompt and group.index == number and len(group.samples) == self._group_size
        return group if as_asked else None

    def forget(self, number: int) -> None:
        """Deletes the groups of prompts before `number`."""
        for file in self._directory.glob("group-*.jsonl"):
            if (match := _NAME.fullmatch(file.name)) and int(match[1]) < number:
                file.unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._directory / f"group-{number:09d}.jsonl"


def oldest_version(group: Group) -> int:
    """Returns the weight version of the group's oldest token."""
    return min(span.version for sample in group.samples for span in sample.versions)


def newest_version(group: Group) -> int:
    return max(span.version for sample in group.samples for span in sample.versions)
