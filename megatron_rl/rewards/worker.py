"""A process that runs one verifier for megatron_rl.rewards.judges.

    python -m megatron_rl.rewards.worker VERIFIER DESCRIPTOR MEMORY_MIB

It imports the verifier before it reports that it is ready. DESCRIPTOR is its end of the protocol's socket. MEMORY_MIB
bounds its address space; 0 disables. The verifier's prints go to standard error.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.named_code import ResultError, told
from megatron_rl.rewards.channel import Channel, ChannelError
from megatron_rl.rewards.verifiers import RewardError, Verifier, asked_by, call_check, call_verifier, get_verifier

PR_SET_PDEATHSIG = 1


def serve(name: str, end: socket.socket) -> None:
    """Reports that it is ready, then answers messages until the other end closes."""
    channel = Channel(end)
    try:
        verifier = get_verifier(name)
    except RewardError as error:
        channel.send({"error": str(error)})
        return
    except BaseException as error:
        channel.send({"error": f"verifier {name!r}: {told(error)}"})
        return
    channel.send({"ready": True, "asks": sorted(asked_by(verifier))})
    while True:
        try:
            message = channel.receive()
            channel.send({"id": message["id"], **_reply(verifier, message)})
        except ChannelError:
            return


def _reply(verifier: Verifier, message: dict[str, Any]) -> dict[str, Any]:
    fields = message["prompt"]
    prompt = Prompt(**{**fields, "token_ids": tuple(fields["token_ids"])})
    results: Sequence[Verdict | ResultError]
    try:
        if "responses" in message:
            results = call_verifier(verifier, prompt, message["responses"])
        else:
            results = [call_check(verifier, prompt.answer)]
    except BaseException as error:  # SystemExit too: it costs this call only
        return {"error": told(error)}
    return {"results": [_result(each) for each in results]}


def _result(result: Verdict | ResultError) -> dict[str, Any]:
    if isinstance(result, ResultError):
        return {"error": told(result)}
    return {"reward": result.reward, "correct": result.correct}


def main(serve: Callable[[str, socket.socket], None]) -> None:
    """Serves what the arguments say, in a process that ends with its keeper."""
    name, descriptor, memory_mib = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    keeper = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:
        return
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if memory_mib:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    os.set_inheritable(descriptor, False)
    serve(name, socket.socket(fileno=descriptor))


if __name__ == "__main__":
    main(serve)
