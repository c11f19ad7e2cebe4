"""The console: plain lines without a terminal, a live display on one, and nothing on other ranks than 0."""

import io
import os
import re
import threading
import time

import pytest

from megatron_rl.lab.console import Console
from megatron_rl.lab.journal import Journal
from megatron_rl.lab.sinks import Line
from megatron_rl.lab.timer import PhaseTimer


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def read_terminal(leader: int) -> bytes:
    """Returns the terminal's next bytes, or b"" once its other side is closed, which Linux reports as an error."""
    try:
        return os.read(leader, 4096)
    except OSError:
        return b""


def a_step(console: Console, step: int, journal: Journal | None = None, **more: float | None) -> None:
    """Shows a step with the seconds of the journal's phases."""
    values = {"rollout/reward/mean": 0.25, "rollout/accuracy": 0.5, "throughput/tokens_per_second": 2091.4, **more}
    times = journal.timer.drain() if journal else {}
    console.write(Line("steps", {"step": step, "weight_version": step - 1}, 0.0, values | times, step))


def evaluated(console: Console, step: int, accuracy: float) -> None:
    console.write(Line("eval", {"step": step, "weight_version": step}, 0.0, {"avg_at_k": accuracy}, step))


def test_timer_sums_a_phase_until_drain_resets_it() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    for seconds in (1.0, 2.5):
        with timer.phase("update"):
            clock.now += seconds
    with timer.phase("eval"):
        clock.now += 4.0
    assert timer.drain() == {"time/update": 3.5, "time/eval": 4.0}
    assert timer.drain() == {}


def test_timer_takes_one_phase_and_drains_the_others() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    for name in ("update", "evaluation", "evaluation"):
        with timer.phase(name):
            clock.now += 3.0
    assert timer.take("evaluation") == {"time/evaluation": 6.0}
    assert timer.drain() == {"time/update": 3.0}


def test_timer_counts_a_phase_that_raises() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)

    def fail() -> None:
        with timer.phase("rollout"):
            clock.now += 2.0
            raise RuntimeError("server is gone")

    with pytest.raises(RuntimeError, match="server is gone"):
        fail()
    assert timer.drain() == {"time/rollout": 2.0}


def test_timer_counts_an_inner_phase_in_both() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("outer"):
        clock.now += 1.0
        with timer.phase("inner"):
            clock.now += 2.0
    assert timer.drain() == {"time/inner": 2.0, "time/outer": 3.0}


def test_timer_uses_a_real_clock_unless_given_one() -> None:
    timer = PhaseTimer()
    with timer.phase("sleep"):
        time.sleep(0.02)
    assert 0.02 <= timer.drain()["time/sleep"] < 5


def test_without_a_terminal_each_step_prints_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # many CI services set it
    clock, out = Clock(), io.StringIO()
    with Console(4, file=out, clock=clock) as console:
        journal = Journal(console, clock)
        for step in (1, 2):
            with journal.phase("rollout"):
                clock.now += 30.0
            with journal.phase("update [gspo]"):
                clock.now += 60.0
            a_step(console, step, journal)
        evaluated(console, 2, 0.125)
        a_step(console, 3)
    first, second, heldout, third = out.getvalue().splitlines()
    assert first == (
        "step 1/4  reward 0.250  accuracy 0.500  tokens/s 2091  rollout 30.00s  update [gspo] 60.00s  left 0:04:30"
    )
    assert second.endswith("left 0:03:00")
    assert heldout == "after step 2  held-out accuracy 0.125"
    assert "held-out accuracy 0.125" in third
    assert "\x1b" not in out.getvalue()


def test_start_up_prints_what_is_loaded_and_how_long_it_took() -> None:
    clock, out = Clock(), io.StringIO()
    with Console(4, file=out, clock=clock) as console:
        with console.starting("engine", "/models/[tiny] in fp32"):
            clock.now += 75.0
        clock.now += 2.0
        a_step(console, 1)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["engine: /models/[tiny] in fp32", "engine: ready after 75.0 s"]
    assert lines[2].endswith("left 0:00:06")  # the start does not count as a step


def test_a_failed_start_is_not_reported_as_ready() -> None:
    out = io.StringIO()
    with Console(4, file=out) as console, pytest.raises(OSError), console.starting("data", "prompts"):  # noqa: PT011
        raise OSError
    assert out.getvalue() == "data: prompts\n"


def test_long_plain_lines_are_not_wrapped() -> None:
    out = io.StringIO()
    with Console(4, file=out) as console:
        journal = Journal(console)
        for i in range(30):
            with journal.phase(f"phase number {i}"):
                pass
        a_step(console, 1, journal)
    assert len(out.getvalue().splitlines()) == 1


def test_time_left_is_estimated_from_the_latest_steps_after_a_resume() -> None:
    clock, out = Clock(), io.StringIO()
    with Console(100, file=out, clock=clock) as console:
        for step, seconds in enumerate([1000.0] + [1.0] * 20, start=51):
            clock.now += seconds
            a_step(console, step)
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("left 13:36:40")  # 49 steps at 1000 s
    assert lines[-1].startswith("step 71/100")
    assert lines[-1].endswith("left 0:00:29")  # the slow first step has left the window


def test_other_ranks_than_0_measure_time_but_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock, out = Clock(), io.StringIO()
    with Console(2, shows=False, file=out, clock=clock) as console:
        journal = Journal(console, clock)
        with journal.phase("update"):
            clock.now += 1.5
        assert journal.timer.drain() == {"time/update": 1.5}
        a_step(console, 1)
        evaluated(console, 1, 0.5)
    assert out.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_the_console_draws_bar_metrics_and_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "40")
    leader, follower = os.openpty()
    chunks: list[bytes] = []
    reader = threading.Thread(target=lambda: chunks.extend(iter(lambda: read_terminal(leader), b"")), daemon=True)
    reader.start()
    clock = Clock()
    with open(follower, "w") as out, Console(4, file=out, clock=clock) as console:
        journal = Journal(console, clock)
        with journal.phase("rollout"):
            clock.now += 30.0
        with journal.phase("weight sync"):
            clock.now += 10.0
        a_step(console, 1, journal)
        evaluated(console, 1, 0.125)
        with journal.phase("checkpoint"):
            deadline = time.monotonic() + 20
            while b"now checkpoint" not in b"".join(chunks) and time.monotonic() < deadline:
                time.sleep(0.05)
    reader.join(timeout=10)
    os.close(leader)
    screen = b"".join(chunks).decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen)
    for shown in ("step 1/4", "left 0:02:00", "now checkpoint"):
        assert shown in text
    for label, figure in (("reward", "0.250"), ("held-out accuracy [(]1[)]", "0.125"), ("tokens/s", "2091")):
        assert re.search(rf"{label} +{figure}", text)
    assert re.search(r"rollout +30\.00 s +75%", text)
    assert re.search(r"weight sync +10\.00 s +25%", text)
    assert screen.rstrip().endswith("\x1b[?25h"), "the cursor was not given back"
