"""Exchanges messages between a trainer and a worker: JSON over a socket, each after its length, with a time limit."""

from __future__ import annotations

import socket
import time
from typing import Any

import orjson

MAX_BYTES = 64 << 20
"""Bytes of one message. A longer message does not come from the other end of the protocol."""


class ChannelError(Exception):
    """The other end is closed, silent, or sends something that is not a message."""


class ChannelTimeoutError(ChannelError):
    """The other end did not answer in time."""


class Channel:
    """One end of the socket. Only one thread may use it at a time."""

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
        """Waits at most `seconds` for the whole message; None waits without limit. Raises ChannelError."""
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
