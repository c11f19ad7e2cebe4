"""Starts stock `sglang.launch_server` with a key that is neither in its arguments nor in its log.

    python -m megatron_rl.rollout.sglang_launch --model-path DIR ...

`megatron_rl.rollout.server` writes this command. SGLang takes a key only as an argument, which everyone on the machine
can read, and it prints all its settings at start-up. Here the key comes in an environment variable, which is removed
before SGLang starts its processes. It is set where SGLang would store the argument, as text that does not print itself.
Linux still shows the environment at the start of this process and its tether in /proc/PID/environ, to root and to
processes of the same user. So the key is hidden from other users only. SGLang's processes are spawned and import this
module again as `__mp_main__`, which does nothing.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

KEY_VARIABLE = "MEGATRON_RL_SERVER_KEY"

ABANDONED = "abandoned"
"""Request id of an end_weight_update that ends another trainer's session."""

# With these flags SGLang starts several process groups, or one over several machines.
SEVERAL = ("--dp", "--data-parallel", "--nnodes", "--node-rank", "--dist-init")


class Secret(str):
    """Text that no log shows, because logs print the `repr` of settings."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (str.__str__(self),)


def launch(arguments: Sequence[str]) -> None:
    """Runs the server in this process until it ends."""
    key = os.environ.pop(KEY_VARIABLE, None)
    if key is not None:
        _give(key)
    if not any(argument.startswith(SEVERAL) for argument in arguments):
        # By default its ranks meet at a port that is open on all addresses of the machine.
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{tempfile.gettempdir()}/rendezvous"
    runpy.run_module("sglang.launch_server", run_name="__main__")


def _give(key: str) -> None:
    from sglang.srt import server_args

    from megatron_rl.rollout.sglang_launch import Secret as Importable  # the running module is named __main__

    prepare = server_args.prepare_server_args

    def with_key(argv: list[str]) -> Any:
        prepared = prepare(argv)
        prepared.api_key = Importable(key)
        return prepared

    server_args.prepare_server_args = with_key


if __name__ == "__main__":
    launch(sys.argv[1:])
