"""What an RL run holds beside the trainer: prompts, servers and the weight sync. Built by `open_session`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import orjson

from megatron_rl.config.schema import Config, DynamicSamplingConfig
from megatron_rl.data.prompts import PromptCursor, PromptDataset
from megatron_rl.data.sample import Group
from megatron_rl.data.store import write_groups
from megatron_rl.engine.device import resolve_device
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.manifest import State
from megatron_rl.errors import UserError
from megatron_rl.lab.metrics import ROLLOUT, overlong_metrics, rollout_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.custom import get_objective
from megatron_rl.ranks.collectives import all_gather_bytes, broadcast_bytes, together
from megatron_rl.rewards import check_verifier, grade
from megatron_rl.rewards.shaping import filter_overlong, shape_rewards, without_lost
from megatron_rl.rollout.dynamic import Search, Tally, check_verdicts
from megatron_rl.rollout.evaluate import evaluation
from megatron_rl.rollout.pool import Pool, read_api_key
from megatron_rl.rollout.sampler import Sampling
from megatron_rl.rollout.source import Leader, Wanted, check_headers, first_server, rollout_file, saved_groups
from megatron_rl.routing.drift import RoutingStats
from megatron_rl.routing.exchange import RouteExchange, valid_rows
from megatron_rl.routing.modes import MiniBatchRouting
from megatron_rl.routing.shift import RouterShift
from megatron_rl.routing.wire import RouteSpec
from megatron_rl.run_prompts import RunPrompts
from megatron_rl.stop import Interrupted
from megatron_rl.trainer import Trainer, open_trainer
from megatron_rl.weights.sync import WeightSync

if TYPE_CHECKING:  # experience imports this module
    from megatron_rl.experience import Update


class Session:
    """An RL run after `step` rollout steps; the policy is then weight version `step`. Without servers, when rollouts
    are replayed, `sync_weights` and `evaluate` do nothing."""

    def __init__(
        self, trainer: Trainer, config: Config, prompts: RunPrompts, pool: Pool | None, leader: Leader | None
    ) -> None:
        """`pool` is rank 0's, `leader` each data-parallel leader's; None elsewhere and without servers."""
        self.trainer = trainer
        self.config = config
        self.step = 0
        self.owes_evaluation = True
        """Whether the evaluation of `step` is due and not made."""
        self._cursor = PromptCursor(config.seed)
        self._pool = pool
        self._leader = leader
        self._leads = trainer.place.leads_replica
        self._has_servers = config.rollout.replay_from is None
        # What the rollout's routes must look like; None: they are not needed.
        self._routes = RouteSpec.of(trainer.policy.arch) if config.routing.needs_rollout_routes else None
        self.route_exchange = None
        if self._routes is not None:
            policy = trainer.policy
            self.route_exchange = RouteExchange(policy.arch, policy.routers.layers, trainer.place, trainer.layout)
        self._tokenizer = prompts.tokenizer
        self._judges = prompts.judges
        self._prompts = prompts.train
        self._heldout = prompts.heldout if pool else None
        first = leader if trainer.place.rank == 0 else None
        directory, temperature = trainer.run.path / "weights", config.rollout.temperature
        self._weights = WeightSync(config.weights, trainer.policy, first, directory, temperature)
        self._rollout_metrics: dict[str, float] = {}
        self._sync_metrics: dict[str, float] = {}

    def rollout(self) -> list[Group]:
        """This leader's share of the groups that the next step trains on, their rewards shaped; [] off the leaders."""
        config = self.config
        sampled, kept, figures = self._groups()
        # With the verifiers' own verdicts: who replays them shapes them.
        file = rollout_file(self.trainer.run.rollouts, self.step + 1, self.trainer.place.dp)
        with self.trainer.writing(f"the rollout of step {self.step + 1} was not written", file):
            if self._prompts is not None:
                write_groups(
                    file,
                    kept,
                    weight_version=self.step,
                    temperature=config.rollout.temperature,
                    vocab_size=self.trainer.policy.arch.vocab_size,
                )
        longest = config.rollout.max_response_tokens
        metrics = MetricAccumulator(ROLLOUT)
        rollout_metrics(metrics, shape_rewards(sampled, config.reward, longest), self.step)
        overlong_metrics(metrics, sampled, kept, config.reward, longest)
        figures = {f"dynamic_sampling/{name}": value for name, value in figures.items()}
        figures |= self.trainer.reduce(metrics, holds_samples=self._leads)
        self._rollout_metrics = {f"rollout/{name}": value for name, value in figures.items()}
        return filter_overlong(shape_rewards(without_lost(kept), config.reward, longest), config.reward)

    def _groups(self) -> tuple[list[Group], list[Group], dict[str, float]]:
        """All groups that were sampled, those to train on, and figures of the choice.

        Raises UserError, on every rank and with a checkpoint of the steps before, if the groups cannot be had, and
        Stopped if the run is to stop: the groups of this step are then sampled once more on resume.
        """
        config, start = self.config.rollout, self._cursor
        try:
            if not self._has_servers:
                groups = self._saved()
                return groups, groups, {}
            if config.dynamic_sampling is None:
                groups = self._sample(config.prompts_per_step)
                check_verdicts(self._all_tallies(groups))
                return groups, groups, {}
            sampled, search = self._search(config.dynamic_sampling)
            return sampled, search.keep(sampled), search.figures()
        except (UserError, Interrupted) as error:
            self._cursor = start
            self.save()
            if isinstance(error, Interrupted):
                self.trainer.stop_if_asked(self.step)
            raise

    def _saved(self) -> list[Group]:
        """This leader's share of the next step's groups of another run. Collective."""
        path, place, dp = self.config.rollout.replay_from, self.trainer.place, self.trainer.layout.dp
        assert path is not None
        groups: list[Group] = []
        with together(place.control):
            if self._leads:
                asked = _wanted(self.config, self.trainer)
                groups = saved_groups(path, self.step + 1, place.dp, dp, wanted=asked, needs_traces=self._routes)
        return groups

    def _search(self, config: DynamicSamplingConfig) -> tuple[list[Group], Search]:
        """All groups that this leader sampled until there were mixed ones enough over all leaders. Collective."""
        search = Search(config, self.config.rollout.prompts_per_step)
        groups: list[Group] = []
        while count := search.next_count():
            judged = self._sample(count, first=len(search.tallies))
            groups += judged
            with self.trainer.phase("rollout"):
                search = search.after(self._all_tallies(judged))
            check_verdicts(search.tallies)
        return groups, search

    def _all_tallies(self, groups: Sequence[Group]) -> list[Tally]:
        mine = orjson.dumps([dataclasses.astuple(Tally.of(group)) for group in groups])
        parts = all_gather_bytes(mine, self.trainer.place.control)
        return [Tally(*row) for part in parts for row in orjson.loads(part)]

    def _sample(self, count: int, first: int = 0) -> list[Group]:
        """This leader's share of the next `count` prompts, sampled, judged and numbered from `first` on; [] off the
        leaders. Raises Interrupted, on every rank, if a signal came meanwhile. Collective."""
        groups: list[Group] = []
        with together(self.trainer.place.control), contextlib.suppress(Interrupted):
            if self._prompts is not None:
                groups = self._ask(self._prompts, count, first)
        self.trainer.check_interrupted()
        return groups

    def _ask(self, dataset: PromptDataset, count: int, first: int) -> list[Group]:
        assert self._leader is not None
        config, place = self.config.rollout, self.trainer.place
        prompts, self._cursor = dataset.take(self._cursor, count)
        share = [(i, p) for i, p in enumerate(prompts, first) if i % self.trainer.layout.dp == place.dp]
        with self.trainer.phase("rollout"):
            self._check_servers()
            sampling = self._sampling(config.group_size, config.temperature, self._routes)
            with self.trainer.wait():
                groups = self._leader.sample(share, sampling)
        with self.trainer.phase("rewards"):
            return grade(groups, self._decode, self._judges)

    def routing(self, mini_batch: MiniBatch) -> MiniBatchRouting | None:
        """What the routers do in this mini-batch's passes; None for a dense model."""
        policy, place = self.trainer.policy, self.trainer.place
        if not policy.arch.num_experts:
            return None
        valid = [valid_rows(batch, policy.layout, place, policy.device) for batch in mini_batch.micro_batches]
        shifts = self.config.objective.router_shift is not None
        return MiniBatchRouting(
            self.config.routing,
            policy.routers,
            None if mini_batch.routes is None else [routes.to(policy.device) for routes in mini_batch.routes],
            valid,
            RoutingStats(policy.arch.moe_layers, policy.arch.num_experts, policy.arch.experts_per_token, policy.device),
            RouterShift([len(rows) for rows in valid], policy.device) if shifts else None,
        )

    def update(self, update: Update) -> None:
        """The optimizer steps of one mini-batch, the policy's and the critic's, and their line in metrics.jsonl."""
        trainer, mini_batch, critic = self.trainer, update.mini_batch, self.config.critic
        metrics = dict(self._rollout_metrics) if mini_batch.index == 0 else {}
        if critic is None or self.step >= critic.warmup_steps:
            metrics |= trainer.update(mini_batch, update.loss, update.routing)
        if update.value_loss is not None:
            metrics |= trainer.update_critic(mini_batch, update.value_loss)
        trainer.log_update(self.step + 1, mini_batch.index, self.step, metrics)
        trainer.check_skipped()

    def sync_weights(self) -> None:
        """All servers hold weight version `step` afterwards."""
        if self._has_servers:
            with self.trainer.phase("weight sync"):
                self._check_servers()
                self._sync_metrics = self._weights.push(self.step)

    def finish_step(self) -> None:
        """Counts the step, syncs its weights and shows it."""
        self.step += 1
        self.owes_evaluation = self.due(self.config.eval.every)
        self.sync_weights()
        traces = self.route_exchange.drain() if self.route_exchange else {}
        last = self.step == self.config.train.steps
        times = self.trainer.finish_step({**self._sync_metrics, **traces}, last=last)
        figures = self._rollout_metrics
        shown = {
            "reward": figures["rollout/reward/mean"],
            "accuracy": figures["rollout/accuracy"],
            "tokens/s": figures["rollout/tokens"] / max(sum(times.values()), 1e-9),
        }
        self.trainer.console.step(self.step, shown, times)

    def finish_epochs(self, updates: Sequence[Update]) -> None:
        """The critic's passes over the rollout batch after the first. Its metrics are those of the first, of responses
        that it had not been trained on; of these passes they have the gradients, under critic/later/."""
        later = [] if self.config.critic is None else list(updates) * (self.config.critic.epochs - 1)
        results = []
        for update in later:
            assert update.value_loss is not None
            results.append(self.trainer.step_critic(update.mini_batch, update.value_loss))
            norms = [result.grad_norm for result in results if not result.skipped]
            figures = {"critic/later/grad_norm/max": max(norms)} if norms else {}
            self.trainer.add_to_line({**figures, "critic/later/skipped": float(len(results) - len(norms))})
            self.trainer.check_skipped()

    def due(self, every: int) -> bool:
        """Every so many steps, and after the last."""
        return self.step == self.config.train.steps or (every > 0 and self.step % every == 0)

    def evaluate(self) -> None:
        """Held-out prompts, asked by rank 0; the other ranks go on and wait at the next collective. A run that stops
        owes it to its resume."""
        if not self.trainer.stopping:
            with contextlib.suppress(Interrupted):
                self._evaluate()
                self.owes_evaluation = False

    def _evaluate(self) -> None:
        if self._heldout is None:
            return
        assert self._leader is not None
        config = self.config.eval
        count = min(len(self._heldout), config.prompts or len(self._heldout))
        prompts = [(i, self._heldout[i]) for i in range(count)]
        with self.trainer.phase("evaluation"):
            with self.trainer.wait():
                sampled = self._leader.sample(prompts, self._sampling(config.samples, config.temperature))
            groups = grade(sampled, self._decode, self._judges)
        report = evaluation(groups) | self.trainer.console.timer.take("evaluation")
        self.trainer.run.log_eval(self.step, self.step, report)
        self.trainer.console.heldout(report["avg_at_k"])

    def export(self) -> None:
        self.trainer.export(self.trainer.policy, self.trainer.run.path / "model")
        if self.trainer.critic is not None:
            self.trainer.export(self.trainer.critic, self.trainer.run.path / "critic")

    def checkpoint(self) -> None:
        """Saves if it is due. Raises Stopped, on every rank, if the run is to stop."""
        if self.trainer.checkpoint_due(self.step):
            self.save()
        self.trainer.stop_if_asked(self.step)

    def save(self) -> None:
        """A checkpoint of `step`, if there is none yet."""
        self.trainer.save(
            State(
                step=self.step,
                cursor=self._cursor.as_json(),
                weight_version=self.step,
                evaluated=not self.owes_evaluation,
            )
        )

    def begin(self) -> None:
        """Begins the run, or resumes it from the newest whole checkpoint."""
        state = self.trainer.begin()
        if state is not None:
            self.step, self.owes_evaluation = state.step, not state.evaluated
            self._cursor = PromptCursor(**state.cursor)

    def close(self) -> None:
        self._judges.close()
        self._weights.close()

    def _sampling(self, samples: int, temperature: float, routes: RouteSpec | None = None) -> Sampling:
        return Sampling(
            samples=samples,
            max_response_tokens=self.config.rollout.max_response_tokens,
            temperature=temperature,
            concurrency=self.config.rollout.concurrency,
            vocab_size=self.trainer.policy.arch.vocab_size,
            versions=frozenset({self.step}),
            routes=routes,
        )

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def _check_servers(self) -> None:
        if self._pool is not None:
            self._pool.check_alive()


def check_start(config: Config) -> None:
    """Checks what else this rank needs before it joins the others: its device, the servers' key, own code. Raises
    UserError."""
    resolve_device(config.engine.device)
    if config.rollout.servers.api_key_env:
        read_api_key(config.rollout.servers.api_key_env, "rollout.servers.api_key_env")
    get_objective(config.objective)
    check_verifier(config)


@contextlib.contextmanager
def open_session(config: Config, resume: bool) -> Iterator[Session]:
    """The run on this rank, its servers started if need be, resumed from the newest complete checkpoint if asked."""
    temperature = config.rollout.temperature
    servers = config.rollout.servers
    api_key = read_api_key(servers.api_key_env, "rollout.servers.api_key_env") if servers.api_key_env else None
    with (
        open_trainer(config, steps=config.train.steps, resume=resume, temperature=temperature) as trainer,
        ExitStack() as stack,
    ):
        # Before servers are started, and before the run's files are touched.
        with together(trainer.place.control):
            prompts = RunPrompts.load(config, trainer.place, trainer.policy.arch.vocab_size)
            _check_saved(config, trainer)
        pool, leader = None, None
        if config.rollout.replay_from is None:
            pool, leader = _connect(config, trainer, api_key, stack)
        session = Session(trainer, config, prompts, pool, leader)
        try:
            session.begin()
            yield session
        finally:  # servers that run elsewhere are to be of use to the next run, whatever ended this one
            session.close()


def _check_saved(config: Config, trainer: Trainer) -> None:
    """Checks on rank 0 that there are rollouts for the steps to come, if they are replayed, and that they fit: those of
    the first step whole, the others as far as their headers tell. Raises as saved_groups does."""
    path, state = config.rollout.replay_from, trainer.resumes_from
    if path is not None and trainer.place.rank == 0:
        wanted, first = _wanted(config, trainer), state.step + 1 if state else 1
        for step in range(first, config.train.steps + 1):
            check_headers(path, step, wanted)
        if first <= config.train.steps:
            saved_groups(path, first, 0, 1, wanted=wanted)


def _wanted(config: Config, trainer: Trainer) -> Wanted:
    return Wanted(
        prompts=config.rollout.prompts_per_step,
        group_size=config.rollout.group_size,
        max_tokens=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        vocab_size=trainer.policy.arch.vocab_size,
    )


def _connect(
    config: Config, trainer: Trainer, api_key: str | None, stack: ExitStack
) -> tuple[Pool | None, Leader | None]:
    """Rank 0 starts or checks the servers and tells the leaders where they are."""
    place, rollout = trainer.place, config.rollout
    pool = None
    if place.rank == 0:
        pool = stack.enter_context(
            Pool(
                rollout,
                config.engine,
                config.model.path,
                trainer.run.logs,
                config.seed,
                return_routed_experts=config.routing.needs_rollout_routes,
                api_key=api_key,
            )
        )
    told = orjson.dumps([pool.urls, None if rollout.servers.urls else pool.api_key]) if pool else None
    urls, random_key = orjson.loads(broadcast_bytes(told, place.control))
    if not place.leads_replica:
        return None, None
    leader = Leader(
        urls,
        api_key=random_key or api_key,
        deadline=rollout.deadline,
        first=first_server(place.dp, trainer.layout.dp, len(urls)),
        check=pool.check_alive if pool else lambda: None,
    )
    stack.callback(leader.close)
    return pool, leader
