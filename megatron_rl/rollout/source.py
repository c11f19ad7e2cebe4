"""Gets a leader's groups from live servers, or from the saved rollouts of another run."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.data.sample import Group, Prompt, Sample
from megatron_rl.data.step_files import rollout_files
from megatron_rl.data.store import StoreError, read_groups, read_header
from megatron_rl.data.top_tokens import TopTokensError
from megatron_rl.data.trace import TraceError
from megatron_rl.data.vocabulary import unknown_token
from megatron_rl.errors import MissingFileError
from megatron_rl.lab.console_page import ServerLoad
from megatron_rl.models.architecture import Architecture
from megatron_rl.ranks.activity import Activity
from megatron_rl.rollout.abandon import abandon_requests
from megatron_rl.rollout.answers import RolloutError
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import MemoryTag, SGLangClient
from megatron_rl.rollout.deadlines import Deadlines
from megatron_rl.rollout.fleet import Fleet, Member
from megatron_rl.rollout.sampler import Sampler, Sampling, rollout_groups
from megatron_rl.rollout.server import ServerError
from megatron_rl.rollout.transport import IDLE_SECONDS
from megatron_rl.routing.wire import RouteSpec


@dataclass(frozen=True)
class Wanted:
    """What a run that replays saved rollouts trains on in each step."""

    prompts: int  # rollout.prompts_per_step
    group_size: int
    max_tokens: int  # prompt and response together
    temperature: float
    vocab_size: int
    top_k: int = 0
    """mu's most likely tokens that each token of a response must have; 0: none are needed."""

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> Wanted:
        return cls(
            prompts=config.rollout.prompts_per_step,
            group_size=config.rollout.group_size,
            max_tokens=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            temperature=config.rollout.temperature,
            vocab_size=vocab_size,
            top_k=top_k(config, vocab_size),
        )


def top_k(config: Config, vocab_size: int) -> int:
    """How many of mu's most likely tokens the run needs at each token; 0 without score centering."""
    centering = config.objective.centering
    return 0 if centering is None else min(centering.top_k, vocab_size)


def check_saved(config: Config, arch: Architecture, first_step: int = 1) -> None:
    """Checks, if rollouts are replayed, that there are rollouts for the steps from `first_step` on, and that they fit:
    the first step's whole, the others as far as their headers tell. Raises as saved_groups does."""
    path = config.rollout.replay_from
    if path is None:
        return
    wanted = Wanted.of(config, arch.vocab_size)
    for step in range(first_step, config.train.steps + 1):
        check_headers(path, step, wanted)
    if first_step <= config.train.steps:
        traces = RouteSpec.of(arch) if config.routing.needs_rollout_routes else None
        saved_groups(path, first_step, 0, 1, wanted=wanted, needs_traces=traces)


def saved_groups(
    run_dir: Path, step: int, share: int, of: int, *, wanted: Wanted, needs_traces: RouteSpec | None = None
) -> list[Group]:
    """Every `of`-th group of a saved step, whatever layout wrote it.

    With `needs_traces` each sample must have a routing trace of this model. Raises MissingFileError if a file is not
    there. Raises StoreError if a file is damaged or does not match `wanted`, or if a sample lacks its trace.
    """
    check_headers(run_dir, step, wanted)
    by_file = {file: read_groups(file) for file in _files(run_dir, step)}
    _check_sizes(by_file, wanted)
    mine = []
    for file, groups in by_file.items():
        for group in groups:
            for sample in group.samples:
                _check_sample(file, sample, wanted)
        share_of_file = [group for group in groups if group.index % of == share]
        if needs_traces is not None:
            _check_traces(file, share_of_file, needs_traces)
        mine += share_of_file
    return sorted(mine, key=lambda group: group.index)


def check_headers(run_dir: Path, step: int, wanted: Wanted) -> None:
    """Checks the header lines of a step's files. Raises as saved_groups does."""
    headers = {file: read_header(file) for file in _files(run_dir, step)}
    for file, header in headers.items():
        if header.weight_version != step - 1:
            raise StoreError(
                f"{file}: found rollouts of weight version {header.weight_version}, but step {step} trains on version "
                f"{step - 1}; the file belongs to another step"
            )
        if header.temperature not in (None, wanted.temperature):
            raise StoreError(
                f"{file}: log-probs are of temperature {header.temperature}, but rollout.temperature is "
                f"{wanted.temperature}; set it to {header.temperature}"
            )
        if header.vocab_size not in (None, wanted.vocab_size):
            raise StoreError(
                f"{file}: the model that sampled it has a vocabulary of {header.vocab_size}, but model.path has "
                f"{wanted.vocab_size}; token ids differ between the two"
            )
    groups = sum(header.groups for header in headers.values())
    if groups != wanted.prompts:
        _refuse_size({file: read_groups(file) for file in headers}, f"rollout.prompts_per_step is {wanted.prompts}")


def _files(run_dir: Path, step: int) -> list[Path]:
    files = rollout_files(run_dir / "rollouts", step)
    if not files:
        raise MissingFileError(
            f"rollout.replay_from: {run_dir / 'rollouts'} has no rollouts of step {step}; train.steps asks for it"
        )
    return files


def _check_sizes(by_file: Mapping[Path, Sequence[Group]], wanted: Wanted) -> None:
    """Raises StoreError unless groups 0 to prompts - 1 are there, each once and complete."""
    first_of: dict[int, Path] = {}
    for file, groups in by_file.items():
        for group in groups:
            if group.index in first_of:
                raise StoreError(f"{file}: group {group.index} is there twice; {first_of[group.index]} has it too")
            if len(group.samples) != wanted.group_size:
                _refuse_size(by_file, f"rollout.group_size is {wanted.group_size}")
            first_of[group.index] = file
    if missing := set(range(wanted.prompts)) - set(first_of):
        raise StoreError(f"{next(iter(by_file))}: group {min(missing)} is missing, and {len(missing) - 1} more")


def _refuse_size(by_file: Mapping[Path, Sequence[Group]], wanted: str) -> None:
    """Raises StoreError, which lists what is there in one line, however many files there are."""
    sizes = Counter(len(group.samples) for groups in by_file.values() for group in groups)
    found = " and ".join(f"{count} groups of {size} samples" for size, count in sorted(sizes.items())) or "no groups"
    others = f" and {len(by_file) - 1} more files of its step" if len(by_file) > 1 else ""
    raise StoreError(
        f"{next(iter(by_file))}{others}: {found}, but {wanted}; a replayed step uses all its saved groups, so set the "
        "same sizes"
    )


def _check_sample(file: Path, sample: Sample, wanted: Wanted) -> None:
    where = f"{file}: prompt {sample.prompt.id!r} sample {sample.index}"
    if unknown := unknown_token(sample.token_ids.tolist(), wanted.vocab_size):
        raise StoreError(f"{where}: {unknown}")
    if not sample.prompt.token_ids:
        raise StoreError(f"{where}: its prompt has no tokens; nothing predicts the first of the response")
    if len(sample.token_ids) > wanted.max_tokens:
        raise StoreError(
            f"{where}: {len(sample.token_ids)} tokens, but data.max_prompt_tokens + rollout.max_response_tokens is "
            f"{wanted.max_tokens}; raise them to replay it"
        )
    if sample.verdict is None:
        raise StoreError(f"{where}: no verdict; it was saved before it was judged")
    if wanted.top_k:
        _check_top_tokens(where, sample, wanted)


def _check_top_tokens(where: str, sample: Sample, wanted: Wanted) -> None:
    top = sample.top_tokens
    if top is None:
        raise StoreError(
            f"{where}: top_tokens: none are there; objective.centering needs rollouts that were saved by a run with it"
        )
    if top.k != wanted.top_k:
        raise StoreError(
            f"{where}: top_tokens: {top.k} for each token, but objective.centering.top_k, or the vocabulary if that is "
            f"smaller, is {wanted.top_k}; set it to {top.k}"
        )
    try:
        top.check_vocabulary(wanted.vocab_size)
    except TopTokensError as error:
        raise StoreError(f"{where}: top_tokens: {error}") from None


def _check_traces(file: Path, groups: Sequence[Group], routes: RouteSpec) -> None:
    for sample in (sample for group in groups for sample in group.samples):
        where = f"{file}: prompt {sample.prompt.id!r} sample {sample.index}: trace"
        if sample.trace is None:
            raise StoreError(
                f"{where}: none is there; routing.replay r3 and routing.observe_rollout need rollouts that were "
                "saved by a run with one of them"
            )
        try:
            routes.check(sample.trace)
        except TraceError as error:
            raise StoreError(f"{where}: {error}") from None


def first_server(dp: int, leaders: int, servers: int) -> int:
    """The server at which leader `dp` of `leaders` begins to deal its groups, so that all servers get groups."""
    return dp * servers // leaders


class Leader:
    """A data-parallel leader's connections to all servers."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str | None,
        deadline: float,
        concurrency: int = 1,
        first: int = 0,
        idle_seconds: float = IDLE_SECONDS,
        check: Callable[[str], None] = lambda url: None,
        activity: Activity | None = None,
    ) -> None:
        """Groups go to the servers in turn, from number `first` on; if all leaders began with the same server, others
        would stay idle. At most `concurrency` requests are in flight. `idle_seconds` as of SGLangClient. `check`
        raises if a launched server has died: Pool.check, on the rank with the pool."""
        self.loop = BackgroundLoop()
        self._deadlines = Deadlines()
        self._opened: dict[str, SGLangClient] = {}
        self._open: Callable[[str], SGLangClient] = lambda url: SGLangClient(
            url,
            api_key=api_key,
            deadline=deadline,
            idle_seconds=idle_seconds,
            check=functools.partial(check, url),
            activity=activity,
            deadlines=self._deadlines,
        )
        self._fleet = Fleet([self.client(url) for url in (*urls[first:], *urls[:first])])
        self._sampler = Sampler(self._fleet, concurrency)

    @property
    def clients(self) -> list[SGLangClient]:
        """Clients of the live servers. Raises as Fleet.live does."""
        return [member.client for member in self._fleet.live]

    @property
    def urls(self) -> list[str]:
        """The live servers; there may be none."""
        return [member.url for member in self._fleet.members if member.error is None]

    @property
    def ejected(self) -> dict[str, str]:
        """Says by URL why servers were ejected."""
        return {member.url: str(member.error) for member in self._fleet.members if member.error is not None}

    @property
    def load(self) -> ServerLoad:
        """What is asked of the servers at the moment. Any thread may look."""
        members = list(self._fleet.members)
        live = sum(member.error is None for member in members)
        running = sum(len(member.requests) for member in members)
        return ServerLoad(live, len(members), running, self._sampler.waiting)

    def client(self, url: str) -> SGLangClient:
        """Returns the leader's client of a server, live or not."""
        if url not in self._opened:
            self._opened[url] = self._open(url)
        return self._opened[url]

    def admit(self, urls: Sequence[str], lost: Mapping[str, str]) -> None:
        """Samples from these servers, which hold the newest weights, and no others; `lost` says by URL why."""

        async def admit() -> None:
            self._fleet.admit([self.client(url) for url in urls], lost)

        self.loop.run(admit())

    async def group(self, number: int, prompt: Prompt, sampling: Sampling) -> Group:
        """Samples a group, on the loop. Raises RolloutError, and what `check` raises."""
        return await self._sampler.group(number, prompt, sampling)

    def sample(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling) -> list[Group]:
        """Samples groups and waits for all. Raises as `group` does."""
        return self.loop.run(rollout_groups(self._sampler, prompts, sampling))

    def pause(self, *, tell: bool) -> None:
        """Expects no answers until `resume`. With `tell` the servers put aside the requests in flight, without their
        cached keys and values; one that refuses is ejected."""
        self.loop.run(self._expect_answers(False))
        if tell:
            self.loop.run(self._tell(lambda client: client.pause_generation("retract")))

    def resume(self, *, tell: bool) -> None:
        if tell:
            self.loop.run(self._tell(SGLangClient.continue_generation))
        self.loop.run(self._expect_answers(True))

    def abandon_requests(self) -> None:
        """Ends what a trainer that was killed has left in flight. A server that refuses is ejected."""
        self.loop.run(self._tell(abandon_requests))

    def release_memory(self, tags: Sequence[MemoryTag], *, tell: bool) -> None:
        """Expects no answers until `resume_memory`. With `tell` all servers, ejected ones too, put requests in flight
        aside, and free their GPUs' memory of these kinds. Raises RolloutError and ServerError."""
        self.loop.run(self._expect_answers(False))
        if tell:
            self.loop.run(self._all(lambda client: client.pause_generation("retract")))
            self.loop.run(self._all(lambda client: client.release_memory(tags)))

    def resume_memory(self, tags: Sequence[MemoryTag], *, answers: bool, tell: bool) -> None:
        """With `tell` all servers take memory again, and with `answers` they then go on with requests. Raises as
        `release_memory`."""
        if tell:
            self.loop.run(self._all(lambda client: client.resume_memory(tags)))
            if answers:
                self.loop.run(self._all(SGLangClient.continue_generation))
        if answers:
            self.loop.run(self._expect_answers(True))

    async def _expect_answers(self, expected: bool) -> None:
        self._fleet.paused = not expected
        if expected:
            self._deadlines.resume()
        else:
            self._deadlines.pause()

    async def _all(self, call: Callable[[SGLangClient], Coroutine[Any, Any, None]]) -> None:
        await asyncio.gather(*map(call, self._opened.values()))

    async def _tell(self, call: Callable[[SGLangClient], Coroutine[Any, Any, None]]) -> None:
        """Calls all live servers, and ejects those that refuse."""

        async def tell(member: Member) -> None:
            try:
                await call(member.client)
            except (RolloutError, ServerError) as error:
                self._fleet.eject(member, error)

        await asyncio.gather(*(tell(member) for member in self._fleet.members if member.error is None))

    def close(self) -> None:
        for client in self._opened.values():
            self.loop.run(client.close())
        self.loop.close()
