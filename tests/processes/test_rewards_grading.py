"""Verifiers, the processes that run them, and the grading of groups."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading

import psutil
import pytest

from megatron_rl.data.gym_task import GymTask
from megatron_rl.data.sample import LOST, Group, Prompt, Sample, Verdict
from megatron_rl.rewards import Judges, RewardError, get_verifier, grade
from megatron_rl.rewards.arithmetic import verify_arithmetic
from megatron_rl.rewards.math import verify_math

RESPONSES = ("a", "b", "c")


def group(verifier: str, answer: str = "a", responses: tuple[str, ...] = RESPONSES, index: int = 0) -> Group:
    """Makes a group; response token i means responses[i], and `decode` below reverses that."""
    prompt = Prompt(f"q:{index}", "?", (7, 7), answer, verifier)
    samples = [Sample.start(prompt, i).extend([i], [-1.0], 0) for i in range(len(responses))]
    return Group(index, prompt, tuple(samples))


def decode(ids: list[int]) -> str:
    return "".join(RESPONSES[i] for i in ids)


def verdicts(groups: list[Group]) -> list[list[Verdict | None]]:
    return [[sample.verdict for sample in g.samples] for g in groups]


@pytest.fixture(scope="module")
def judges():
    with Judges(workers=2) as pool:
        yield pool


def test_the_verdict_of_an_environment_stands_and_the_last_turn_is_judged_without_one():
    first, second = group("arithmetic", responses=("a", "b")).samples
    told = dataclasses.replace(first, verdict=Verdict(0.5, False))
    spoken = second.extend([0], None, 0).extend([1], [-1.0], 0)
    (judged,) = grade([Group(0, first.prompt, (told, spoken))], lambda ids: "#" + "#".join(map(str, ids)))
    assert [sample.verdict for sample in judged.samples] == [Verdict(0.5, False), Verdict(0.0, False)]
    right = dataclasses.replace(spoken, prompt=dataclasses.replace(spoken.prompt, answer="1"))
    (judged,) = grade([Group(0, right.prompt, (right,))], lambda ids: "#" + "#".join(map(str, ids)))
    assert judged.samples[0].verdict == Verdict(1.0, True)
    assert judged.samples[0].response == "#1#0#1"


def test_a_worker_judges_problems_of_reasoning_gym(judges):
    pytest.importorskip("reasoning_gym", reason="its dependency pycosat needs a C compiler (requirements/gym.txt)")
    spec = "reasoning-gym:basic_arithmetic,size=2"
    question, answer = next(GymTask.parse(spec).problems())
    prompt = Prompt(f"{spec}:0", question, (7,), answer, "reasoning-gym")
    samples = tuple(Sample.start(prompt, n).extend([n], [-1.0], 0) for n in range(2))
    (judged,) = grade([Group(0, prompt, samples)], lambda ids: ["no", answer][ids[0]], judges)
    assert [sample.verdict and sample.verdict.correct for sample in judged.samples] == [False, True]


# ---- verifiers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("3+5=8#8", True),
        ("nonsense#8", True),  # the steps are not graded
        ("3+5=8#80", False),
        ("3+5=8#08", False),
        ("3+5=8#8 ", False),
        ("3+5=8#7#8", False),  # one answer, not a list of them
        ("3+5=8", False),
        ("", False),
    ],
)
def test_the_arithmetic_verifier_reads_the_marked_answer(response, correct):
    prompt = Prompt("", "3+5=", (), "8", "arithmetic")
    assert verify_arithmetic(prompt, response) == Verdict(float(correct), correct)


@pytest.mark.parametrize(
    ("answer", "response", "correct"),
    [
        ("72", "so it is \\boxed{72}", True),
        ("72", "so it is 72.", True),
        ("72", "so it is \\boxed{27}", False),
        ("1/2", "we get $\\frac{2}{4}$", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("x^2+1", "$1+x^2$", True),
        ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", True),
        ("$[0, 1)$", "\\boxed{[0,1)}", True),
        ("(1,2)", "\\boxed{(2,1)}", False),
        ("72", "I do not know", False),
        ("72", "\\frac{\\frac{\\frac{", False),
        ("72", "", False),
    ],
)
def test_the_math_verifier_compares_expressions(answer, response, correct):
    assert verify_math(Prompt("", "", (), answer, "math"), response) == Verdict(float(correct), correct)


def test_the_math_verifier_works_outside_the_main_thread():
    """math-verify's own time limit uses signals and works only in the main thread."""
    found = []
    prompt = Prompt("", "", (), "72", "math")
    thread = threading.Thread(target=lambda: found.append(verify_math(prompt, "\\boxed{72}")))
    thread.start()
    thread.join()
    assert found == [Verdict(1.0, True)]


def test_verifiers_are_found_by_name():
    assert get_verifier("arithmetic") is verify_arithmetic
    assert get_verifier("math") is verify_math
    import verifier_examples

    assert get_verifier("verifier_examples:shaped") is verifier_examples.shaped


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "did you mean 'math'?"),
        ("code", "there are arithmetic, math"),
        ("nowhere:check", "No module named 'nowhere'"),
        ("verifier_examples:shapes", "has no attribute 'shapes'"),
        ("verifier_examples:NOT_A_FUNCTION", "expected a function, found int"),
        (":check", "a module, a colon and a name in it are expected"),
    ],
)
def test_the_error_names_a_missing_verifier(name, message, judges):
    for attempt in (lambda: get_verifier(name), lambda: grade([group(name)], decode, judges)):
        with pytest.raises(RewardError) as caught:
            attempt()
        assert repr(name) in str(caught.value)
        assert message in str(caught.value)


# ---- grading -----------------------------------------------------------------------------------------------------


def test_every_sample_gets_its_own_verdict(judges):
    """The groups have three verifiers: one runs in this process, and two in other processes."""
    mine = "verifier_examples:shaped"
    batch = [
        group(mine, "b", index=0),
        group("arithmetic", index=1),
        group(mine, "c", index=2),
        group("math", "1", index=3),
    ]
    graded = grade(batch, decode, judges)
    assert verdicts(graded) == [
        [Verdict(-2.5, False), Verdict(1.0, True), Verdict(-2.5, False)],
        [Verdict(0.0, False)] * 3,
        [Verdict(-2.5, False), Verdict(-2.5, False), Verdict(1.0, True)],
        [Verdict(0.0, False)] * 3,
    ]
    for before, after in zip(batch, graded, strict=True):
        assert (before.index, before.prompt) == (after.index, after.prompt)
        for one, other in zip(before.samples, after.samples, strict=True):
            assert other.token_ids is one.token_ids
    assert verdicts(batch)[0] == [None] * 3


def test_groups_may_differ_in_size_and_there_may_be_none(judges):
    batch = [group("arithmetic", responses=()), group("arithmetic", responses=("a",))]
    assert [len(g.samples) for g in grade(batch, decode, judges)] == [0, 1]
    assert grade([], decode, judges) == []


@pytest.mark.parametrize(
    ("verifier", "lost", "reason"),
    [
        ("verifier_examples:raises", [1], "KeyError: 'unit' ("),
        ("verifier_examples:infinite", [0, 1, 2], "the reward is inf, expected a finite number"),
        ("verifier_examples:not_a_number", [0, 1, 2], "the reward is nan, expected a finite number"),
        ("verifier_examples:text", [0, 1, 2], "expected a Verdict, a number, True or False, got str"),
        ("math", [0, 1, 2], "the reference answer '' cannot be read"),
    ],
)
def test_a_verifier_that_fails_loses_only_that_verdict(judges, caplog, verifier, lost, reason):
    with caplog.at_level(logging.WARNING):
        graded = grade([group(verifier, answer="", index=4)], decode, judges)
    found = verdicts(graded)[0]
    assert [i for i, verdict in enumerate(found) if verdict == LOST] == lost
    assert f"{len(lost)} of 3 answers have no verdict and are left out" in caplog.text
    assert f"prompt 'q:4' sample {lost[0]}: " in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("verifier", "reason"),
    [
        ("verifier_examples:hangs_in_c", "took over 2 s"),
        ("verifier_examples:dies", "its process ended with exit status 3"),
    ],
)
def test_a_verifier_that_hangs_or_dies_loses_only_that_verdict(verifier, reason, caplog):
    with Judges(workers=1, deadline=2.0) as pool, caplog.at_level(logging.WARNING):
        for _ in range(2):  # the worker is started again
            graded = grade([group(verifier, index=5)], decode, pool)
            assert verdicts(graded) == [[Verdict(1.0, True), LOST, Verdict(1.0, True)]]
    assert len(caplog.records) == 2
    assert "1 of 3 answers have no verdict" in caplog.text
    assert f"'q:5' sample 1: {reason}" in caplog.text


def test_grading_is_spread_over_processes_that_end_with_the_pool():
    batch = [group("verifier_examples:whose_process", index=i) for i in range(40)]
    before = set(psutil.Process().children())
    with Judges(workers=3) as pool:
        graded = grade(batch, decode, pool)
        keepers = set(psutil.Process().children()) - before
        started = {worker for keeper in keepers for worker in keeper.children()}
        assert len(started) == len(keepers) == 3
        found = {int(v.reward) for vs in verdicts(graded) for v in vs if v}
        assert found <= {process.pid for process in started}
        assert os.getpid() not in found
    assert not any(process.is_running() for process in started | keepers)


def test_the_arithmetic_verifier_starts_no_process():
    before = psutil.Process().children()
    with Judges() as pool:
        grade([group("arithmetic")], decode, pool)
        assert psutil.Process().children() == before


def test_grading_without_a_pool_creates_a_temporary_one():
    before = psutil.Process().children()
    assert verdicts(grade([group("verifier_examples:shaped")], decode))[0][0] == Verdict(1.0, True)
    assert psutil.Process().children() == before


def test_each_verdict_is_told_as_it_comes():
    told = []
    with Judges(workers=2) as pool:
        pool.answered = lambda: told.append(1)
        grade([group("verifier_examples:shaped", index=i) for i in range(3)], decode, pool)
    assert len(told) >= 3
