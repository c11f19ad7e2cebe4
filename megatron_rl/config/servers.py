"""The section rollout.servers, who can reach its URLs, the variable of their key, and what CPUs serve. No torch."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from megatron_rl.config.bounds import FilePath, Frozen, PositiveInt, Seconds
from megatron_rl.config.sources import ConfigError

if TYPE_CHECKING:
    from megatron_rl.models.architecture import Architecture

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?\]", re.ASCII)


def is_loopback(host: str) -> bool:
    """Whether only this machine's processes reach what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def exposed(urls: Iterable[str]) -> list[str]:
    """Returns the URLs that name another machine than this one."""
    return [url for url in urls if not is_loopback(urlsplit(url).hostname or "")]


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


CPU_ADVICE = "take servers on GPUs (rollout.servers.urls), or saved rollouts (rollout.replay_from)"


def cpu_problem(arch: Architecture) -> str | None:
    """What of the model SGLang 0.5.23 does not compute on CPUs; None if it serves the model there."""
    features = {
        "latent attention": arch.latent is not None,  # its cache is read wrongly
        "gated delta networks": arch.delta_net is not None,  # do not start
        "sinks of attention": arch.sinks,  # do not start
    }
    found = [name for name, present in features.items() if present]
    if not found:
        return None
    return f"the model has {' and '.join(found)}, which SGLang does not compute on CPUs"


def _host(parts: SplitResult) -> str:
    host, colon, port = parts.netloc.rpartition(":")
    return host if colon and port.isdecimal() else parts.netloc


def _check_urls(urls: tuple[str, ...]) -> tuple[str, ...]:
    for url in urls:
        if problem := url_problem(url):
            kind = "hidden_url" if "@" in url else "url"  # credentials are not repeated
            raise PydanticCustomError(kind, "{problem}", {"problem": problem})
    if len(set(map(same_server, urls))) < len(urls):
        raise PydanticCustomError("url", "each server once")
    return urls


def _check_variable(name: str) -> str:
    if not VARIABLE.fullmatch(name):
        raise PydanticCustomError(
            "hidden_variable", "the name of an environment variable (letters, digits and _), and not the key itself"
        )
    return name


Urls = Annotated[tuple[str, ...], AfterValidator(_check_urls)]
VariableName = Annotated[str, AfterValidator(_check_variable)]
ServerDtype = Literal["auto", "fp32", "bf16"]
CPU_TOKENS = 65536
"""Tokens of the KV cache of a server on a CPU, unless max_total_tokens says another number: SGLang would take most of
the machine's memory."""


def cache_tokens(asked: int | None, *, on_cpu: bool) -> int | None:
    """Returns the tokens of a launched server's KV cache; None if SGLang chooses."""
    return asked or (CPU_TOKENS if on_cpu else None)


class ServersConfig(Frozen):
    urls: Urls = ()
    """Servers started elsewhere, each for one trainer alone: it ends all requests that it finds there. Empty, and
    without `urls_file`: the trainer starts and supervises `launch` servers itself."""
    urls_file: FilePath | None = None
    """File with a URL a line, in place of `urls`; # begins a comment. It is read again at each weight sync: servers may
    come and go."""
    launch: PositiveInt = 1
    """Number of servers to start if neither `urls` nor `urls_file` names servers."""
    tp: PositiveInt = 1
    """Tensor parallelism of each launched server."""
    colocate: bool = False
    """Launched servers use the GPUs of the trainer's ranks, in turns with them, instead of GPUs of their own. Each side
    frees its memory for the other (docs/scale.md)."""
    dtype: ServerDtype = "auto"
    """auto: the engine's dtype."""
    api_key_env: VariableName | None = None
    """Environment variable, on the machine of each rank, with the key of servers that were started elsewhere; needed
    when one is on another machine. The key itself is neither in the configuration nor in the run directory. Servers
    that the trainer starts get a random key."""
    start_timeout: Seconds = 600.0
    """Seconds until a server must answer, launched or started elsewhere."""
    max_total_tokens: PositiveInt | None = None
    """KV cache of a launched server, in tokens. Defaults to null: on a GPU as many as SGLang finds room for, on a CPU
    65536."""
    threads: PositiveInt | None = None
    """Threads of a launched server on a CPU. Defaults to null: an equal part of the cores. Threads spin while they wait
    for each other: if other processes need the cores, a server may be ten times slower. One is enough for a model of a
    few million parameters."""
    extra_flags: tuple[str, ...] = ()
    """Given to `sglang.launch_server` as they are."""

    @property
    def are_elsewhere(self) -> bool:
        """Whether the servers were started elsewhere."""
        return bool(self.urls) or self.urls_file is not None


def read_urls(file: Path, *, have_key: bool) -> tuple[str, ...]:
    """Returns the URLs of rollout.servers.urls_file. Raises ConfigError, which names file and line."""
    where = f"rollout.servers.urls_file: {file}"
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: {error}; expected a text file with a URL such as http://host:30000 a line"
        ) from None
    urls: list[str] = []
    for number, line in enumerate(lines, start=1):
        url = line.partition("#")[0].strip()
        if not url:
            continue
        if problem := url_problem(url):
            raise ConfigError(f"{where}:{number}: expected {problem}")
        if not have_key and exposed([url]):
            raise ConfigError(f"{where}:{number}: {url} is on another machine; set rollout.servers.api_key_env")
        if same_server(url) in map(same_server, urls):
            raise ConfigError(f"{where}:{number}: {url} is there twice")
        urls.append(url)
    if not urls:
        raise ConfigError(f"{where}: no URL is there; expected one such as http://host:30000 a line")
    return tuple(urls)
