"""Verifiers that take the whole record or a group's responses, and where their modules are found, in real workers."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verifier_examples
from paths import SUPPORT
from tiny_models import make_tokenizer

from megatron_rl.data.files import DataError
from megatron_rl.data.prompts import Fields, PromptDataset
from megatron_rl.data.sample import LOST, Group, Prompt, Sample, Verdict
from megatron_rl.rewards import Judges, RewardError, grade
from megatron_rl.rewards.checked_prompts import load_prompts
from megatron_rl.rewards.trial import try_verifier

RESPONSES = ("a", "b", "x", "wait", "few")
SCORES = {"scores": {"a": 0.5, "b": -1}}


@pytest.fixture(scope="module")
def judges() -> Iterator[Judges]:
    with Judges(workers=2, deadline=2.0) as pool:
        yield pool


def group(function: str, responses: list[str], index: int = 0) -> Group:
    prompt = Prompt(f"q:{index}", "?", (7,), "a", f"verifier_examples:{function}", SCORES)
    tokens = (RESPONSES.index(each) for each in responses)
    samples = (Sample.start(prompt, i).extend([token], [-1.0], 0) for i, token in enumerate(tokens))
    return Group(index, prompt, tuple(samples))


def verdicts(judges: Judges, *groups: Group) -> list[list[Verdict | None]]:
    graded = grade(groups, lambda ids: RESPONSES[ids[0]], judges)
    return [[sample.verdict for sample in each.samples] for each in graded]


RIGHT, WRONG = Verdict(1.0, True), Verdict(0.0, False)


def test_a_verifier_judges_by_the_record(judges: Judges, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = verdicts(judges, group("by_record", ["a", "b", "x"]))
    assert found == [[Verdict(0.5, True), Verdict(-1.0, False), LOST]]
    assert "sample 2: KeyError: 'x'" in caplog.text


def test_all_responses_of_each_group_are_judged_at_once(judges: Judges) -> None:
    """A call never has a part of a group or responses of two groups: repeats would count otherwise."""
    groups = [group("of_a_group", responses, i) for i, responses in enumerate((["a", "b", "a"], ["a"], ["b", "b"]))]
    assert verdicts(judges, *groups) == [[WRONG, RIGHT, WRONG], [RIGHT], [WRONG, WRONG]]


def test_a_groups_verifier_loses_single_verdicts_and_those_of_one_call(
    judges: Judges, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[int] = []
    judges.answered = lambda: told.append(1)
    groups = [group("of_a_group", each, i) for i, each in enumerate((["a", "x"], ["wait", "a"], ["few", "a"], ["b"]))]
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert verdicts(judges, *groups) == [[RIGHT, LOST], [LOST, LOST], [LOST, LOST], [RIGHT]]
    assert time.monotonic() - begun < 15
    assert len(told) == 4
    for said in ("q:0' sample 1: expected a Verdict", "q:1' sample 0: took over 2 s", "5 of 7 answers"):
        assert said in caplog.text
    assert verdicts(judges, group("of_a_group", ["a", "b"])) == [[RIGHT, RIGHT]]


# ---- data


def read(source: Path, verifier: str | None) -> PromptDataset:
    return load_prompts(
        str(source), Fields("prompt", "answer", verifier), make_tokenizer(), 99, judges=lambda: Judges(1)
    )


def test_prompts_keep_their_record_only_if_the_verifier_asks_for_it(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    row = {"prompt": "1+1=", "answer": "2", "scores": {"a": 0.5, "b": -1.0}, "level": 3}
    pq.write_table(pa.Table.from_pylist([row]), file)
    prompt = read(file, "verifier_examples:by_record")[0]
    assert prompt.record == row
    assert prompt.token_ids
    for other in (None, "verifier_examples:shaped"):
        assert read(file, other)[0].record is None


def test_a_record_needs_no_reference_if_the_verifier_asks_for_the_whole(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(orjson.dumps({"prompt": "1+1=", **SCORES}) + b"\n")
    assert read(file, "verifier_examples:by_record")[0].answer == ""
    with pytest.raises(DataError, match="no field 'answer'"):
        read(file, "verifier_examples:shaped")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("text", "expected a Verdict, a number, True or False, got str; it must judge any text"),
        ("by_record", "KeyError: 'x' ({support}/verifier_examples.py, line {line}); it must judge any text"),
    ],
)
def test_a_verifier_without_a_verdict_on_a_reference_is_refused(judges: Judges, function: str, told: str) -> None:
    prompt = Prompt("q", "?", (), "x", f"verifier_examples:{function}", SCORES)
    with pytest.raises(RewardError, match=r"^data\.verifier: verifier 'verifier_examples:.*prompt 'q'") as caught:
        try_verifier(judges, prompt)
    line = inspect.getsourcelines(verifier_examples.by_record)[1] + 2
    assert told.format(support=SUPPORT, line=line) in str(caught.value)


def test_a_verifier_with_a_verdict_passes_its_trial(judges: Judges) -> None:
    prompt = Prompt("q", "?", (), "b", "verifier_examples:by_record", SCORES)
    assert try_verifier(judges, prompt) == Verdict(-1.0, False)
    assert try_verifier(judges, Prompt("q", "?", (), "#", "math")) is None


# ---- modules

ASK = """
import sys
from megatron_rl.data.sample import Prompt
from megatron_rl.objectives.custom import get_objective
from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.environments.env import get_env
from megatron_rl.rewards import Judges
from megatron_rl.rewards.judges import ResponseTask

with Judges(workers=1) as judges:
    print(judges.judge("mine:judge", [ResponseTask(Prompt("q", "", (), "", "mine:judge"), "abc")])[0].reward)
get_objective(ObjectiveConfig(custom="mine:loss"))
print(get_env("mine:Env").__name__, sys.path[-1])
"""
MINE = """
def judge(response):
    import helper
    return helper.score(response)

def loss(inputs, config, denominators): ...

class Env:
    def reset(self, prompt): ...
    def step(self, message): ...
"""


def test_own_modules_are_found_in_the_working_directory_after_all_others(tmp_path: Path) -> None:
    """The directory has a module of Python's own name, as the directory of a script that is started has not."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helper.py").write_text("def score(response): return len(response)\n")
    (tmp_path / "queue.py").write_text("raise SystemExit('not the one that was meant')\n")
    done = subprocess.run([sys.executable, "-P", "-c", ASK], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"3.0\nEnv {tmp_path}\n", done.stderr
