"""Makes chains of one-digit additions with checkable answers: a task that a small model learns in minutes.

    prompt    3+5+2+9=
    response  3+5=8,8+2=10,10+9=19#19         each addition, then the answer after '#'

Nine terms make prompts of 18 characters and responses of 49 to 65 characters; the number of terms sets the length. A
hash of its terms decides whether a problem is held out. So the two splits share no problem, whatever their seeds and
counts.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

import numpy as np

from megatron_rl.data.files import DataError

PREFIX = "arithmetic:"
ALPHABET = "0123456789+,=#"
SPLITS = ("train", "heldout")
HELD_OUT_SHARE = 8  # one problem in eight
LIMITS = {"terms": (2, 1000), "count": (1, 10_000_000)}

_WHOLE = re.compile("[0-9]{1,18}")


@dataclass(frozen=True)
class ArithmeticTask:
    terms: int = 9
    split: str = "train"
    count: int = 20000
    seed: int = 0

    @classmethod
    def parse(cls, spec: str) -> ArithmeticTask:
        """Reads `arithmetic:terms=9,split=train,count=20000,seed=0`; every part is optional. Raises DataError."""
        shown = spec if len(spec) <= 200 else f"{spec[:200]}..."
        types = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, int | str] = {}
        for part in filter(None, spec.removeprefix(PREFIX).split(",")):
            key, _, value = part.partition("=")
            if key not in types:
                close = difflib.get_close_matches(key, types, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(types)}"
                raise DataError(f"{shown}: no key {key[:40]!r}; {hint}")
            if key in values:
                raise DataError(f"{shown}: {key}: given twice")
            if types[key] is int and not _WHOLE.fullmatch(value):
                raise DataError(f"{shown}: {key}: expected a whole number of at most 18 digits, found {value[:40]!r}")
            values[key] = int(value) if types[key] is int else value
        task = cls(**values)  # type: ignore[arg-type]
        if task.split not in SPLITS:
            raise DataError(f"{shown}: split: expected {' or '.join(SPLITS)}, found {task.split!r}")
        for key, (least, most) in LIMITS.items():
            if not least <= getattr(task, key) <= most:
                raise DataError(f"{shown}: {key}: expected {least} to {most}, found {getattr(task, key)}")
        return task

    def problems(self) -> list[tuple[int, ...]]:
        """Terms, 1 to 9, of `count` different problems of the split. A smaller count gives the first of the same list.

        Raises DataError if the split has fewer problems.
        """
        rng = np.random.default_rng([self.seed, self.terms, SPLITS.index(self.split)])
        found: dict[tuple[int, ...], None] = {}
        for _ in range(1000 + 100 * min(self.count, 9**self.terms)):
            terms = tuple(rng.integers(1, 10, self.terms).tolist())
            if is_held_out(terms) == (self.split == "heldout"):
                found[terms] = None
                if len(found) == self.count:
                    return list(found)
        raise DataError(
            f"{PREFIX} count: found {len(found)} problems of {self.terms} terms in split {self.split}, "
            f"not {self.count}; ask for fewer or use more terms"
        )


def is_held_out(terms: Sequence[int]) -> bool:
    return hashlib.sha256(bytes(terms)).digest()[0] % HELD_OUT_SHARE == 0


def prompt_text(terms: Sequence[int]) -> str:
    return "+".join(map(str, terms)) + "="


def response_text(terms: Sequence[int]) -> str:
    sums = list(accumulate(terms))
    steps = [f"{a}+{term}={b}" for (a, b), term in zip(pairwise(sums), terms[1:], strict=True)]
    return f"{','.join(steps)}#{sums[-1]}"
