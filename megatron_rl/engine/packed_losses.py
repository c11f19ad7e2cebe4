"""Loss functions as the engine calls them: they bind an objective to the arrays of one mini-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import orjson
import torch
from torch import Tensor

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.data.schedule import Denominators
from megatron_rl.engine.device import put
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.packed_advantages import Estimate
from megatron_rl.engine.token_values import TokenValues
from megatron_rl.lab.metrics import SFT, TRAINING, VALUE, sft_metrics, training_metrics, value_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.corrections import kept_lengths, leaves_denominators
from megatron_rl.objectives.custom import get_objective
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.objectives.policy_loss import sft_loss
from megatron_rl.objectives.value import ValueInputs, value_loss
from megatron_rl.ranks.collectives import all_gather_bytes
from megatron_rl.ranks.place import Place


class PolicyLoss:
    """Computes -J, one micro-batch of a mini-batch at a time, and gathers their metrics."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        mini_batch: MiniBatch,
        old_logprobs: Sequence[Tensor] | None,
        device: torch.device,
        *,
        weight_version: int | None = None,
        reference_logprobs: Sequence[Tensor] | None = None,
        old_is_rollout: bool = False,
        records: bool = False,
    ) -> None:
        """old_logprobs: [T] per micro-batch; None takes the update's own forward pass, detached.

        `weight_version` is that of pi_old; None: the lag of tokens is not measured. `old_is_rollout`: the log-probs are
        mu's, which stands for pi_old [GSPO 2507.18071, section 5.4]; no mismatch is then measured. `records` keeps
        `token_values`.
        """
        self.metrics = MetricAccumulator(TRAINING, device)
        self.router_shift: Sequence[Tensor] | None = None
        """[T] per micro-batch. Set right before the update, if the objective has one."""
        self._records = records
        self.token_values: dict[int, TokenValues] = {}
        """By micro-batch with samples, after the update; on the last pipeline stage."""
        self._objective = objective
        self._loss = get_objective(objective)
        self._mini_batch = mini_batch
        self._old = old_logprobs
        self._reference = reference_logprobs
        self._weight_version = weight_version
        self._measures_mismatch = not old_is_rollout

    def __call__(self, index: int, logprobs: Tensor, entropy: Tensor, top_logprobs: Tensor | None = None) -> Tensor:
        """top_logprobs: [T, k], of the micro-batch's top tokens; under score centering."""
        old = logprobs.detach() if self._old is None else self._old[index]
        reference = None if self._reference is None else self._reference[index]
        inputs = _loss_inputs(self._mini_batch, index, logprobs, old, reference)
        if (self.router_shift is None) != (self._objective.router_shift is None):
            raise RuntimeError("objective.router_shift and the mini-batch's router shift: one is set without the other")
        if self.router_shift is not None:
            inputs = dataclasses.replace(inputs, router_shift=self.router_shift[index])
        packed = self._mini_batch.micro_batches[index]
        top = packed.top
        if top is not None and top_logprobs is not None:
            rollout = put(top.logprobs, logprobs.device)
            inputs = dataclasses.replace(inputs, top_logprobs=top_logprobs, top_rollout_logprobs=rollout)
        outputs = self._loss(inputs, self._objective, self._mini_batch.denominators)
        version = self._weight_version
        lags = None if version is None else version - put(packed.versions, logprobs.device)
        training_metrics(self.metrics, inputs, outputs, entropy, lags, mismatch=self._measures_mismatch)
        if self._records and not packed.is_empty:
            outcomes = self._mini_batch.outcomes[index]
            found = TokenValues.of(packed, outcomes, inputs, outputs.values, entropy)
            if not self._measures_mismatch:
                del found.columns["old_logprob"]  # they are mu's
            self.token_values[index] = found
        return outputs.loss


def _loss_inputs(
    mini_batch: MiniBatch,
    index: int,
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None = None,
) -> LossInputs:
    packed, outcomes = mini_batch.micro_batches[index], mini_batch.outcomes[index]
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        rollout_logprobs=put(packed.rollout_logprobs, logprobs.device),
        advantages=put(packed.advantages, logprobs.device),
        loss_mask=put(packed.loss_mask, logprobs.device),
        sequence_ids=put(packed.sequence_ids, logprobs.device),
        num_sequences=len(packed.cu_seqlens) - 1,
        reference_logprobs=reference_logprobs,
        prompts=[outcome.group for outcome in outcomes],
    )


def without_rejected(
    mini_batch: MiniBatch, objective: ObjectiveConfig, old_logprobs: Sequence[Tensor], place: Place
) -> MiniBatch:
    """Returns the mini-batch with the denominators, over all replicas, of the tokens that its correction keeps.

    old_logprobs: [T] per micro-batch; [] if this is not the last pipeline stage. Collective if the correction rejects.
    """
    if not leaves_denominators(objective):
        return mini_batch
    rows: list[tuple[int, int]] = []
    for index, old in enumerate(old_logprobs):
        if not mini_batch.micro_batches[index].is_empty:
            inputs = _loss_inputs(mini_batch, index, old, old)
            rows += zip(inputs.prompts or (), kept_lengths(inputs, objective).tolist(), strict=True)
    speaks = bool(old_logprobs) and place.speaks_for_stage
    parts = all_gather_bytes(orjson.dumps(rows if speaks else []), place.control)
    kept = [row for part in parts for row in orjson.loads(part)]
    prompt_tokens = dict.fromkeys(mini_batch.denominators.prompt_tokens, 0)
    for prompt, tokens in kept:
        prompt_tokens[prompt] += tokens
    denominators = Denominators(
        tokens=sum(tokens for _, tokens in kept),
        sequences=sum(tokens > 0 for _, tokens in kept),
        prompt_tokens=prompt_tokens,
    )
    return dataclasses.replace(mini_batch, denominators=denominators)


class ValueLoss:
    """Computes the critic's loss, one micro-batch of a mini-batch at a time, and gathers their metrics."""

    def __init__(
        self,
        clip: float | None,
        mini_batch: MiniBatch,
        old_values: Sequence[Tensor],
        estimates: Sequence[Estimate],
        device: torch.device,
    ) -> None:
        """clip: eps of the value loss; None disables it. old_values, [T] fp32, and estimates are per micro-batch, made
        before the first update; [] if this is not the last pipeline stage."""
        self.metrics = MetricAccumulator(VALUE, device)
        self._clip = clip
        self._mini_batch = mini_batch
        self._old = old_values
        self._estimates = estimates

    def __call__(self, index: int, values: Tensor) -> Tensor:
        estimate = self._estimates[index]
        mask = put(self._mini_batch.micro_batches[index].loss_mask, values.device)
        returns = put(estimate.returns, values.device).to(values)
        outputs = value_loss(
            ValueInputs(values, self._old[index], returns, mask), self._clip, self._mini_batch.denominators
        )
        kept, following = outputs.kept, put(estimate.rewards_to_go, values.device)
        value_metrics(self.metrics, values[kept], returns[kept], following[kept], outputs)
        return outputs.loss


class SftLoss:
    """Mean negative log-likelihood of a mini-batch's masked-in tokens."""

    def __init__(self, mini_batch: MiniBatch, device: torch.device) -> None:
        self.metrics = MetricAccumulator(SFT, device)
        self._mini_batch = mini_batch
        self._device = device

    def __call__(self, index: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        mask = put(self._mini_batch.micro_batches[index].loss_mask, self._device)
        loss = sft_loss(logprobs, mask, self._mini_batch.denominators).loss
        sft_metrics(self.metrics, logprobs, mask, loss, entropy)
        return loss
