"""Signals and time limits that end a run early, and the evaluation that a stopped run still has to make."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl.config.schema import CheckpointConfig, EvalConfig
from megatron_rl.data.prompts import PromptCursor
from megatron_rl.loop import evaluator as evaluator_module
from megatron_rl.loop.evaluator import Evaluator
from megatron_rl.loop.progress import Progress
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.stop import ECHO_SECONDS, SIGNALS, Clock, Interrupted, Signals, Stopped


@pytest.fixture
def signals() -> Iterator[Signals]:
    caught = Signals(tells=False)
    caught.catch()
    yield caught
    caught.release()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_recorded(signals: Signals, number: signal.Signals) -> None:
    assert signals.received == ""
    os.kill(os.getpid(), number)
    assert signals.received == number.name


def test_signal_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    caught = Signals(tells=False)
    caught.catch()
    caught.release()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    """A shell ignores signals for its background jobs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        caught = Signals(tells=False)
        caught.catch()
        os.kill(os.getpid(), signal.SIGINT)
        assert caught.received == ""
        caught.release()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_counts_only_after_the_echo_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    caught = Signals(tells=False, clock=lambda: now[0])
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _pid, number: killed.append(number))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    caught._handle(signal.SIGTERM, None)
    now[0] = ECHO_SECONDS
    caught._handle(signal.SIGTERM, None)
    assert not killed
    now[0] = ECHO_SECONDS + 0.1
    caught._handle(signal.SIGINT, None)
    assert killed == [signal.SIGINT]


def test_the_first_signal_says_what_will_happen(capfd: pytest.CaptureFixture[str]) -> None:
    caught = Signals(tells=True)
    caught._handle(signal.SIGTERM, None)
    assert "SIGTERM: the run stops at the end of this step, with a checkpoint" in capfd.readouterr().err


def test_a_signal_ends_a_wait_and_cancels_its_task(signals: Signals) -> None:
    loop = BackgroundLoop()
    cancelled = threading.Event()

    async def rollout() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    start = time.monotonic()
    with pytest.raises(Interrupted), signals.interrupt():
        loop.run(rollout())
    assert time.monotonic() - start < 30
    assert cancelled.wait(10)
    with pytest.raises(Interrupted), signals.interrupt():
        raise AssertionError("a wait that begins after the signal")
    os.kill(os.getpid(), signal.SIGTERM)  # without a wait nothing is raised
    loop.close()


def test_a_checkpoint_is_due_after_the_configured_minutes() -> None:
    now = [0.0]
    clock = Clock(checkpoint_minutes=2.0, max_minutes=None, clock=lambda: now[0])
    now[0] = 500.0  # the start took long
    clock.begin()
    assert not clock.checkpoint_due
    now[0] += 119
    clock.step_done()
    assert not clock.checkpoint_due
    now[0] += 1
    assert clock.checkpoint_due
    clock.saved()
    assert not clock.checkpoint_due
    assert not clock.time_up


def test_a_run_with_default_settings_saves_every_half_hour() -> None:
    """A crash then loses at most half an hour, not the whole run."""
    now = [0.0]
    clock = Clock(CheckpointConfig().minutes, None, clock=lambda: now[0])
    clock.begin()
    now[0] = 29 * 60.0
    assert not clock.checkpoint_due
    now[0] = 31 * 60.0
    assert clock.checkpoint_due


def test_time_is_up_if_the_next_step_would_end_too_late() -> None:
    now = [0.0]
    clock = Clock(checkpoint_minutes=None, max_minutes=10.0, clock=lambda: now[0])
    now[0] = 100.0  # the start counts too, as a job's time limit includes it
    clock.begin()
    for end, up in ((200.0, False), (350.0, False), (440.0, False), (500.0, True)):
        now[0] = end
        clock.step_done()
        assert clock.time_up is up, end  # the longest step took 150 s
    assert not clock.checkpoint_due


@pytest.mark.parametrize("moment", ["before", "during", "never"])
def test_an_evaluation_that_a_stop_prevents_is_recorded_as_owed(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint records it, so that the resumed run makes the evaluation."""
    trainer: Any = SimpleNamespace(watch=SimpleNamespace(stopping="SIGTERM" if moment == "before" else ""))
    evaluator = Evaluator(EvalConfig(), trainer, None, None)
    progress = Progress(4, 8, PromptCursor(0))

    def evaluate(step: int) -> None:
        assert moment != "before"
        assert step == 4
        if moment == "during":
            raise Interrupted

    monkeypatch.setattr(evaluator, "_evaluate", evaluate)
    evaluator.evaluate(progress)
    assert progress.state.evaluated is (moment == "never")
    again = Progress.of(progress.state, steps=8, seed=1)
    assert again == progress


@pytest.mark.parametrize("owes", [True, False])
def test_a_missing_evaluation_after_the_last_step_is_reported(owes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluator_module, "broadcast_bytes", lambda data, _: data)
    trainer: Any = SimpleNamespace(place=SimpleNamespace(control=None))
    progress = Progress(8, 8, PromptCursor(0), owes_evaluation=owes)
    with pytest.raises(Stopped, match="--resume makes it") if owes else contextlib.nullcontext():
        Evaluator(EvalConfig(), trainer, None, None).check_made(progress)


def test_a_signal_delivered_to_another_thread_also_ends_the_wait() -> None:
    loop, signals = BackgroundLoop(), Signals(tells=False)
    ends = []

    async def wait_long() -> None:
        try:
            await asyncio.sleep(20)
            ends.append("finished")
        finally:
            ends.append("cleaned up")

    def deliver() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    signals.catch()
    threading.Thread(target=deliver).start()
    try:
        with pytest.raises(Interrupted), signals.interrupt():
            loop.run(wait_long())
    finally:
        signals.release()
        loop.close()
    assert signals.received == "SIGTERM"
    assert ends == ["cleaned up"]
