"""Judged groups that no checkpoint has yet, on the disk: a resume trains on them again and samples only the rest.

Each group is a file, named by the number of its prompt; so is the choice of each step, if it chose among its groups.
Steps that a resume makes again then have the same groups, and if training repeats its bits, the same weights as a run
that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import orjson

from megatron_rl.data.sample import Group, Prompt
from megatron_rl.data.store import StoreError, read_groups, write_groups
from megatron_rl.disk import write_durably

logger = logging.getLogger(__name__)
_NAME = re.compile(r"group-(\d{9,})\.jsonl")
_CHOICE = re.compile(r"choice-(\d{6,})-\d+\.json")


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
        if not same_prompt or group.index != number or len(group.samples) != self._group_size:
            return None
        # Files have no record, for which a verifier may ask if the group is sampled again.
        return dataclasses.replace(group, prompt=dataclasses.replace(group.prompt, record=prompt.record))

    def write_choice(self, step: int, first: int, numbers: Sequence[int]) -> None:
        """Keeps the numbers of the groups that a step takes as its groups from `first` on. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        write_durably(self._choice_file(step, first), orjson.dumps(list(numbers)))

    def read_choice(self, step: int, first: int) -> list[int]:
        """Returns what `write_choice` has kept; [] if there is nothing that can be read."""
        file = self._choice_file(step, first)
        try:
            numbers = orjson.loads(file.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, orjson.JSONDecodeError) as error:
            logger.warning("%s: %s; the step may take other groups", file, error)
            return []
        is_list = isinstance(numbers, list) and all(type(number) is int for number in numbers)
        if not is_list or len(set(numbers)) < len(numbers):
            expected = "expected a list of different numbers; the step may take other groups"
            logger.warning("%s: found %.80r; %s", file, numbers, expected)
            return []
        return list(numbers)

    def forget(self, number: int, taken: Collection[int], *, step: int) -> None:
        """Deletes what a checkpoint after `step` has: the groups of prompts before `number`, those `taken`, and the
        choices."""
        for file in self._directory.iterdir() if self._directory.exists() else ():
            group, choice = _NAME.fullmatch(file.name), _CHOICE.fullmatch(file.name)
            if (group and (int(group[1]) < number or int(group[1]) in taken)) or (choice and int(choice[1]) <= step):
                file.unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._directory / f"group-{number:09d}.jsonl"

    def _choice_file(self, step: int, first: int) -> Path:
        return self._directory / f"choice-{step:06d}-{first}.json"


def oldest_version(group: Group) -> int:
    """Returns the weight version of the group's oldest token."""
    return min(span.version for sample in group.samples for span in sample.versions)


def newest_version(group: Group) -> int:
    return max(span.version for sample in group.samples for span in sample.versions)


def is_of_age(group: Group, version: int, lag: int) -> bool:
    """Tells whether all its tokens are of weights from `version`, pi_old's, to the lag before it. A start of the run
    before this one may have left another group: by then it had other weights."""
    return version - lag <= oldest_version(group) and newest_version(group) <= version
