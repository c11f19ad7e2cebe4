"""What may be said of rollout servers: URLs, the variable of a key, flags for those that are started. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import SplitResult, urlsplit

# What the trainer sets itself, by flag, and what to use in its place. The values are never shown: one may be a key.
_OWN_KEY = "the trainer gives the servers that it starts a key of their own, which is written nowhere"
_ONE_MACHINE = "the trainer starts servers on one machine; start larger ones yourself and name them in urls"
_HTTP = "the trainer speaks HTTP to the servers that it starts; start others yourself and name them in urls"
_ADDRESS = "the trainer chooses the address"
_ROUTES = "set routing.replay r3 or routing.observe_rollout"
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
    "--ssl-keyfile": _HTTP,
    "--ssl-certfile": _HTTP,
    "--ssl-ca-certs": _HTTP,
    "--ssl-keyfile-password": _HTTP,
    "--nnodes": _ONE_MACHINE,
    "--node-rank": _ONE_MACHINE,
    "--dist-init-addr": _ONE_MACHINE,
    "--nccl-init-addr": _ONE_MACHINE,
}

# Flags of servers whose routes cannot be trusted: experts that are moved or doubled are numbered anew, and KV that is
# loaded from elsewhere comes without its tokens' routes, which SGLang does not notice (rollout/routes.py).
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

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?\]", re.ASCII)


def flags_among(given: Sequence[str], flags: Sequence[str]) -> Iterator[str]:
    """Those of `flags` that `given` sets: as `--flag value`, as `--flag=value`, or by an abbreviation."""
    written = {text.partition("=")[0] for text in given if text.startswith("--")}
    for flag in flags:
        if flag in written or any(
            flag.startswith(text) and text not in WHOLE_FLAGS and text != "--" for text in written
        ):
            yield flag


def url_problem(url: str) -> str | None:
    """What a server's URL should be and is not; None if it is http(s)://host[:port][/path]."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"a URL such as http://host:30000: {str(error)[:80]}"
    if "@" in parts.netloc:
        return "a URL without credentials; rollout.servers.api_key_env names the variable with a key"
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(_host(parts)) or port == 0:
        return "a URL such as http://host:30000"
    if parts.query or parts.fragment or not parts.path.isascii() or not parts.path.isprintable() or " " in parts.path:
        return "a URL such as http://host:30000, with no more than a path behind it"
    return None


def same_server(url: str) -> tuple[str, str, int, str]:
    """Equal for two URLs of one server: case, the default port and a last slash make no difference."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    return parts.scheme, _host(parts).lower(), port, parts.path.rstrip("/")


def _host(parts: SplitResult) -> str:
    host, colon, port = parts.netloc.rpartition(":")
    return host if colon and port.isdecimal() else parts.netloc
