"""Who may reach a rollout server, and which of its flags are not the user's to give. No torch."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from urllib.parse import urlsplit

OWN_FLAGS = {
    "--api-key": "it would stand in the configuration, the process list and the server's log",
    "--admin-api-key": "it would stand in the configuration, the process list and the server's log",
    "--config": "it may set any other flag",
    "--host": "the server must listen where its users look for it",
    "--port": "the server must listen where its users look for it",
    "--model-path": "the model is given already",
    "--tokenizer-worker-num": "SGLang then asks nobody for the key",
}
"""Flag -> why it is refused."""


def is_loopback(host: str) -> bool:
    """Whether only this machine's processes reach what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def refused_flags(flags: Iterable[str]) -> Iterator[str]:
    """One line for each flag, or abbreviation of one, that is refused."""
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        for own, why in OWN_FLAGS.items():
            if name.startswith("--") and len(name) > 2 and own.startswith(name):
                yield f"{name} cannot be given: {why}; drop it"
                break


def exposed(urls: Iterable[str]) -> list[str]:
    """Those of the URLs that name another machine than this one."""
    return [url for url in urls if (host := _host(url)) is not None and not is_loopback(host)]


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
