"""Groups that are kept until a checkpoint has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.rollout.ledger import Ledger, newest_version, oldest_version

PROMPT = Prompt("p", "text", (3, 4), "1", "arithmetic")


def make(number: int, samples: int = 2) -> Group:
    plain = (Sample.start(PROMPT, n).extend([5], [-1.0], 3).extend([6], [-2.0], 4 + n) for n in range(samples))
    return Group(number, PROMPT, tuple(dataclasses.replace(sample, verdict=Verdict(1.0, True)) for sample in plain))


def ledger(root: Path, **changed: int) -> Ledger:
    return Ledger(root, **{"group_size": 2, "temperature": 1, "vocab_size": 9, **changed})


def test_a_group_is_read_as_it_was_written(tmp_path: Path) -> None:
    ledger(tmp_path / "new").write(make(12))
    found = ledger(tmp_path / "new").read(12, PROMPT)
    assert found is not None
    assert found.index == 12
    assert [sample.token_ids.tolist() for sample in found.samples] == [[3, 4, 5, 6]] * 2
    assert [sample.versions for sample in found.samples] == [sample.versions for sample in make(12).samples]
    assert (oldest_version(found), newest_version(found)) == (3, 5)


def test_a_group_that_is_not_as_asked_is_none(tmp_path: Path) -> None:
    ledger(tmp_path).write(make(12))
    assert ledger(tmp_path).read(13, PROMPT) is None
    assert ledger(tmp_path).read(12, Prompt("q", "text", (3, 4), "1", "arithmetic")) is None
    assert ledger(tmp_path, group_size=3).read(12, PROMPT) is None


def test_a_group_has_the_token_ids_of_an_environments_opening_messages(tmp_path: Path) -> None:
    ledger(tmp_path).write(make(12))
    found = ledger(tmp_path).read(12, dataclasses.replace(PROMPT, token_ids=(3,)))
    assert found is not None
    assert found.prompt.token_ids == (3, 4)


def test_a_group_has_the_record_of_its_prompt_again(tmp_path: Path) -> None:
    """A group of the wrong age is sampled again from its prompt, and a verifier may ask for the record."""
    ledger(tmp_path).write(make(12))
    found = ledger(tmp_path).read(12, dataclasses.replace(PROMPT, record={"level": 3}))
    assert found is not None
    assert found.prompt.record == {"level": 3}


def test_a_damaged_group_is_sampled_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger(tmp_path).write(make(12))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert ledger(tmp_path).read(12, PROMPT) is None
    assert "sampled again" in caplog.text


def test_groups_that_a_checkpoint_has_are_deleted(tmp_path: Path) -> None:
    for number in (7, 12, 20):
        ledger(tmp_path).write(make(number))
    ledger(tmp_path).forget(12, (), step=1)
    assert ledger(tmp_path).read(7, PROMPT) is None
    assert ledger(tmp_path).read(12, PROMPT) is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_groups_that_steps_have_taken_after_the_cursor_are_deleted_and_the_choices_that_were_made(
    tmp_path: Path,
) -> None:
    for number in (12, 13, 20):
        ledger(tmp_path).write(make(number))
    for step in (4, 5):
        ledger(tmp_path).write_choice(step, 0, [7, step])
        ledger(tmp_path).write_choice(step, 8, [9])
    ledger(tmp_path).forget(12, [13], step=4)
    assert ledger(tmp_path).read(13, PROMPT) is None
    assert None not in (ledger(tmp_path).read(12, PROMPT), ledger(tmp_path).read(20, PROMPT))
    assert [ledger(tmp_path).read_choice(step, first) for step in (4, 5) for first in (0, 8)] == [[], [], [7, 5], [9]]


@pytest.mark.parametrize("content", ["[1, ", "5", "[null]", "[1, true]", "[1, 1]", '{"1": 2}', '"12"'])
def test_a_damaged_choice_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    ledger(tmp_path).write_choice(4, 0, [1, 2])
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert ledger(tmp_path).read_choice(4, 0) == []
    assert "other groups" in caplog.text
