"""The lists of mutations fit the source as it is. `python tools/mutate.py` runs them."""

from __future__ import annotations

import re

import pytest
from paths import ROOT

from tools.mutate import LISTS, Mutation, read_list

MUTATIONS = [(path.stem, mutation) for path in sorted(LISTS.glob("*.yaml")) for mutation in read_list(path)]


def test_each_mutation_changes_its_file_at_one_place() -> None:
    for name, mutation in MUTATIONS:
        before = (ROOT / mutation.file).read_text()
        assert mutation.mutated(before) != before, (name, mutation.guard)


def test_each_mutations_tests_exist() -> None:
    for name, mutation in MUTATIONS:
        assert mutation.tests, (name, mutation.guard)
        for test in mutation.tests:
            file, *parts = re.sub(r"\[.*\]$", "", test).split("::")
            assert (ROOT / file).is_file(), (name, test)
            assert all(re.search(rf"^ *(def|class) {part}\b", (ROOT / file).read_text(), re.M) for part in parts), test


def test_no_guard_is_listed_twice() -> None:
    guards = [mutation.guard for _, mutation in MUTATIONS]
    assert len(set(guards)) == len(guards) > 10


@pytest.mark.parametrize("text", ["", "one one"])
def test_a_text_that_is_not_there_once_is_refused(text: str) -> None:
    mutation = Mutation(guard="g", file="f.py", find="one", replace="two", tests=("t",))
    with pytest.raises(ValueError, match=r"f\.py: found [02] times, expected once: 'one'"):
        mutation.mutated(text)
