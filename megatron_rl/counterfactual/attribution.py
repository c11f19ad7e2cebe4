"""`megatron-rl attribute`: where |log pi_old - log mu| on a saved rollout batch comes from.

The trainer's forward pass, in fp32 with live routing, is the baseline. Each substitution replaces one part of it by
what the rollout engine did (its experts, from the traces) or may have done (a part in bf16). If the mismatch shrinks,
the part explains that share of it. Then all parts that explain something are substituted together: what is left is
attributed to nothing, and the sum of the single shares less the joint one is their interaction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from megatron_rl.config.fp8_products import refuse_fp8
from megatron_rl.config.load import ConfigError
from megatron_rl.config.schema import Config, RoutingConfig
from megatron_rl.counterfactual.attribution_lines import (
    GATES,
    PRECISION,
    ROUTING,
    Findings,
    Gap,
    LayerShare,
    Substitution,
    attribution_lines,
    print_attribution,
)
from megatron_rl.counterfactual.contrasts import ExpertContrast
from megatron_rl.counterfactual.localise import Visits
from megatron_rl.counterfactual.ratio_figures import Doubles
from megatron_rl.counterfactual.saved_batch import SavedBatch, gather_tokens, joined, load_batch, write_lines
from megatron_rl.counterfactual.substitutions import PARTS, RoundedGates, orders_experts, substituted
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.policy import Policy
from megatron_rl.loop.trainer import Trainer, open_trainer
from megatron_rl.routing.drift import RoutingStats
from megatron_rl.routing.exchange import reduce_stats, valid_rows
from megatron_rl.routing.modes import MiniBatchRouting
from megatron_rl.routing.replay import RoutingPass
from megatron_rl.routing.slicing import RankRoutes

__all__ = ["attribute", "check_attribution", "print_attribution"]

OUTPUT = "attribution.jsonl"
EXPLAINS = 0.02
"""Share from which on a part takes part in the joint substitution."""
MakePass = Callable[[Policy, MiniBatch], RoutingPass]
Tokens = list[dict[int, Doubles]]


def check_attribution(config: Config) -> None:
    """Raises UserError if there is nothing to attribute."""
    if config.rollout.replay_from is None:
        raise ConfigError("rollout.replay_from: not set; name the run directory whose saved rollouts are studied")
    refuse_fp8(config.engine)


def attribute(config: Config, step: int) -> list[dict[str, object]]:
    """Runs the attribution, writes run_dir/attribution.jsonl and returns its lines; [] on ranks other than 0.

    Collective. Raises UserError, on every rank, if the rollouts or the model do not fit the configuration.
    """
    exact = config.model_copy(update={"engine": config.engine.model_copy(update={"dtype": "fp32"})})
    with open_trainer(exact, steps=1, resume=False, temperature=config.rollout.temperature) as trainer:
        with trainer.console.starting("data", f"step {step} of {config.rollout.replay_from}"):
            batch = load_batch(exact, trainer, step)
        trainer.begin()
        study = _Attribution(exact, trainer, batch)
        tokens = sum(map(len, (values for each in study.mu for values in each.values())))
        found = study.run()
        lines = []
        if trainer.place.rank == 0:
            lines = attribution_lines(found, str(config.rollout.replay_from), step, tokens)
        write_lines(trainer, "the attribution", OUTPUT, lines)
    return lines


class _Attribution:
    """One attribution on this rank. Its methods are collective."""

    def __init__(self, config: Config, trainer: Trainer, batch: SavedBatch) -> None:
        self.config = config
        self.trainer = trainer
        self.policy = trainer.policy
        self.mini_batches = batch.mini_batches
        self.without_traces = batch.without_traces
        mu = [[torch.as_tensor(b.rollout_logprobs) for b in mini.micro_batches] for mini in self.mini_batches]
        if not self.policy.is_last_stage:
            mu = [[] for _ in self.mini_batches]
        self.mu = gather_tokens(self.mini_batches, mu, trainer.place)

    @property
    def replays(self) -> bool:
        """Whether the rollout's routes can be replayed."""
        return bool(self.policy.arch.num_experts) and not self.without_traces

    def run(self) -> Findings:
        before, changes = self._baseline()
        rows = [self._single(name) for name in (ROUTING, GATES, *PARTS)]
        with self.trainer.journal.phase(PRECISION):
            rows.append(Substitution(PRECISION, "the whole trainer in bf16", self._in_bf16()))
        parts = [
            row.name for row in rows if row.gap and row.name != PRECISION and before.explained_by(row.gap) >= EXPLAINS
        ]
        joint = self._gap(self._passes(parts), parts) if len(parts) > 1 else None
        return Findings(
            before=before,
            substitutions=tuple(rows),
            joint_parts=tuple(parts),
            joint=joint,
            layers=tuple(self._layers(changes)) if self.replays else (),
            experts=tuple(self._experts()) if self.policy.arch.num_experts else (),
        )

    def _gaps(self, make_pass: MakePass, parts: Sequence[str] = (), policy: Policy | None = None) -> Tokens:
        """|log pi_old - log mu| [|y|] of each response under a routing and with parts substituted."""
        policy = policy or self.policy
        found = []
        with contextlib.ExitStack() as stack:
            for part in parts:
                if part in PARTS:
                    stack.enter_context(substituted(policy, part))
            for mini_batch in self.mini_batches:
                outputs = policy.logprobs(mini_batch.micro_batches, routing=make_pass(policy, mini_batch))
                found.append([logprobs for logprobs, _ in outputs])
        new = gather_tokens(self.mini_batches, found, self.trainer.place)
        return [
            {index: np.abs(values - mu[index]) for index, values in each.items()}
            for each, mu in zip(new, self.mu, strict=True)
        ]

    def _gap(self, make_pass: MakePass, parts: Sequence[str] = (), policy: Policy | None = None) -> Gap:
        return Gap.of(joined(self._gaps(make_pass, parts, policy)))

    def _baseline(self) -> tuple[Gap, dict[str, float]]:
        """The gap without any substitution, and how the trainer's routes differ from the rollout's."""
        if not self.replays:
            return self._gap(_live), {}
        arch, device = self.policy.arch, self.policy.device
        parts: list[RoutingStats] = []  # one for each mini-batch: comparisons are announced by micro-batch

        def observed(policy: Policy, mini_batch: MiniBatch) -> RoutingPass:
            valid = [valid_rows(b, policy.layout, policy.place, device) for b in mini_batch.micro_batches]
            parts.append(RoutingStats(arch.moe_layers, arch.num_experts, arch.experts_per_token, device))
            routes, observes = _rollout_routes(policy, mini_batch), RoutingConfig(observe_rollout=True)
            return MiniBatchRouting(observes, policy.routers, routes, valid, parts[-1]).old_pass()

        gap = self._gap(observed)
        whole = RoutingStats(arch.moe_layers, arch.num_experts, arch.experts_per_token, device)
        for part in parts:
            for total, sums in zip(whole.sums(), reduce_stats(part, self.trainer.place).sums(), strict=True):
                total += sums
        return gap, whole.finalize()

    def _single(self, name: str) -> Substitution:
        """Substitutes one part."""
        meaning = {ROUTING: "the rollout's experts replayed", GATES: "gate weights rounded to bf16, experts kept"}
        reason = self._unavailable(name)
        with self.trainer.journal.phase(name):
            gap = None if reason else self._gap(self._passes([name]), [name])
        return Substitution(name, {**meaning, **PARTS}[name], gap, reason)

    def _unavailable(self, name: str) -> str:
        if name in (ROUTING, GATES, "router") and not self.policy.arch.num_experts:
            return "the model has no experts"
        if name == ROUTING and self.without_traces:
            return f"{self.without_traces} samples have no routing trace"
        return orders_experts(self.policy) if name == "expert order" else ""

    def _passes(self, parts: Sequence[str]) -> MakePass:
        kind = RoundedGates if GATES in parts else RoutingPass
        if ROUTING in parts:
            return lambda policy, mini_batch: kind(policy.routers, _rollout_routes(policy, mini_batch))
        return lambda policy, _: kind(policy.routers)

    def _in_bf16(self) -> Gap:
        policy = self.policy
        engine = self.config.engine.model_copy(update={"dtype": "bf16"})
        rounded = Policy(
            policy.model_dir, policy.layout, policy.place, engine, policy.device, None, policy.temperature, frozen=True
        )
        return self._gap(_live, policy=rounded)

    def _layers(self, changes: dict[str, float]) -> Iterator[LayerShare]:
        """Replays one layer at a time."""
        for layer in self.policy.arch.moe_layers:

            def one_layer(policy: Policy, mini_batch: MiniBatch, layer: int = layer) -> RoutingPass:
                return RoutingPass(
                    policy.routers,
                    _rollout_routes(policy, mini_batch),
                    keeps=lambda tap, routed, _: torch.full(routed.shape[:1], tap.layer == layer, device=routed.device),
                )

            with self.trainer.journal.phase("layers"):
                gap = self._gap(one_layer)
            change = changes[f"routing/set_mismatch/rollout_old/live/layer_{layer:02d}"]
            yield LayerShare(layer, change, gap)

    def _experts(self) -> list[ExpertContrast]:
        """Compares the tokens of each expert, with the rollout's routes if there are any."""
        visits = Visits(self.policy)

        def observed(policy: Policy, mini_batch: MiniBatch) -> RoutingPass:
            routes = _rollout_routes(policy, mini_batch) if self.replays else None
            return RoutingPass(policy.routers, routes, observers=[visits.observe])

        with self.trainer.journal.phase("experts"):
            gaps = self._gaps(self._passes([ROUTING]) if self.replays else _live)
            for mini_batch, values in zip(self.mini_batches, gaps, strict=True):
                self.policy.logprobs(mini_batch.micro_batches, routing=observed(self.policy, mini_batch))
                visits.add(mini_batch, values)
        return visits.contrasts(joined(gaps))


def _live(policy: Policy, mini_batch: MiniBatch) -> RoutingPass:
    return RoutingPass(policy.routers)


def _rollout_routes(policy: Policy, mini_batch: MiniBatch) -> list[RankRoutes]:
    assert mini_batch.routes is not None
    return [routes.to(policy.device) for routes in mini_batch.routes]
