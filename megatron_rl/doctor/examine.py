"""Examines servers one after another, and prints a line for each check."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.servers import ServersConfig, read_urls, url_problem
from megatron_rl.config.sources import ConfigError
from megatron_rl.doctor.probes import Prober
from megatron_rl.errors import UserError
from megatron_rl.finding import Finding, State
from megatron_rl.rollout.answers import VERSION, RolloutError
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient, UnreachableError
from megatron_rl.rollout.pool import read_api_key
from megatron_rl.rollout.server_needs import (
    ADMIN,
    SLACK,
    CannotTell,
    CheckFailed,
    Needs,
    check_lengths,
    check_parallelism,
    check_same_model,
    explain_refusal,
    is_unauthorised,
)

DEADLINE = 10.0
"""Seconds for one answer."""
SMALL = 60
"""Longest prompt of a server that does not say it."""
CHANGES = ("weight version", "pause and flush", "abort", "update from disk", "update by broadcast")


def run(urls: Sequence[str], model: Path | None, config_file: Path | None, key_variable: str | None) -> int:
    """Prints what is found of each server; returns the exit status. What is not given is the configuration's."""
    config = None if config_file is None else load_config(Config, config_file)
    servers = ServersConfig() if config is None else config.rollout.servers
    urls = urls or servers.urls
    if not urls and servers.urls_file is not None:
        urls = read_urls(servers.urls_file, have_key=True)
    for url in urls:
        if problem := url_problem(url):
            raise ConfigError(f"--server: expected {problem}")
    if not urls:
        raise ConfigError("--server: no server is given; name its URL, or a --config with rollout.servers.urls")
    key_variable = key_variable or servers.api_key_env
    api_key = read_api_key(key_variable, "--api-key-env") if key_variable else None
    needs = Needs.of(config, model)
    findings: list[Finding] = []
    loop = BackgroundLoop()
    try:
        for url in urls:
            print(url, flush=True)
            client = SGLangClient(url, api_key=api_key, deadline=DEADLINE, max_tries=1)
            findings += Examination(client, loop, needs).run()
    finally:
        loop.close()
    failed, unknown = (sum(each.state == state for each in findings) for state in ("fail", "unknown"))
    print(f"{len(findings)} checks: {failed} failed, {unknown} unknown")
    return UserError.status if failed else 0


class Examination:
    """The checks of one server. What changes its state is put back, and is left out while it serves others."""

    def __init__(self, client: SGLangClient, loop: BackgroundLoop, needs: Needs) -> None:
        self._client = client
        self._loop = loop
        self._needs = needs
        self._findings: list[Finding] = []

    def run(self) -> list[Finding]:
        try:
            self._examine()
        except UnreachableError as error:
            self._add("fail", "answers", f"{self._told(error)}; is it started, hung or paused, and is the URL right?")
        finally:
            self._loop.run(self._client.close())
        return self._findings

    def _examine(self) -> None:
        described = self._identify()
        if described is None:
            return
        model, info = described
        self._check("model", lambda: check_same_model(model, self._needs))
        self._check("parallelism", lambda: check_parallelism(info))
        self._check("longest request", lambda: check_lengths(info, self._needs))
        checksum = self._loop.run(self._checksum())
        found = str(model.get("weight_version"))
        longest = info.get("max_req_input_len", SMALL) + SLACK
        if not self._loop.run(self._is_idle()):
            if VERSION.fullmatch(found):
                self._ask(Prober(self._client, self._needs, int(found), longest))
            for name in CHANGES:
                self._add("unknown", name, "others' requests run on the server; ask again once it is idle")
            return
        version = 0 if found != "0" else 1
        with ExitStack() as stack:
            stack.callback(self._check, "put back", lambda: self._put_back(checksum, version, found), "restart it")
            try:
                self._check("weight version", lambda: self._set_version(version), ADMIN)
                prober = Prober(self._client, self._needs, version, longest)
                self._ask(prober)
                self._change(prober, info, version)
            except UnreachableError:
                stack.pop_all()  # it would not hear
                raise

    def _identify(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The server's own descriptions of the model and of its settings; None if it is not SGLang."""
        try:
            model = self._loop.run(self._client.model_info())
            info = self._loop.run(self._client.server_info())
        except UnreachableError:
            raise
        except RolloutError as error:
            if is_unauthorised(error):
                self._add("fail", "authorised", explain_refusal(error))
            else:
                self._add("fail", "SGLang", f"{self._told(error)}; {explain_refusal(error)}")
            return None
        self._add("ok", "SGLang", f"version {info.get('version')} on {info.get('device')}")
        return model, info

    def _ask(self, prober: Prober) -> None:
        """The checks that leave the server as it is."""
        self._check("prompt log-probs", prober.scores, "start it with SGLang 0.5.23 or later")
        self._check("sampled log-probs", prober.mu)
        arch = self._needs.arch
        if arch is not None and arch.num_experts and self._needs.routes is not False:
            self._check("routed experts", lambda: prober.routes(arch))
        self._check("speed", prober.speed)

    def _change(self, prober: Prober, info: Mapping[str, Any], version: int) -> None:
        self._check("pause and flush", prober.pausing, ADMIN)
        self._check("abort", prober.aborting, ADMIN)
        self._check("update from disk", prober.disk, ADMIN)
        self._check("update by broadcast", lambda: self._broadcast(info, version), ADMIN)

    def _broadcast(self, info: Mapping[str, Any], version: int) -> str:
        from megatron_rl.doctor.broadcast import broadcast  # imports torch, which takes seconds

        return broadcast(self._client, self._loop, info, version, DEADLINE)

    async def _checksum(self) -> str | None:
        try:
            return await self._client.weights_checksum()
        except UnreachableError:
            raise
        except RolloutError as error:
            self._add("fail", "checksum of the weights", f"{self._told(error)}; {ADMIN}")
            return None

    async def _is_idle(self) -> bool:
        try:
            await self._client.flush_cache()
        except UnreachableError:
            raise
        except RolloutError:
            return False
        return True

    async def _set_version(self, version: int) -> str:
        await self._client.update_weight_version(version)
        if (told := (await self._client.model_info()).get("weight_version")) != str(version):
            raise CheckFailed(f"set to {version}, but the server says {told}")
        return f"set to {version}, and read back"

    async def _put_back(self, checksum: str | None, changed: int, version: str) -> str:
        if (await self._client.model_info()).get("weight_version") != str(changed):
            raise CheckFailed(f"the weight version {changed} was changed meanwhile: does a trainer use the server?")
        await self._client.update_weight_version(version)
        if checksum is not None and await self._client.weights_checksum() != checksum:
            raise CheckFailed("the checks have changed its weights; restart it before you use it")
        return f"weight version {version}" + ("" if checksum is None else ", weights unchanged by checksum")

    def _check(self, name: str, ask: Callable[[], str | Coroutine[Any, Any, str]], fix: str = "") -> None:
        """Adds a line with what `ask` returns or raises."""
        try:
            answer = ask()
            self._add("ok", name, answer if isinstance(answer, str) else self._loop.run(answer))
        except UnreachableError:
            raise  # the other questions would wait as long
        except CannotTell as error:
            self._add("unknown", name, str(error))
        except CheckFailed as error:
            self._add("fail", name, str(error))
        except UserError as error:
            self._add("fail", name, "; ".join(filter(None, (self._told(error), fix))))

    def _add(self, state: State, name: str, text: str) -> None:
        self._findings.append(Finding(state, name, text))
        print(self._findings[-1], flush=True)

    def _told(self, error: Exception) -> str:
        """The error's first 400 characters, without the server's URL, which stands above the lines."""
        return str(error).replace(self._client.url, "").lstrip(":/ ")[:400]
