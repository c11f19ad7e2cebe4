"""Messages between a trainer and a worker: JSON over a socket, each with its length, and none awaited for ever."""

from __future__ import annotations

import socket
import time
from typing import Any

import orjson

MAX_BYTES = 64 << 20
"""Of one message. A longer one is not from the other end of the protocol."""


class ChannelError(Exception):
    """The other end is closed, silent, or says what is no message."""


class ChannelTimeoutError(ChannelError):
    """The other end is silent."""


class Channel:
    """One end. Not for several threads at once."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: dict[str, Any], seconds: float | None = None) -> None:
        """Raises ChannelError."""
        data = orjson.dumps(message)
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(len(data).to_bytes(8, "little") + data)
        except TimeoutError:
            raise ChannelTimeoutError(f"took over {seconds:g} s") from None
        except OSError:
            raise ChannelError("its connection is closed") from None

    def receive(self, seconds: float | None = None) -> dict[str, Any]:
        """`seconds` is the time for all of the message; None waits. Raises ChannelError."""
        deadline = None if seconds is None else time.monotonic() + seconds
        try:
            length = int.from_bytes(self._read(8, deadline), "little")
            if length > MAX_BYTES:
                raise ChannelError("its connection carries something that is no message")
            message = orjson.loads(self._read(length, deadline))
        except TimeoutError:
            raise ChannelTimeoutError(f"took over {seconds:g} s") from None
        except OSError:
            raise ChannelError("its connection is closed") from None
        except orjson.JSONDecodeError:
            raise ChannelError("its connection carries something that is no message") from None
        if not isinstance(message, dict):
            raise ChannelError("its connection carries something that is no message")
        return message

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int, deadline: float | None) -> bytes:
        data = bytearray()
        while len(data) < count:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
            else:
                self._socket.settimeout(None)
            part = self._socket.recv(min(count - len(data), 1 << 20))
            if not part:
                raise ChannelError("its connection is closed")
            data += part
        return bytes(data)
