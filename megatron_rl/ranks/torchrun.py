"""Runs torchrun, lets its ranks save when they are told to stop, and ends with their status.

    python -m megatron_rl.ranks.torchrun [TORCHRUN'S ARGUMENTS]... -m megatron_rl train CONFIG

torchrun kills ranks 30 seconds after SIGTERM, dies of SIGUSR1, and always ends with status 1. A scheduler must know
more: a run that was stopped and saved has status 75, and is to be started again.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from megatron_rl.stop import SIGNALS, STATUS

LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"


def main(arguments: Sequence[str]) -> int:
    """Returns 0, STATUS if the ranks were stopped, or else the status of the first rank that failed.

    A rank that a passed-on signal ended before it could catch it counts as stopped.
    """
    with _passed_on() as received:
        try:
            run(parse_args(["--signals-to-handle", LEFT_TO_TORCHRUN, *arguments]))
        except ChildFailedError as error:
            statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
            if STATUS in statuses.values() or any(-number in statuses.values() for number in received):
                return STATUS
            rank, failure = error.get_first_failure()
            print(f"rank {rank} ended with status {failure.exitcode}; its output says why", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


@contextlib.contextmanager
def _passed_on() -> Iterator[list[int]]:
    """Passes signals on to the ranks while the body runs; yields those that came. Without ranks they end the process
    with STATUS."""
    received: list[int] = []

    def send(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            sys.exit(STATUS)

    before = {number: signal.signal(number, send) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
