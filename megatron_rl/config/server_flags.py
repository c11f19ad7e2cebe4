"""Flags of SGLang's servers that are not the user's to give, or that contradict the configuration. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from megatron_rl.config.schema import Config

# What the trainer sets itself, by flag, and what to use in its place. The values are never shown: one may be a key.
_OWN_KEY = "the trainer gives the servers that it starts a key of their own, which is written nowhere"
_ONE_MACHINE = "the trainer starts servers on one machine; start larger ones yourself and name them in urls"
_HTTP = "the trainer speaks HTTP to the servers that it starts; start others yourself and name them in urls"
_ADDRESS = "the trainer chooses the address"
_ROUTES = "set routing.replay r3 or routing.observe_rollout"
_SAVER = "set rollout.servers.colocate"
_LOADER = "it is set to the loader of weights.route delta"
TRAINERS_FLAGS = {
    "--model-path": "set model.path",
    "--model": "set model.path",
    "--host": _ADDRESS,
    "--port": _ADDRESS,
    "--api-key": _OWN_KEY,
    "--admin-api-key": _OWN_KEY,
    "--dtype": "set rollout.servers.dtype",
    "--tp": "set rollout.servers.tp",
    "--tp-size": "set rollout.servers.tp",
    "--tensor-parallel-size": "set rollout.servers.tp",
    "--device": "set engine.device",
    "--max-total-tokens": "set rollout.servers.max_total_tokens",
    "--max-running-requests": "set rollout.concurrency",
    "--random-seed": "set seed",
    "--enable-return-routed-experts": _ROUTES,
    "--config": "list its flags in extra_flags",
    "--weight-version": "the trainer counts the versions of the weights",
    "--custom-weight-loader": _LOADER,
    "--enable-memory-saver": _SAVER,
    "--ssl-keyfile": _HTTP,
    "--ssl-certfile": _HTTP,
    "--ssl-ca-certs": _HTTP,
    "--ssl-keyfile-password": _HTTP,
    "--tokenizer-worker-num": "SGLang then asks nobody for the key",
    "--nnodes": _ONE_MACHINE,
    "--node-rank": _ONE_MACHINE,
    "--dist-init-addr": _ONE_MACHINE,
    "--nccl-init-addr": _ONE_MACHINE,
}

# Flags of servers whose routes cannot be trusted: experts that are moved or doubled are numbered anew, and KV that is
# loaded from elsewhere comes without its tokens' routes, which SGLang does not notice (routing/wire.py).
UNROUTED_FLAGS = (
    "--enable-eplb",
    "--ep-num-redundant-experts",
    "--init-expert-location",
    "--enable-hierarchical-cache",
    "--enable-hicache",
    "--enable-lmcache",
    "--disaggregation-mode",
)

# A flag of SGLang's own that begins one of those above. Any other beginning is an abbreviation, which SGLang takes.
WHOLE_FLAGS = frozenset({"--ep"})

# What `megatron-rl serve` sets itself, with the reason why it is refused.
_KEY = "it would stand in the process list and the server's log; --api-key-env names a variable that holds it"
SERVE_FLAGS = {
    "--api-key": _KEY,
    "--admin-api-key": _KEY,
    "--config": "it may set any other flag",
    "--host": "give it before the --",
    "--port": "give it before the --",
    "--model-path": "the model is given already",
    "--tokenizer-worker-num": "SGLang then asks nobody for the key",
    "--custom-weight-loader": _LOADER,
}

# In SGLang 0.5.23 their experts take the router's logits and choose by themselves: no route is recorded.
UNROUTED_BACKENDS = ("auto", "flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4", "triton_kernel")


def flags_among(given: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """Yields the `flags` that `given` sets: as `--flag value`, as `--flag=value`, with _ for -, or abbreviated."""
    for flag in flags:
        if any(_sets(text, flag) for text in given):
            yield flag


def flag_value(flags: Sequence[str], name: str) -> str | None:
    """Value of the last `name VALUE` or `name=VALUE`, with _ for - or abbreviated as well; None without one."""
    value = None
    for flag, following in itertools.zip_longest(flags, flags[1:]):
        if _sets(flag, name):
            _, equals, rest = flag.partition("=")
            value = rest if equals else following
    return value


def _sets(text: str, flag: str) -> bool:
    """Tells whether SGLang takes `text` for `flag`."""
    written = text.partition("=")[0].replace("_", "-")
    if written == flag:
        return True
    return written.startswith("--") and written != "--" and written not in WHOLE_FLAGS and flag.startswith(written)


def check_server_flags(config: Config) -> Iterator[str]:
    """Yields contradictions between the flags of servers that the trainer starts and the rest."""
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
