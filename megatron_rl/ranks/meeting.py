"""Sends messages and reports between ranks before process groups exist, through the launcher's TCPStore."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from megatron_rl.errors import UserError
from megatron_rl.ranks.world import World

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

START_SECONDS = 600.0
"""Seconds that a rank that can start waits for the others."""
ANSWER_SECONDS = 10.0
"""Seconds that rank 0 waits for the other ranks once one has failed. A failed rank waits twice as long."""


class LostError(UserError):
    """Rank 0 or the store of messages cannot be reached."""


class LaunchError(UserError):
    """The run cannot start, or every rank ends for the same reason. Call `told` after its text has been printed."""

    def __init__(self, text: str, tellers: Sequence[int], meeting: Meeting, seconds: float = ANSWER_SECONDS) -> None:
        """`text` is what this rank prints, "" for nothing; `tellers` are the ranks that print, within `seconds`."""
        super().__init__(text)
        self.text = text
        self._tellers = tellers
        self._meeting = meeting
        self._seconds = seconds

    def told(self) -> None:
        """Waits until every teller has printed: a launcher ends all ranks of a node as soon as one has ended."""
        meeting = self._meeting
        with contextlib.suppress(LostError, TimeoutError):  # a rank that is gone has printed already
            if meeting.world.rank in self._tellers:
                meeting.post(f"told/{meeting.world.rank}", True)
            for rank in self._tellers:
                meeting.read(f"told/{rank}", self._seconds)
            meeting.arrive("end", True)
            if meeting.world.rank == 0:  # its process may hold the messages
                meeting.arrivals("end", ANSWER_SECONDS, until=lambda _: False)


@dataclass(frozen=True)
class Report:
    """A rank's problem, if it cannot start."""

    rank: int
    node: str
    host: str
    problem: str

    @property
    def named(self) -> str:
        return f"rank {self.rank} on host {self.host}: {self.problem}"


class Meeting:
    """This rank's connection to the store of messages. If no launcher made a store, rank 0's object holds it."""

    def __init__(self, world: World, seconds: float) -> None:
        """Raises LostError if the store cannot be reached within `seconds`, or if this rank has already joined."""
        self.world = world
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        keeps = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        where = f"MASTER_ADDR {address}, MASTER_PORT {port}"
        timeout = datetime.timedelta(seconds=ANSWER_SECONDS)
        try:
            if not keeps:
                _await_listener(address, port, seconds)
            from torch.distributed import PrefixStore, TCPStore  # slow to import, so only if there are other ranks

            # Several stores of one process may share a port: torch makes its own there for the process groups.
            store = _interruptibly(
                lambda: TCPStore(address, port, None, keeps, timeout, wait_for_workers=False, multi_tenant=True),
                2 * ANSWER_SECONDS,
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).partition("\n")[0][:200]
            what = "rank 0 cannot listen at" if keeps else "rank 0 cannot be reached at"
            raise LostError(f"{what} {where}: {reason}") from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Store = PrefixStore(f"megatron_rl/{attempt}", store)
        if self._store.add(f"here/{world.rank}", 1) > 1:
            raise LostError(f"RANK is {world.rank}, but another process has it too; give each process its own")

    def post(self, key: str, value: Any) -> None:
        """Raises LostError."""
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError:
            raise self._lost() from None

    def read(self, key: str, seconds: float) -> Any:
        """Waits for the message. Raises TimeoutError, LostError."""

        def wait() -> bytes:
            self._store.wait([key], datetime.timedelta(seconds=max(seconds, 0.01)))
            return self._store.get(key)

        try:
            return json.loads(_interruptibly(wait, seconds + ANSWER_SECONDS))
        except RuntimeError as error:
            if "timeout" in str(error).lower():
                raise TimeoutError from None
            raise self._lost() from None

    def arrive(self, name: str, value: Any) -> None:
        """Sends `value` to rank 0, which reads it by `arrivals`. Raises LostError."""
        try:
            number = self._store.add(f"{name}/count", 1)
        except RuntimeError:
            raise self._lost() from None
        self.post(f"{name}/{number}", value)

    def arrivals(self, name: str, seconds: float, until: Callable[[Any], bool]) -> list[Any]:
        """Returns the values that ranks sent by `arrive`, in order of arrival. Call it on rank 0.

        It waits for all ranks, but at most `seconds`, and at most ANSWER_SECONDS after a value for which `until` is
        true.
        """
        deadline = time.monotonic() + seconds
        values: list[Any] = []
        while len(values) < self.world.size:
            try:
                values.append(self.read(f"{name}/{len(values) + 1}", deadline - time.monotonic()))
            except TimeoutError:
                break
            if until(values[-1]):
                deadline, until = min(deadline, time.monotonic() + ANSWER_SECONDS), lambda _: False
        return values

    def settle(self, name: str, problem: str) -> None:
        """Collects each rank's `problem`, "" for none. Raises LaunchError on all ranks if one has a problem."""
        world = self.world
        mine = Report(world.rank, world.node, world.host, problem)
        self.arrive(name, asdict(mine))
        if world.rank == 0:
            reports = [Report(**r) for r in self.arrivals(name, START_SECONDS, until=lambda r: bool(r["problem"]))]
            texts = verdict({report.rank: report for report in reports}, world.size)
            self.post(f"{name}/verdict", list(texts.items()))
        else:
            try:
                texts = dict(self.read(f"{name}/verdict", 2 * ANSWER_SECONDS if problem else 2 * START_SECONDS))
            except (LostError, TimeoutError):
                text = mine.named if problem else f"{world.me}: {self._lost()}"
                raise LaunchError(text, (world.rank,), self) from None
        if texts:
            raise LaunchError(texts.get(world.rank, ""), tuple(texts), self)

    def _lost(self) -> LostError:
        return LostError("rank 0 has ended; its output says why")


def verdict(reports: Mapping[int, Report], size: int) -> dict[int, str]:
    """Text that each rank prints; empty if all `size` ranks can start.

    A node prints each of its problems once. A node without a problem prints why it ends. The text names the rank
    unless every rank has found the same problem.
    """
    missing = [rank for rank in range(size) if rank not in reports]
    failing = [reports[rank] for rank in sorted(reports) if reports[rank].problem]
    if missing and not failing:
        ranks = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        absent = f"{len(missing)} of {size} ranks have not come within {START_SECONDS:g} s: {ranks}"
        failing = [Report(0, reports[0].node, reports[0].host, absent)]
        reports = {**reports, 0: failing[0]}
    if not failing:
        return {}
    everywhere = not missing and {report.problem for report in reports.values()} == {failing[0].problem}
    texts: dict[int, str] = {}
    for node in {report.node for report in reports.values()}:
        members = sorted((r for r in reports.values() if r.node == node), key=lambda r: r.rank)
        first_with = {r.problem: r for r in reversed(members) if r.problem}
        for problem, report in first_with.items():
            texts[report.rank] = problem if everywhere else report.named
        if not first_with:
            texts[members[0].rank] = f"nothing was started, because of {failing[0].named}"
    return texts


def _await_listener(address: str, port: int, seconds: float) -> None:
    """Waits until something listens there; torch's own failed attempts print pages of stack. Raises OSError."""
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_fixed(0.2),
        retry=tenacity.retry_if_exception_type(OSError),
        reraise=True,
    )
    retrying(lambda: socket.create_connection((address, port), timeout=ANSWER_SECONDS).close())


def _interruptibly(call: Callable[[], T], seconds: float) -> T:
    """Runs `call` in another thread and returns its result. Raises TimeoutError after `seconds`.

    torch ignores signals while it waits, and may try each address of a name for `seconds`.
    """
    done: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            done.put((call(), None))
        except Exception as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = done.get(timeout=max(seconds, 0.01))
    except Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
