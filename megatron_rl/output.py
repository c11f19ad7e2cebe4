"""Standard output that cannot be written is one error, and a pipe that nobody reads any more is none."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

from megatron_rl.errors import UserError


class OutputError(UserError, OSError):
    """Standard output cannot be written. Gives the system's reason."""


class _Output(io.FileIO):
    """The file of standard output. After its first failure it takes whatever is still buffered and drops it, because
    Python writes that at its end, when nobody can catch an error."""

    _failed = False

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._failed or not size:  # typer writes nothing to see what it may write, and ignores an error of that
            return size
        try:
            return super().write(data)
        except BrokenPipeError:
            self._failed = True
            raise
        except OSError as error:
            self._failed = True
            reason = (error.strerror or str(error)).lower()
            raise OutputError(f"standard output cannot be written: {reason}; send it to another file") from None


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Makes a failing write to standard output an OutputError, for the rest of the process. All that the body has
    written is out at its end, unless it raises."""
    before = sys.stdout
    if not isinstance(before, io.TextIOWrapper):  # closed by who started the process
        yield
        return
    before.flush()
    raw = _Output(before.fileno(), "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        raw if before.write_through else io.BufferedWriter(raw),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
    yield
    sys.stdout.flush()
