"""What each rank logs: run_dir/logs/rank-N.log, with the time of each record.

The file has every Python warning and every logged warning, the libraries' too, and what this program says. The console
has this program's warnings and the libraries' errors alone, so that several ranks do not bury the run. If Python was
started with -W or PYTHONWARNINGS the user has chosen, and Python's warnings go where they would without this file.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rl.errors import UserError

OURS = "megatron_rl"
LIBRARIES = ("transformers", "sglang", "megatron", "datasets")
"""Loggers that may have handlers of their own, and then do not tell the root logger."""
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.log"


class RankLog(logging.Handler):
    """Takes all records while it is entered. What comes before `open` waits in memory, because a start that fails
    leaves no file; if a fault of the program ends it, that is printed."""

    def __init__(self, rank: int, heard: Callable[[str], None] = lambda text: None) -> None:
        """`heard` is called with each warning that the console shows."""
        super().__init__()
        self.setFormatter(logging.Formatter(FORMAT))
        self._rank = rank
        self._heard = heard
        self._waiting: list[str] = []
        self._file: Path | None = None
        self._before: list[tuple[logging.Logger, list[logging.Handler], bool, int]] = []
        self._captures = not sys.warnoptions

    def open(self, logs: Path) -> None:
        """Writes into this directory from now on. Raises OSError."""
        self._file = log_file(logs, self._rank)
        waiting, self._waiting = self._waiting, []
        self._append("".join(waiting))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record) + "\n"
            if self._file is None:
                self._waiting.append(text)
            else:
                self._append(text)
        except OSError:
            pass  # a full disk: the run's own files say so
        is_ours = record.name.partition(".")[0] == OURS
        if record.levelno >= (logging.WARNING if is_ours else logging.ERROR):
            said = record.getMessage()
            who = f" (rank {self._rank})" if self._rank else ""
            print(f"warning{who}: {said}", file=sys.stderr, flush=True)
            self._heard(said)

    def _append(self, text: str) -> None:
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as stream:  # closed each time: a run's files are few
            stream.write(text)

    def __enter__(self) -> Self:
        loggers = [logging.getLogger(name) for name in ("", OURS, *LIBRARIES)]
        self._before = [(each, each.handlers, each.propagate, each.level) for each in loggers]
        root, ours, *libraries = loggers
        root.handlers = [self, *root.handlers]
        ours.setLevel(logging.INFO)
        for each in libraries:
            each.handlers, each.propagate = [], True
        if self._captures:
            logging.captureWarnings(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._captures:
            logging.captureWarnings(False)
        for logger, handlers, propagate, level in self._before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        if self._file is None:
            print("".join(self._waiting), file=sys.stderr, end="", flush=True)
        else:
            self._append("".join(traceback.format_exception(error)))
