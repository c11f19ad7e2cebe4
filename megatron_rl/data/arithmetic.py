"""Chains of one-digit additions with checkable answers: a task that a small model learns in minutes.

    prompt    3+5+2+9=
    response  3+5=8,8+2=10,10+9=19#19         each addition, then the answer after '#'

Nine terms give responses of about 58 characters and prompts of 18; the number of terms sets the length. Problems are a
function of (seed, index) and their split: a problem is held out or not by a hash of its text, so that the splits share none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from megatron_rl.errors import UserError

PREFIX = "arithmetic:"
ALPHABET = "0123456789+,=#"
HELD_OUT_SHARE = 8  # one problem in so many


class TaskError(UserError):
    """An `arithmetic:` specification with a mistake in it."""


@dataclass(frozen=True)
class ArithmeticTask:
    terms: int = 9
    split: str = "train"
    count: int = 20000
    seed: int = 0

    @classmethod
    def parse(cls, spec: str) -> ArithmeticTask:
        """`arithmetic:terms=9,split=train,count=20000,seed=0`; what is left out has its default. Raises TaskError."""
        values: dict[str, str] = {}
        for part in filter(None, spec.removeprefix(PREFIX).split(",")):
            key, _, value = part.partition("=")
            if key not in cls.__dataclass_fields__:
                raise TaskError(f"{spec!r}: no key {key!r}; there are {', '.join(cls.__dataclass_fields__)}")
            values[key] = value
        numbers = {}
        for key in ("terms", "count", "seed"):
            if key in values and not values[key].isdigit():
                raise TaskError(f"{spec!r}: {key}: {values[key]!r} is not a whole number")
            if key in values:
                numbers[key] = int(values[key])
        task = cls(split=values.get("split", "train"), **numbers)
        if task.split not in ("train", "heldout"):
            raise TaskError(f"{spec!r}: split: {task.split!r} is neither train nor heldout")
        if task.terms < 2 or task.count < 1:
            raise TaskError(f"{spec!r}: terms must be at least 2, and count at least 1")
        return task

    def problems(self) -> list[list[int]]:
        """`count` different problems of this split, as their terms."""
        rng = np.random.default_rng([self.seed, self.terms, len(self.split)])
        found: dict[tuple[int, ...], None] = {}
        tries = 0
        while len(found) < self.count:
            tries += 1
            if tries > 100 * self.count + 1000:
                raise TaskError(f"fewer than {self.count} problems of {self.terms} terms exist in {self.split}")
            terms = tuple(rng.integers(1, 10, self.terms).tolist())
            if _held_out(terms) == (self.split == "heldout"):
                found[terms] = None
        return [list(terms) for terms in found]


def _held_out(terms: tuple[int, ...]) -> bool:
    return hashlib.sha256(bytes(terms)).digest()[0] % HELD_OUT_SHARE == 0


def prompt_text(terms: list[int]) -> str:
    return "+".join(map(str, terms)) + "="


def response_text(terms: list[int]) -> str:
    sums = list(accumulate(terms))
    steps = (f"{a}+{b}={c}" for a, b, c in zip(sums, terms[1:], sums[1:], strict=False))
    return ",".join(steps) + f"#{sums[-1]}"
