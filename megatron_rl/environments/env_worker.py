"""A process that imports an environment once, and forks a process for each conversation.

    python -m megatron_rl.environments.env_worker ENVIRONMENT DESCRIPTOR MEMORY_MIB

DESCRIPTOR is a socket that keeps messages apart. `open N` comes with the socket of conversation N, and `end N` ends its
process with all that this has started. So a conversation that hangs or crashes costs no other one. MEMORY_MIB bounds
the address space of each process; 0 disables. What an environment prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from typing import Any

from megatron_rl.data.sample import Prompt
from megatron_rl.environments.env import Env, EnvError, call_reset, call_step, get_env
from megatron_rl.named_code import told
from megatron_rl.rewards.channel import Channel, ChannelError
from megatron_rl.rewards.keeper import PR_SET_CHILD_SUBREAPER
from megatron_rl.rewards.worker import main

READY = b"ready"


def serve(name: str, control: socket.socket) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # of what conversations leave behind
    try:
        env = get_env(name)
    except EnvError as error:
        control.send(str(error).encode())
        return
    except BaseException as error:
        control.send(f"environment {name!r}: {told(error)}".encode())
        return
    control.send(READY)
    processes: dict[str, int] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 100, 1)
        if not message:
            return
        order, _, number = message.decode().partition(" ")
        if order == "end":
            _kill(processes.pop(number))
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _converse(env, Channel(socket.socket(fileno=descriptors[0])))
        os.close(descriptors[0])
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)  # here and in the process itself, so that `end` finds the group at once
        processes[number] = pid


def _kill(group: int) -> None:
    """Kills a conversation and what it has started, which is then a child of this process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-group, 0)


def _converse(cls: type[Env], channel: Channel) -> None:
    """Answers messages until the other end closes, and ends the process."""
    try:
        os.setpgid(0, 0)
        env: Env | None = None
        while True:
            message = channel.receive()
            try:
                if "prompt" in message:
                    env = cls()
                    fields = message["prompt"]
                    reply: Any = call_reset(env, Prompt(**{**fields, "token_ids": tuple(fields["token_ids"])}))
                else:
                    assert env is not None
                    reply = call_step(env, message["message"])
                channel.send({"reply": vars(reply)})
            except ChannelError:
                raise
            except BaseException as error:  # SystemExit too, and messages that are no JSON
                channel.send({"error": told(error)})
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(serve)
