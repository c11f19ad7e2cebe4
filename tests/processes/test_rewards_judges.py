"""Verifier workers as real processes: a failing verifier loses only its verdict, no worker survives the trainer, and no
secret reaches a worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rl.config.schema import Config, RewardConfig
from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.ranks.world import WorldError
from megatron_rl.rewards import Judges, RewardError, check_verifier
from megatron_rl.rewards.channel import Channel
from megatron_rl.rewards.judges import Failure, ResponseTask, default_workers, worker_environment

RIGHT = Verdict(1.0, True)


def ask(judges: Judges, function: str, answer: str = "", responses: str = "abc") -> list[Verdict | Failure]:
    name = f"verifier_examples:{function}"
    return judges.judge(name, [ResponseTask(Prompt("q", "?", (7,), answer, name), response) for response in responses])


@pytest.fixture(scope="module")
def judges() -> Iterator[Judges]:
    with Judges(workers=1, deadline=3.0, memory_mib=1024) as pool:
        yield pool


def reason(found: list[Verdict | Failure]) -> str:
    """Returns the reason of the middle verdict's failure; the other verdicts are right."""
    assert (found[0], found[2]) == (RIGHT, RIGHT)
    assert isinstance(found[1], Failure), found[1]
    return found[1].reason


# ---- failing verifiers


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RecursionError", "RecursionError: a reason"),
        ("MemoryError", "MemoryError: a reason"),
        ("SystemExit", "SystemExit: a reason"),
        ("KeyboardInterrupt", "KeyboardInterrupt: a reason"),
        ("GeneratorExit", "GeneratorExit: a reason"),
        ("Unprintable", "Unprintable"),
    ],
)
def test_any_exception_of_a_verifier_loses_only_that_verdict(judges: Judges, kind: str, said: str) -> None:
    told, _, place = reason(ask(judges, "raises_what_it_is_told", kind)).partition(" (")
    assert told == said
    assert re.fullmatch(r".*/verifier_examples\.py, line \d+\)", place)


def test_endless_recursion_in_a_verifier_loses_only_that_verdict(judges: Judges) -> None:
    assert reason(ask(judges, "recurses")).startswith("RecursionError: maximum recursion depth exceeded")


def test_a_verifier_cannot_exceed_its_memory_limit(judges: Judges) -> None:
    """The verifier allocates 1 GiB; without the limit this succeeds."""
    assert reason(ask(judges, "hogs")).startswith("MemoryError")
    with Judges(workers=1, deadline=60.0) as unbounded:
        assert ask(unbounded, "hogs") == [RIGHT] * 3


@pytest.mark.parametrize(
    ("function", "said"),
    [("closes_descriptors", "its connection is closed"), ("stops", "took over 3 s")],
)
def test_a_silent_worker_is_killed(judges: Judges, function: str, said: str) -> None:
    before = family()
    start = time.monotonic()
    assert reason(ask(judges, function)) == said
    assert time.monotonic() - start < 30
    assert wait_for(lambda: len(family() - before) == 2)  # a keeper and the new worker


@pytest.mark.parametrize("function", ["writes_to_every_descriptor", "forges_a_reply"])
def test_output_of_a_verifier_is_never_read_as_a_verdict(judges: Judges, function: str, capfd) -> None:
    found = ask(judges, function, responses="aba")
    assert "that is no" in reason(found)
    assert "reward" not in capfd.readouterr().out


def test_a_worker_imports_no_torch(judges: Judges) -> None:
    assert ask(judges, "sees_modules", responses="a") == [Verdict(0.0, True)]


def test_a_long_response_reaches_the_verifier_complete(judges: Judges) -> None:
    assert judges.judge(
        "verifier_examples:is_slow_to_read", [ResponseTask(Prompt("q", "?", (), "", "v"), "é" * 3_000_000)]
    ) == [Verdict(3_000_000.0, True)]


def test_sending_and_receiving_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    send, receive, left = Channel.send, Channel.receive, []

    def sends_slowly(self: Channel, message: dict[str, Any], seconds: float | None = None) -> None:
        time.sleep(1.5)
        send(self, message, seconds)

    def receives(self: Channel, seconds: float | None = None) -> dict[str, Any]:
        left.append(seconds)
        return receive(self, seconds)

    with Judges(workers=1, deadline=2.0) as pool:
        pool.asked_by("verifier_examples:stops")
        monkeypatch.setattr(Channel, "send", sends_slowly)
        monkeypatch.setattr(Channel, "receive", receives)
        assert ask(pool, "stops", responses="b") == [Failure("took over 2 s", silent=True)]
    assert left[0] is not None
    assert left[0] < 0.6


def test_workers_do_not_import_modules_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit('not the one that was meant')\n")
    monkeypatch.chdir(tmp_path)
    with Judges(workers=1) as pool:
        assert ask(pool, "sees_modules", responses="a") == [Verdict(0.0, True)]
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert worker_environment()["PYTHONPATH"] == f"{tmp_path}{os.pathsep}/elsewhere"


def test_workers_see_gpus_only_if_the_configuration_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for environment, seen in (((), ""), (("CUDA_VISIBLE_DEVICES",), "3")):
        with Judges(workers=1, environment=environment) as pool:
            (found,) = ask(pool, "sees_gpus", responses="a")
        assert isinstance(found, Failure)
        assert found.reason.startswith(f"RuntimeError: {seen} (" if seen else "RuntimeError (")


# ---- secrets


def test_workers_see_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "a-secret")
    monkeypatch.setenv("SANDBOX_URL", "http://sandbox")
    with Judges(workers=1, environment=("SANDBOX_URL", "NOT_SET")) as judges:
        (found,) = ask(judges, "sees_environment", responses="a")
    assert isinstance(found, Failure)
    assert "SANDBOX_URL" in found.reason
    assert "PATH" in found.reason
    assert "a-secret" not in str(worker_environment())
    assert "MY_API_KEY" not in found.reason
    extra = {name for name in worker_environment() if name not in os.environ}
    assert extra <= {"CUDA_VISIBLE_DEVICES", "PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"}


# ---- the trainer's end

PARENT = """
import os, sys, time
from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.judges import ResponseTask, Judges

judges = Judges(workers=1, deadline=600.0)
verifier = "verifier_examples:" + sys.argv[1]
answers = [ResponseTask(Prompt("q", "", (), sys.argv[2], verifier), response) for response in "ab"]
judges.judge(verifier, answers[:1])
print("ready", flush=True)
judges.judge(verifier, answers[1:])
"""


def family() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def marked(mark: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


def wait_for(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("function", ["hangs_in_c", "stops", "stops_with_child"])
def test_no_worker_survives_a_killed_trainer(function: str) -> None:
    """The worker computes in C, is suspended, or has a child in its own session."""
    mark = f"mark-{os.getpid()}-{function}"
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, function, mark], env=path, stdout=subprocess.PIPE)
    started: set[psutil.Process] = set()
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        trainer = psutil.Process(parent.pid)
        if function == "hangs_in_c":
            worker = trainer.children()[0].children()[0]
            begun = worker.cpu_times().user
            assert wait_for(lambda: worker.cpu_times().user > begun + 0.3)
        else:
            stopped = psutil.STATUS_STOPPED
            assert wait_for(lambda: any(p.status() == stopped for p in trainer.children(recursive=True)))
        started = {*trainer.children(recursive=True), *(p for p in marked(mark) if p != trainer)}
        assert len(started) >= (4 if function == "stops_with_child" else 2)
        parent.kill()
        parent.communicate()
        assert wait_for(lambda: not any(p.is_running() for p in started)), started
        assert marked(mark) == []
    finally:
        parent.kill()
        for process in started:
            if process.is_running():
                process.kill()


def test_closing_the_pool_leaves_no_process() -> None:
    before = family()
    with Judges(workers=2) as judges:
        ask(judges, "stops_with_child", f"mark-{os.getpid()}-close", "aaaa")
        assert len(family() - before) >= 4
    assert family() == before
    assert marked(f"mark-{os.getpid()}-close") == []


# ---- start-up


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:check", "No module named 'nowhere'"),
        ("maht", "did you mean 'math'?"),
        ("verifier_examples:shapes", "has no attribute 'shapes'"),
        ("verifier_examples:NOT_A_FUNCTION", "expected a function, found int"),
        ("verifier_examples:with_other_names", "found the parameters (question, answer), expected prompt or"),
        ("verifier_broken:check", "NameError: name 'undefined' is not defined"),
        ("verifier_exits:check", "SystemExit"),
    ],
)
def test_the_error_for_a_verifier_that_does_not_start_names_its_key(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "verifier_broken.py").write_text("undefined\n")
    (tmp_path / "verifier_exits.py").write_text("import sys\nsys.exit('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=r"^data\.verifier: ") as caught:
        check_verifier(config_of(name))
    assert said in str(caught.value)
    assert repr(name) in str(caught.value)


def test_checking_a_built_in_verifier_starts_no_process() -> None:
    before = family()
    check_verifier(config_of("math"))
    check_verifier(config_of("nowhere:check", replay_from="/run"))
    assert family() == before


def config_of(verifier: str, **rollout: str) -> Config:
    sections = {"model": {"path": "/model"}, "train": {"steps": 1}, "rollout": rollout}
    return Config.model_validate({"run_dir": "/run", "data": {"train": "/data", "verifier": verifier}, **sections})


def test_the_configuration_sets_workers_timeout_and_memory() -> None:
    config = RewardConfig(workers=3, timeout=4.5, memory_mib=None, environment=("A",))
    judges = Judges.of(config)
    assert (judges._workers, judges._deadline, judges._memory_mib) == (3, 4.5, 0)
    assert 1 <= default_workers() <= 16
    assert Judges.of(RewardConfig())._workers == default_workers()


def test_the_default_number_of_workers_is_divided_among_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rl.rewards.judges.usable_cores", lambda: 64)
    assert default_workers() == 16
    monkeypatch.setenv("WORLD_SIZE", "128")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "128")
    assert default_workers() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(WorldError, match="LOCAL_WORLD_SIZE is '0'"):
        default_workers()
