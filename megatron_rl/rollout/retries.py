"""Which failures of a request a retry may fix, and how long to wait before it."""

from __future__ import annotations

import tenacity

HEALING_STATUS = frozenset({429, 502, 503, 504})
LONGEST_WAIT = 60.0
"""Of what a server may ask for by Retry-After, in seconds."""
_BACKOFF = tenacity.wait_random_exponential(multiplier=0.2, max=10.0)


class Healing(Exception):
    """A failure that a retry may fix."""

    def __init__(self, what: str, reached: bool, wait: float = 0.0) -> None:
        """`reached`: the server may have seen the request. `wait`: seconds before the next try, as the server says."""
        super().__init__(what)
        self.reached = reached
        self.wait = wait


def seconds_of(retry_after: str) -> float:
    """Returns what the header says, at most LONGEST_WAIT; 0 for a date, which servers of models do not send."""
    return min(float(retry_after), LONGEST_WAIT) if retry_after.isdecimal() else 0.0


def wait_of(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait if isinstance(error, Healing) else 0.0
    return max(asked, _BACKOFF(state))


def told(error: BaseException) -> str:
    """Returns an error's kind and text, and what the system said, which httpx leaves out of a broken connection."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.strerror):
        cause = cause.__cause__ or cause.__context__
    said = [type(error).__name__, str(error), cause.strerror if isinstance(cause, OSError) else ""]
    return " ".join(word for word in dict.fromkeys(said) if word)
