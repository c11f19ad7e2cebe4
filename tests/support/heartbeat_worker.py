"""heartbeat_worker.py SECONDS OUT SCENARIO...: worlds of two ranks under a heartbeat, all at the same time.

Each rank is a fork of this process, which has imported torch once. OUT/SCENARIO.json has, for each rank, its status and
the seconds from the fault to its end. OUT/SCENARIO/ has the files of the ranks.

    stop-0, stop-1, kill-0, kill-1    that rank gets the signal; the ranks reduce for ever
    hold                              rank 1 holds the GIL for three times SECONDS; then all ranks end normally
    hang                              rank 1 comes to the next collective after 15 times STALL, and nothing moves before
    slow                              rank 1 comes to it after twice STALL, and moves meanwhile; then all end normally
    raise                             both ranks raise; rank 0 cleans up for 3 s, as if it stopped servers
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rl.errors import UserError
from megatron_rl.ranks.activity import Activity
from megatron_rl.ranks.agreement import end
from megatron_rl.ranks.heartbeat import Heartbeat

RANKS = (0, 1)
STALL = 2.0


def hold_the_lock(seconds: float) -> None:
    """Calls C code that never releases the GIL, so no thread of the rank can send a heartbeat meanwhile."""
    sys.setswitchinterval(1e6)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(10**7))


def wait_for_rank_1(rank: int, activity: Activity, control: dist.ProcessGroup, *, hangs: bool) -> None:
    if rank == 1:
        for _ in range(60 if hangs else 8):
            time.sleep(STALL / 4)
            if not hangs:
                activity.move()
    dist.barrier(control)


def run(rank: int, seconds: float, out: Path, scenario: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=len(RANKS))
    control = dist.new_group(backend="gloo")
    activity = Activity(STALL if scenario in ("hang", "slow") else None)
    activity.has_begun = True
    with Heartbeat(control, seconds, activity) as heartbeat:
        heartbeat.before_end = (out / f"flushed-{rank}").touch
        (out / f"watched-{rank}").touch()
        if scenario == "raise":
            dist.barrier(control)
            try:
                raise UserError(f"an error of rank {rank}")
            finally:
                time.sleep(3 if rank == 0 else 0)
        if scenario == "hold" and rank == 1:
            hold_the_lock(3 * seconds)
        if activity.stall:
            with activity.phase("rewards" if rank == 1 else "update"):
                wait_for_rank_1(rank, activity, control, hangs=scenario == "hang")
        while scenario not in ("hold", "slow", "hang"):
            dist.all_reduce(torch.ones(1), group=control)
            time.sleep(0.01)  # else all worlds together would starve each other of processor time
        dist.barrier(control)
    (out / f"well-{rank}").touch()


def fork(rank: int, seconds: float, out: Path, scenario: str) -> int:
    if pid := os.fork():
        return pid
    os.dup2(os.open(out / f"stderr-{rank}", os.O_CREAT | os.O_WRONLY), 2)
    status = 1
    try:
        run(rank, seconds, out, scenario)
        status = 0
    except UserError as error:
        status = end(error)
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def play(pids: list[int], out: Path, scenario: str) -> None:
    while not all((out / f"watched-{rank}").exists() for rank in RANKS):
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
            break  # its end and its words are the result
        time.sleep(0.05)
    fault, _, victim = scenario.partition("-")
    time.sleep(0.5)
    if victim:
        os.kill(pids[int(victim)], signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    start = time.monotonic()
    ends: dict[int, list[float]] = {}
    while len(ends) < len(RANKS):
        for rank in set(RANKS) - ends.keys():
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                ends[rank] = [os.waitstatus_to_exitcode(status), time.monotonic() - start]
        time.sleep(0.05)
    pending = out / "pending.json"
    pending.write_text(json.dumps([pids, [ends[rank] for rank in RANKS]]))
    pending.rename(out.with_suffix(".json"))


def main(seconds: float, out: Path, scenarios: list[str]) -> None:
    worlds = []
    for scenario in scenarios:
        (out / scenario).mkdir()
        worlds.append([fork(rank, seconds, out / scenario, scenario) for rank in RANKS])
    threads = [
        threading.Thread(target=play, args=(pids, out / scenario, scenario))
        for pids, scenario in zip(worlds, scenarios, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
