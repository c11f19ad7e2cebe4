"""The owner of a run directory: kept while it lives, replaced if it is dead; one of several processes wins."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rl.lab import owner
from megatron_rl.lab.owner import SILENT_SECONDS, Owner, OwnerError

ELSEWHERE = {"host": "node-7", "machine": "another boot pid:[1]", "pid": 4, "started": 5.0, "since": 6.0}


def say(directory: Path, content: dict[str, object], age: float = 0.0, number: int = 1) -> Path:
    file = directory / f"owner-{number:06d}.json"
    file.write_text(json.dumps(content))
    os.utime(file, (time.time() - age,) * 2)
    return file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def never(_: float) -> None:
    raise AssertionError("waited")


def test_the_error_names_a_living_owner(tmp_path: Path) -> None:
    held = Owner.take(tmp_path)
    with pytest.raises(OwnerError, match=rf"{tmp_path} is in use by process {os.getpid()} on .*, which began at 20"):
        Owner.take(tmp_path, sleep=never)
    assert names(tmp_path) == ["owner-000001.json"]
    held.release()
    again = Owner.take(tmp_path, sleep=never)
    assert names(tmp_path) == ["owner-000001.json", "owner-000002.json"]
    again.settle()
    assert names(tmp_path) == ["owner-000002.json"]
    again.release()


def test_an_owner_that_withdraws_leaves_no_trace(tmp_path: Path) -> None:
    Owner.take(tmp_path).release()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    Owner.take(tmp_path).withdraw()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_dead_process_on_this_machine_is_not_an_owner(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from megatron_rl.lab.owner import Owner; Owner.take(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", f"{code}; import os; os._exit(9)"], check=False)
    (file,) = tmp_path.iterdir()
    assert "ended" not in json.loads(file.read_text())
    Owner.take(tmp_path, sleep=never).release()


def test_another_process_with_the_same_pid_is_not_the_owner(tmp_path: Path) -> None:
    mine = owner._myself()
    say(tmp_path, {**mine, "started": mine["started"] - 60})
    Owner.take(tmp_path, sleep=never).release()


def test_a_recent_heartbeat_keeps_an_owner_on_another_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = say(tmp_path, ELSEWHERE, age=SILENT_SECONDS - 60)
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.utime(file)

    with pytest.raises(OwnerError, match="in use by process 4 on node-7, which began at 1970-01-01 00:00:06 UTC"):
        Owner.take(tmp_path, sleep=sleep)
    assert "waiting up to 60 s for a sign of life" in capsys.readouterr().out
    assert len(waits) == 3
    assert names(tmp_path) == ["owner-000001.json"]

    os.utime(file, (time.time() - SILENT_SECONDS - 1,) * 2)
    Owner.take(tmp_path, sleep=never).release()


def test_a_silent_owner_on_another_machine_is_replaced_after_a_wait(tmp_path: Path) -> None:
    file = say(tmp_path, ELSEWHERE)
    seen = file.stat().st_mtime
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        real = os.utime
        # Time passes, and the owner sends no heartbeat.
        owner.os.utime = lambda path, *_: real(path, (seen + len(waited) * 61,) * 2)

    utime = os.utime
    try:
        Owner.take(tmp_path, sleep=sleep).release()
    finally:
        owner.os.utime = utime
    assert len(waited) == 3


def test_the_owner_updates_its_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    held = Owner.take(tmp_path)
    (file,) = tmp_path.iterdir()
    os.utime(file, (1.0, 1.0))
    deadline = time.monotonic() + 10
    while file.stat().st_mtime == 1.0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()


def test_an_owner_that_was_replaced_gets_an_error(tmp_path: Path) -> None:
    held = Owner.take(tmp_path)
    held.check()
    taker = say(tmp_path, ELSEWHERE, number=2)
    with pytest.raises(OwnerError, match="belongs to process 4 on node-7"):
        held.check()
    content = taker.read_text()
    held.release()
    assert taker.read_text() == content


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"pid": "x"}', b'{"since": 1e300, "pid": 1, "host": 3}', b"\xff"]
)
def test_a_damaged_owner_file_is_judged_by_its_age(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "owner-000001.json"
    file.write_bytes(content)
    os.utime(file, (time.time() - SILENT_SECONDS - 1,) * 2)
    Owner.take(tmp_path, sleep=never).release()

    file = tmp_path / "owner-000009.json"
    file.write_bytes(content)
    with pytest.raises(OwnerError, match="in use by a process that its owner file does not name"):
        Owner.take(tmp_path, sleep=lambda _: os.utime(file, (1.0, 1.0)))


def take(directory: str, start: float, results: multiprocessing.Queue) -> None:
    time.sleep(max(0.0, start - time.time()))
    try:
        held = Owner.take(Path(directory), sleep=never)
        held.settle()
        results.put("won")
        time.sleep(60)
    except OwnerError:
        results.put("refused")


@pytest.mark.parametrize("dead", [False, True])
def test_only_one_of_several_processes_becomes_the_owner(tmp_path: Path, dead: bool) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(6):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        if dead:
            say(directory, ELSEWHERE, age=SILENT_SECONDS + 1)
        results = context.Queue()
        start = time.time() + 0.05
        takers = [context.Process(target=take, args=(str(directory), start, results)) for _ in range(4)]
        for taker in takers:
            taker.start()
        answers = sorted(results.get(timeout=30) for _ in takers)
        for taker in takers:
            taker.kill()
            taker.join()
        assert answers == [*["refused"] * 3, "won"], answers
