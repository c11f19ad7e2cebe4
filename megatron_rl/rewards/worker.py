"""A process that runs one verifier for megatron_rl.rewards.judges: `python -m megatron_rl.rewards.worker NAME FD`."""

from __future__ import annotations

import fcntl
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import orjson

from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.registry import Verifier, call_verifier, get_verifier


def serve(name: str, connection: Connection) -> None:
    """Says that it is ready, then answers each message, until the other end closes."""
    try:
        verifier = get_verifier(name)
    except Exception as error:
        connection.send_bytes(orjson.dumps({"error": str(error)}))
        return
    connection.send_bytes(orjson.dumps({"ready": True}))
    while True:
        try:
            message = orjson.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(orjson.dumps(_reply(verifier, message)))


def _reply(verifier: Verifier, message: dict[str, Any]) -> dict[str, Any]:
    fields = message["prompt"]
    prompt = Prompt(**{**fields, "token_ids": tuple(fields["token_ids"])})
    try:
        verdict = call_verifier(verifier, prompt, message["response"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"reward": verdict.reward, "correct": verdict.correct}


def _end_with_the_parent() -> None:
    """When the parent ends, however it does, the kernel closes our standard input and sends SIGIO, which ends a process
    that has no handler for it, in the midst of a long computation in C too."""
    stdin = sys.stdin.fileno()
    fcntl.fcntl(stdin, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(stdin, fcntl.F_SETFL, fcntl.fcntl(stdin, fcntl.F_GETFL) | os.O_ASYNC)


if __name__ == "__main__":
    _end_with_the_parent()
    serve(sys.argv[1], Connection(int(sys.argv[2])))
