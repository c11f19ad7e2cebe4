"""Forward and backward passes of a study: pi_old and pi_theta under one routing at a time. Everything is collective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.config.switches import NoKL
from megatron_rl.counterfactual.gradients import Vectors, add, gradient_of
from megatron_rl.counterfactual.objectives_compared import ObjectiveArm, TokenColumns, with_sample_advantages
from megatron_rl.counterfactual.ratio_figures import Doubles
from megatron_rl.counterfactual.routings import RoutingArm, make_pass
from megatron_rl.counterfactual.saved_batch import gather_heads, gather_tokens
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.packed_losses import PolicyLoss, without_rejected
from megatron_rl.engine.policy import Policy
from megatron_rl.routing.exchange import valid_rows
from megatron_rl.routing.shift import RouterShift, packed_shift

Columns = list[list[Tensor]]
"""For each mini-batch [T] per micro-batch; [] if this is not the last pipeline stage."""


@dataclass(frozen=True, eq=False)
class OldPass:
    """pi_old under one routing."""

    logprobs: Columns
    top: Columns
    """[T, k]: the log-probs of mu's most likely tokens."""
    live: list[list[Tensor]]
    """For each mini-batch [rows, own layers, top_k] per micro-batch: the experts that the routers chose."""
    shifts: list[RouterShift] | None
    """Router shifts that wait for pi_theta's pass; None if no objective has one."""


@dataclass(frozen=True, eq=False)
class NewPass:
    """pi_theta under one routing."""

    logprobs: Columns
    entropy: Columns
    shift: list[list[Tensor]] | None
    """Router shift [T] per micro-batch, on every pipeline stage; None if no objective has one."""
    top: Columns
    """[T, k]: the log-probs of mu's most likely tokens."""


@dataclass(frozen=True, eq=False)
class Packing:
    """The batch in one division into micro-batches, with what does not depend on the routing."""

    mini_batches: list[MiniBatch]
    agree: int
    """Experts of a row that must agree under r3-agreeing."""
    shifts: bool
    """Whether an objective needs the router shift."""
    top_k: int
    """How many of mu's most likely tokens each token has; 0 if no objective needs them."""


def old_pass(policy: Policy, packing: Packing, arm: RoutingArm) -> OldPass:
    """The pass of pi_old's weights, which `policy` has."""
    shifts = None
    if packing.shifts:
        shifts = [
            RouterShift(
                [len(valid_rows(b, policy.layout, policy.place, policy.device)) for b in mini.micro_batches],
                policy.device,
            )
            for mini in packing.mini_batches
        ]
    logprobs, top, live = [], [], []
    for number, mini_batch in enumerate(packing.mini_batches):
        observers = [shifts[number].keep] if shifts else []
        routing = make_pass(policy, arm.old, mini_batch, (), agree=packing.agree, record=True, observers=observers)
        found = policy.logprobs_with_top(mini_batch.micro_batches, routing)
        logprobs.append([each for each, _, _ in found])
        top.append([each for _, _, each in found])
        live.append(routing.live)
    return OldPass(logprobs, top, live, shifts)


def new_pass(theta: Policy, packing: Packing, arm: RoutingArm, old: OldPass, older: OldPass | None) -> NewPass:
    """The pass of pi_theta's weights, which `theta` has. `older`: the pass of older weights, for stale routes."""
    logprobs, entropy, shift, top = [], [], [], []
    for number, mini_batch in enumerate(packing.mini_batches):
        observers = [old.shifts[number].compare] if old.shifts else []
        recorded = _recorded(arm, number, old, older)
        routing = make_pass(theta, arm.new, mini_batch, recorded, agree=packing.agree, observers=observers)
        found = theta.logprobs_with_top(mini_batch.micro_batches, routing)
        logprobs.append([each for each, _, _ in found])
        entropy.append([each for _, each, _ in found])
        top.append([each for _, _, each in found])
        if old.shifts:
            distances, layers = old.shifts[number].distances, len(theta.arch.moe_layers)
            shift.append(packed_shift(distances, mini_batch.micro_batches, layers, theta.layout, theta.place))
    return NewPass(logprobs, entropy, shift if old.shifts else None, top)


def _recorded(arm: RoutingArm, number: int, old: OldPass, older: OldPass | None) -> Sequence[Tensor]:
    if arm.new == "older":
        assert older is not None
        return older.live[number]
    return old.live[number]


def reference_logprobs(reference: Policy, packing: Packing) -> Columns:
    return [[each for each, _ in reference.logprobs(mini.micro_batches)] for mini in packing.mini_batches]


@dataclass(frozen=True, eq=False)
class Passes:
    """The forward passes that a gradient needs."""

    arm: RoutingArm
    old: OldPass
    new: NewPass
    older: OldPass | None
    reference: Columns | None


def gradient(
    theta: Policy, packing: Packing, objective: ObjectiveArm, advantages: Mapping[int, float], passes: Passes
) -> Vectors:
    """Returns the mean over the mini-batches of the gradients of their losses, all at pi_theta's weights."""
    total: Vectors | None = None
    config, arm, old = objective.objective, passes.arm, passes.old
    for number, mini_batch in enumerate(packing.mini_batches):
        mini_batch = with_sample_advantages(mini_batch, advantages)
        mini_batch = without_rejected(mini_batch, config, old.logprobs[number], theta.place)
        reference = passes.reference[number] if passes.reference and not isinstance(config.kl, NoKL) else None
        loss = PolicyLoss(config, mini_batch, old.logprobs[number], theta.device, reference_logprobs=reference)
        if config.router_shift is not None:
            assert passes.new.shift is not None
            loss.router_shift = passes.new.shift[number]
        recorded = _recorded(arm, number, old, passes.older)
        routing = make_pass(theta, arm.new, mini_batch, recorded, agree=packing.agree)
        theta.gradients(mini_batch.micro_batches, loss, routing)
        total = add(total, gradient_of(theta), 1 / len(packing.mini_batches))
    assert total is not None
    return total


def token_columns(
    policy: Policy, packing: Packing, old: OldPass, new: NewPass, reference: Columns | None
) -> list[TokenColumns]:
    """Gathers what a routing made of the tokens, one for each mini-batch, on every rank."""
    minis, place = packing.mini_batches, policy.place

    def gathered(values: Columns) -> list[dict[int, Doubles]]:
        # Router shifts are on every stage, and count once.
        return gather_tokens(minis, values if policy.is_last_stage else [[] for _ in minis], place)

    shift = None if new.shift is None else gathered(new.shift)
    its_reference = None if reference is None else gathered(reference)
    mu = gather_tokens(minis, rollout_logprobs(policy, packing), place)
    top = top_mu = None
    if packing.top_k:
        top = gather_heads(minis, new.top, place, packing.top_k)
        top_mu = gather_heads(minis, rollout_heads(policy, packing), place, packing.top_k)
    columns = zip(gathered(new.logprobs), gathered(old.logprobs), mu, gathered(new.entropy), strict=True)
    return [
        TokenColumns(
            *each,
            reference=None if its_reference is None else its_reference[number],
            shift=None if shift is None else shift[number],
            top=None if top is None else top[number],
            top_mu=None if top_mu is None else top_mu[number],
        )
        for number, each in enumerate(columns)
    ]


def rollout_logprobs(policy: Policy, packing: Packing) -> Columns:
    """mu's log-probs; [] if this is not the last pipeline stage."""
    if not policy.is_last_stage:
        return [[] for _ in packing.mini_batches]
    return [[torch.as_tensor(batch.rollout_logprobs) for batch in mini.micro_batches] for mini in packing.mini_batches]


def rollout_heads(policy: Policy, packing: Packing) -> Columns:
    """mu's log-probs [T, k] of its most likely tokens; [] if this is not the last pipeline stage."""
    if not policy.is_last_stage:
        return [[] for _ in packing.mini_batches]
    none = torch.empty(0, packing.top_k)  # of a micro-batch without samples
    heads = [[batch.top for batch in mini.micro_batches] for mini in packing.mini_batches]
    return [[none if top is None else torch.as_tensor(top.logprobs) for top in mini] for mini in heads]
