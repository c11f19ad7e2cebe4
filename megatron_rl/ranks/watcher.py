"""The process that sends heartbeats for a rank (see megatron_rl.ranks.heartbeat).

    python -m megatron_rl.ranks.watcher        started by a rank, which sends the settings on standard input

It is a process, not a thread, so a busy rank cannot delay it: a kernel of ten minutes, a torch.save, a call that holds
the interpreter's lock. It reports its rank only if the kernel says that the rank is stopped or has ended. It imports
only the standard library (and ranks.stall, which does too) and takes 21 MiB.

The watcher of rank 0, the hub, listens. The others connect with their number and a secret of the run. Each sends one
short line every eighth of the limit, at least every 10 s, and the hub answers with one line. A hub of 1,024 ranks takes
0.7% of a core and 27 MiB. Silence counts only while the counting process runs, so a machine that was suspended wakes
without an alarm.

    rank to watcher     settings as JSON; `note JSON` of what it does (ranks.activity); then `leaving` (an error is on
                        its way up) or `done`; its end is end of file
    watcher to rank     `listening PORT` (hub), `ready`, `failed WHY`; then `lost SECONDS WHY` or `over`
    watcher to hub      `TOKEN RANK`; then `beat STATE [NOTE]`, `ended WORD`, `done`
    hub to watcher      `beat`, `lost SECONDS WHY`, `over`
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.ranks.stall import Stall

END_SECONDS = 10.0
"""Seconds in which a rank must end after it is told of a loss; then it is killed."""
ERROR_SECONDS = 15.0
"""Seconds in which the other ranks may end by themselves after one ended with an error: they may have the same error.

It is well below the 30 seconds after which torchrun kills them, so that the reason is printed.
"""
LINGER_SECONDS = 2.0
HELLO_SECONDS = 10.0
CONNECT_SECONDS = 30.0
LONGEST_LINE = 4096


def interval(limit: float) -> float:
    """Seconds between two lines, if `limit` seconds without one have a meaning."""
    return min(10.0, limit / 8)


@dataclass(frozen=True)
class Settings:
    rank: int
    seconds: float | None  # without a heartbeat until a rank is lost; None: no rank ever is
    host: str
    port: int  # where the hub listens; 0 for the hub itself
    token: str
    members: list[str]  # each rank's name in messages
    stall: float | None = None  # seconds in which nothing moves until the run counts as hung; None: it never does

    @property
    def interval(self) -> float:
        return min(interval(each) for each in (self.seconds, self.stall) if each is not None)


class Watcher:
    """Follows its own rank: the part that the hub and the other watchers share."""

    def __init__(self, settings: Settings, rank_lines: asyncio.StreamReader) -> None:
        self.settings = settings
        self._rank_lines = rank_lines
        self._rank_pid = os.getppid()
        self.last_word = "nothing"  # of the rank
        self.note = ""  # the rank's newest
        self.rank_is_gone = asyncio.Event()  # done, or ended

    async def follow_rank(self) -> None:
        """Returns when the rank is done, or has ended."""
        while self.last_word != "done" and (line := await self._rank_lines.readline()):
            word, _, rest = line.decode().strip().partition(" ")
            if word == "note":
                self.note = rest
            else:
                self.last_word = word
        self.rank_is_gone.set()

    def state(self) -> str:
        """Letter of the rank's state in the kernel; T or t if a signal or a debugger has stopped it."""
        with contextlib.suppress(OSError, IndexError):
            return Path(f"/proc/{self._rank_pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "X"

    async def end_rank(self, seconds: str, why: str) -> None:
        """Tells the rank of a loss and kills it if it does not end in time. A rank that is leaving ends by itself."""
        tell(f"lost {seconds} {why}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.rank_is_gone.wait(), float(seconds) + END_SECONDS)
        if not self.rank_is_gone.is_set() and self.last_word != "leaving":
            os.kill(self._rank_pid, signal.SIGKILL)


class Hub(Watcher):
    """Receives the heartbeats of all ranks, and tells all of them which was lost first."""

    def __init__(self, settings: Settings, rank_lines: asyncio.StreamReader) -> None:
        super().__init__(settings, rank_lines)
        self._silent = dict.fromkeys(range(len(settings.members)), 0.0)
        self._stall = Stall(settings.stall, settings.members)
        self._stopped: set[int] = set()
        self._peers: set[asyncio.StreamWriter] = set()
        self._loss = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        _allow_open_files(len(self.settings.members))
        try:
            server = await asyncio.start_server(self._serve, self.settings.host, 0, limit=LONGEST_LINE, backlog=1024)
        except OSError as error:
            tell(f"failed cannot listen on {self.settings.host}: {error}")
            return
        tell(f"listening {server.sockets[0].getsockname()[1]}")
        tell("ready")
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(self._count())
            following = tasks.create_task(self.follow_rank())
            await asyncio.wait([following, self._loss], return_when=asyncio.FIRST_COMPLETED)
            ticking.cancel()
            if self.last_word == "done":
                self._tell_all("over")
            else:
                if self.rank_is_gone.is_set():
                    self._lose_ended(0, self.last_word)
                seconds, why = self._loss.result()
                self._tell_all(f"lost {seconds} {why}")
                await self.end_rank(seconds, why)
            following.cancel()
        # Unread beats would reset the connections, and the message just sent would be lost.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_have_left(), LINGER_SECONDS)
        for peer in self._peers:
            peer.close()
        await asyncio.sleep(0.05)

    async def _all_have_left(self) -> None:
        while self._peers:
            await asyncio.sleep(0.05)

    async def _count(self) -> None:
        async for passed in ticks(self.settings.interval):
            self._heard(0, self.state(), self.note)
            for rank in self._silent:
                self._silent[rank] += passed
                if self.settings.seconds is not None and self._silent[rank] > self.settings.seconds:
                    self._lose(rank, "0", self._describe(rank))
            if why := self._stall.passed(passed):
                self._end_run("0", why)
            self._tell_all("beat")

    def _heard(self, rank: int, state: str, note: str) -> None:
        if note:
            self._stall.heard(rank, json.loads(note))
        if state in "Tt":
            self._stopped.add(rank)
        elif rank in self._silent:
            self._stopped.discard(rank)
            self._silent[rank] = 0.0

    def _describe(self, rank: int) -> str:
        if rank in self._stopped:
            return f"has been stopped, by a signal or a debugger, for {self._silent[rank]:.0f} s"
        return (
            f"has not been heard from for {self._silent[rank]:.0f} s; its host or its network is gone, or it is stopped"
        )

    def _lose(self, rank: int, seconds: str, how: str) -> None:
        self._end_run(seconds, f"{self.settings.members[rank]} {how}")

    def _end_run(self, seconds: str, why: str) -> None:
        if not self._loss.done():
            self._loss.set_result((seconds, why))

    def _lose_ended(self, rank: int, word: str) -> None:
        if word == "leaving":
            self._lose(rank, f"{ERROR_SECONDS:g}", "has ended with an error, which its output tells")
        else:
            self._lose(rank, "0", "has ended before the others")

    def _tell_all(self, line: str) -> None:
        for peer in self._peers:
            peer.write(f"{line}\n".encode())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                rank = self._known(await reader.readline())
            if rank is not None:
                await self._listen_to(rank, reader, writer)
        except (OSError, TimeoutError, ValueError):
            pass  # a stranger, or a broken connection: its rank connects again, or is missed
        finally:
            self._peers.discard(writer)
            writer.close()

    def _known(self, hello: bytes) -> int | None:
        token, _, rank = hello.strip().partition(b" ")
        if not hmac.compare_digest(token, self.settings.token.encode()) or not rank.isdigit():
            return None
        return int(rank) if int(rank) in self._silent else None

    async def _listen_to(self, rank: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        writer.write(b"beat\n")
        if self._loss.done():
            writer.write("lost {} {}\n".format(*self._loss.result()).encode())
        while line := await reader.readline():
            word, _, rest = line.decode().strip().partition(" ")
            if word == "beat":
                state, _, note = rest.partition(" ")
                self._heard(rank, state, note)
            elif word == "ended":
                self._lose_ended(rank, rest)
            elif word == "done":
                self._silent.pop(rank, None)
                self._stall.done(rank)


class Spoke(Watcher):
    """Sends heartbeats to the hub, and reports a loss if the hub falls silent."""

    def __init__(self, settings: Settings, rank_lines: asyncio.StreamReader) -> None:
        super().__init__(settings, rank_lines)
        self._silent = 0.0
        self._hub: asyncio.StreamWriter | None = None
        self._loss = asyncio.get_running_loop().create_future()  # (seconds, why); None: the run is over

    async def run(self) -> None:
        deadline = asyncio.get_running_loop().time() + CONNECT_SECONDS
        while (hearing := await self._connect()) is None:
            if asyncio.get_running_loop().time() > deadline:
                host, port = self.settings.host, self.settings.port
                tell(f"failed cannot connect to rank 0's heartbeat at {host}:{port} within {CONNECT_SECONDS:g} s")
                return
            await asyncio.sleep(0.2)
        tell("ready")
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._beat(hearing))
            following = tasks.create_task(self.follow_rank())
            await asyncio.wait([following, self._loss], return_when=asyncio.FIRST_COMPLETED)
            beating.cancel()
            if self.rank_is_gone.is_set():
                await self._say("done" if self.last_word == "done" else f"ended {self.last_word}")
            elif (loss := self._loss.result()) is not None:
                await self.end_rank(*loss)
            else:
                tell("over")
            following.cancel()
        if self._hub is not None:
            self._hub.close()

    async def _beat(self, hearing: asyncio.Task[None]) -> None:
        async for passed in ticks(self.settings.interval):
            self._silent += passed
            limit = self.settings.seconds
            if limit is not None and self._silent > limit and not self._loss.done():
                how = f"has not been heard from for {self._silent:.0f} s; its host or its network is gone"
                self._loss.set_result(("0", f"{self.settings.members[0]} {how}"))
            if hearing.done():
                hearing = await self._connect() or hearing
            await self._say(f"beat {self.state()} {self.note}".rstrip())

    async def _connect(self) -> asyncio.Task[None] | None:
        try:
            async with asyncio.timeout(max(1.0, self.settings.interval)):
                reader, self._hub = await asyncio.open_connection(
                    self.settings.host, self.settings.port, limit=LONGEST_LINE
                )
                await self._say(f"{self.settings.token} {self.settings.rank}")
                if await reader.readline() != b"beat\n":
                    return None
        except (OSError, TimeoutError):
            return None
        return asyncio.create_task(self._hear(reader))

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                self._silent = 0.0
                word, _, rest = line.decode().strip().partition(" ")
                if word == "lost" and not self._loss.done():
                    seconds, _, why = rest.partition(" ")
                    self._loss.set_result((seconds, why))
                elif word == "over" and not self._loss.done():
                    self._loss.set_result(None)

    async def _say(self, line: str) -> None:
        if self._hub is not None:
            with contextlib.suppress(OSError, TimeoutError):
                self._hub.write(f"{line}\n".encode())
                async with asyncio.timeout(self.settings.interval):
                    await self._hub.drain()


async def ticks(interval: float) -> AsyncIterator[float]:
    """Yields the seconds since the last tick, at most two intervals: a pause of this process is not counted."""
    clock = asyncio.get_running_loop().time
    last = clock()
    while True:
        await asyncio.sleep(interval)
        now = clock()
        yield min(now - last, 2 * interval)
        last = now


def tell(line: str) -> None:
    """Sends a line to the rank, which may be gone."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def _allow_open_files(ranks: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < ranks + 64:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, ranks + 64), hard))


async def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(
            number, signal.SIG_IGN
        )  # signals are for the rank; this process ends when its standard input closes
    rank_lines = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(rank_lines), sys.stdin)
    settings = Settings(**json.loads(await rank_lines.readline()))
    await (Hub if settings.rank == 0 else Spoke)(settings, rank_lines).run()


if __name__ == "__main__":
    asyncio.run(main())
