"""Flags in rollout.servers.extra_flags that contradict the configuration. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megatron_rl.config.schema import Config

# In SGLang 0.5.23 their experts take the router's logits and choose by themselves: no route is recorded.
UNROUTED_BACKENDS = ("auto", "flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4", "triton_kernel")


def flag_value(flags: Sequence[str], name: str) -> str | None:
    """Value of the last `name VALUE` or `name=VALUE`; None without one."""
    value = None
    for flag, following in itertools.zip_longest(flags, flags[1:]):
        key, equals, rest = flag.partition("=")
        if key == name:
            value = rest if equals else following
    return value


def check_server_flags(config: Config) -> Iterator[str]:
    """For servers that the trainer starts."""
    servers = config.rollout.servers
    gpu = flag_value(servers.extra_flags, "--base-gpu-id")
    if gpu is not None and config.weights.route == "collective" and config.engine.device != "cpu":
        shared = "the trainer's rank 0" if gpu == "0" else "one another" if servers.launch > 1 else None
        if shared is not None:
            # NCCL: "Duplicate GPU detected", after the servers have started.
            yield (
                f"weights.route: collective, but --base-gpu-id {gpu} in rollout.servers.extra_flags lets servers share "
                f"a GPU with {shared}, and NCCL takes one process a GPU; set weights.route to disk"
            )
    backend = flag_value(servers.extra_flags, "--moe-runner-backend")
    if config.routing.needs_rollout_routes and backend in UNROUTED_BACKENDS:
        yield (
            f"rollout.servers.extra_flags: with --moe-runner-backend {backend} SGLang may record no routes, but "
            "routing.replay r3 and routing.observe_rollout need them; drop it, and triton is taken"
        )
