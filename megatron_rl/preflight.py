"""`megatron-rl check`: opens all that a start needs in one process, by the functions of the start itself.

It goes on after a failure, as long as what follows does not need what has failed. Servers are asked while the rest is
opened, and are not waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from megatron_rl.config.lab import WandbConfig
from megatron_rl.config.load import C, dump_config
from megatron_rl.config.resolve import Resolved, model_dirs, resolve
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.config.servers import read_urls
from megatron_rl.data.prompts import PromptDataset
from megatron_rl.data.sample import Prompt
from megatron_rl.engine.manifest import checkpoints, step_of
from megatron_rl.errors import UserError
from megatron_rl.finding import Finding
from megatron_rl.lab.alarms import check_alarms
from megatron_rl.lab.run import check_run_dir
from megatron_rl.lab.wandb_sink import check_wandb
from megatron_rl.loop.progress import check_steps, steps_of
from megatron_rl.models.architecture import Architecture
from megatron_rl.ranks.agreement import tell
from megatron_rl.ranks.world import read_world
from megatron_rl.rewards import Judges
from megatron_rl.rewards.trial import try_verifier
from megatron_rl.rollout.background import BackgroundLoop, results
from megatron_rl.rollout.client import SGLangClient, UnreachableError
from megatron_rl.rollout.pool import check_described, read_server_key
from megatron_rl.rollout.server import ServerError
from megatron_rl.rollout.server_needs import Needs
from megatron_rl.rollout.source import check_saved

SERVER_SECONDS = 5.0
"""Seconds for one answer of a server."""
MODEL = "model.path"
SHOWN = 120
"""Characters of a prompt."""


def run(cls: type[C], path: Path, overrides: Sequence[str], world_size: int | None) -> int:
    """Prints a line for each thing that is opened; returns the exit status."""
    findings = PrintedFindings()
    try:
        resolved = resolve(cls, path, overrides, world_size or read_world().size)
        check_alarms(resolved.config.lab.alarms)
    except UserError as error:
        hint = "" if world_size else "; --world-size says how many ranks the run will have"
        for line in str(error).splitlines():
            findings.add(Finding("fail", "configuration", line + (hint if line.startswith("parallel: ") else "")))
    else:
        tell(resolved.notes)
        findings.add(Finding("ok", "configuration", f"{path}, on {resolved.layout.world_size} ranks"))
        _open_all(findings, resolved)
    failed, skipped = (sum(each.state == state for each in findings.all) for state in ("fail", "skipped"))
    print(f"{len(findings.all)} checks: {failed} failed, {skipped} skipped")
    return UserError.status if failed else 0


class PrintedFindings:
    """What was found so far, each printed when it is found."""

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def add(self, finding: Finding) -> None:
        self.all.append(finding)
        print(finding, flush=True)

    def check(self, name: str, ask: Callable[[], str], needs: Sequence[str] = ()) -> None:
        """Adds what `ask` returns or raises, unless one of the checks in `needs` did not pass."""
        if missing := [each.check for each in self.all if each.check in needs and each.state != "ok"]:
            self.add(Finding("skipped", name, f"needs {missing[0]}"))
            return
        try:
            self.add(Finding("ok", name, ask()))
        except UserError as error:
            self.add(Finding("fail", name, str(error)))


def _open_all(findings: PrintedFindings, resolved: Resolved[C]) -> None:
    config = resolved.config
    loop = BackgroundLoop()
    try:
        servers: dict[str, Future[str]] = {}
        if isinstance(config, Config):
            servers = _ask_servers(config, loop)
        _open_models(findings, config)
        if isinstance(config, Config):
            _open_prompts(findings, config, resolved.arch)
        else:
            findings.check("data.train", partial(_examples, config, resolved.arch), needs=[MODEL])
        if (wandb := config.lab.wandb) is not None:
            findings.check("lab.wandb", partial(_wandb, wandb))
        findings.check("run_dir", partial(_run_dir, config))
        for url, answer in servers.items():
            findings.check(f"rollout server {url}", partial(_answer, answer), needs=["rollout.servers.api_key_env"])
    finally:
        loop.close()


def _run_dir(config: Config | SftConfig) -> str:
    said = check_run_dir(config.run_dir, dump_config(config))
    if not (saved := checkpoints(config.run_dir / "checkpoints")):
        return said
    made, steps = step_of(saved[-1]), steps_of(config)
    check_steps(config, made, f"the run in {config.run_dir}")
    return f"{said}: {made} of {steps} steps are made"


def _wandb(config: WandbConfig) -> str:
    check_wandb(config)
    return "the package is there, and a key unless the run stays offline"


def _open_models(findings: PrintedFindings, config: Config | SftConfig) -> None:
    from megatron_rl.loop.start_checks import start_checks  # imports torch, which takes seconds
    from megatron_rl.models.check import check_model

    def check(directory: Path, value_head: bool) -> str:
        check_model(directory, value_head)
        return f"{directory}: config.json, headers of the weights, tokenizer"

    for key, directory, value_head in model_dirs(config):
        findings.check(key, partial(check, directory, value_head))
    for key, ask in start_checks(config):
        findings.check(key, ask, needs=["engine.device"] if key == "rollout.servers" else ())


# ---- data ------------------------------------------------------------------------------------------------------


def _open_prompts(findings: PrintedFindings, config: Config, arch: Architecture) -> None:
    """Reads data and its first record's way to a verdict, or the saved rollouts that are replayed."""
    if (saved := config.rollout.replay_from) is not None:
        check_replay = partial(_saved, saved, config, arch)
        findings.check("rollout.replay_from", check_replay)
        return
    from megatron_rl.loop.run_prompts import open_turns, read_prompts
    from megatron_rl.models.tokenizer import load_tokenizer

    prompts: dict[str, PromptDataset] = {}

    def read(key: str, source: str) -> str:
        prompts[key] = found = read_prompts(config, source, load_tokenizer(config.model.path), arch.vocab_size)
        return f"{len(found)} prompts; the first, {found[0].id!r}, has {len(found[0].token_ids)} tokens"

    def converse() -> str:
        turns = open_turns(config, load_tokenizer(config.model.path), prompts["data.train"][0])
        assert turns is not None
        turns.environments.close()
        return f"opened a conversation on prompt {prompts['data.train'][0].id!r}"

    verifier = ["data.verifier"]
    findings.check("data.train", partial(read, "data.train", config.data.train), needs=[MODEL, *verifier])
    if config.data.heldout is not None:
        findings.check("data.heldout", partial(read, "data.heldout", config.data.heldout), needs=[MODEL, *verifier])
    if config.data.chat_template:
        findings.check("data.chat_template", lambda: shown(prompts["data.train"][0].text), needs=["data.train"])
    findings.check("verdict", lambda: _verdict(config, prompts["data.train"][0]), needs=["data.train"])
    if config.rollout.environment is not None:
        needs = ["data.train", "rollout.environment.name"]
        findings.check("rollout.environment", converse, needs=needs)


def _verdict(config: Config, prompt: Prompt) -> str:
    with Judges.of(config.reward) as judges:
        verdict = try_verifier(judges, prompt)
    if verdict is None:
        return f"by {prompt.verifier}, which is built in"
    right = "correct" if verdict.correct else "not correct"
    return f"{prompt.verifier} gives {verdict.reward:g}, {right}, for the reference {shown(prompt.answer)} as response"


def _saved(saved: Path, config: Config, arch: Architecture) -> str:
    check_saved(config, arch)
    return f"{saved} has the rollouts of {config.train.steps} steps"


def _examples(config: SftConfig, arch: Architecture) -> str:
    from megatron_rl.loop.run_prompts import read_examples

    return f"{len(read_examples(config, arch.vocab_size))} examples"


def shown(text: str) -> str:
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."


# ---- servers ---------------------------------------------------------------------------------------------------


def _ask_servers(config: Config, loop: BackgroundLoop) -> dict[str, Future[str]]:
    """Begins to ask the servers given by URL what they are. The configuration has been checked."""
    servers = config.rollout.servers
    if not servers.are_elsewhere or config.rollout.replay_from is not None:
        return {}
    key = None
    with contextlib.suppress(UserError):  # the check of the key says so
        key = read_server_key(config)
    file, needs = servers.urls_file, Needs.of(config, None)
    urls = servers.urls if file is None else read_urls(file, have_key=servers.api_key_env is not None)

    async def ask(url: str) -> str:
        async with SGLangClient(url, api_key=key, deadline=SERVER_SECONDS, max_tries=1) as client:
            return await check_described(client, needs)

    return {url: loop.start(ask(url)) for url in urls}


def _answer(answer: Future[str]) -> str:
    try:
        return results([answer])[0]
    except UnreachableError as error:
        raise ServerError(
            f"{error}; is it started, and is its URL right? A run would wait rollout.servers.start_timeout for it"
        ) from None
