"""Loss functions as the engine calls them: they bind an objective to the arrays of one mini-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rl.config.schema import ObjectiveConfig
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.lab.metrics import SFT, TRAINING, sft_metrics, training_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.objectives.policy import policy_loss, sft_loss


class PolicyLoss:
    """-J of a mini-batch, one micro-batch at a time; gathers the metrics of those it has seen."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        mini_batch: MiniBatch,
        old_logprobs: Sequence[Tensor] | None,
        device: torch.device,
    ) -> None:
        """old_logprobs: [T] per micro-batch, or None to take the update's own forward pass, detached."""
        self.metrics = MetricAccumulator(TRAINING, device)
        self._objective = objective
        self._mini_batch = mini_batch
        self._old = old_logprobs
        self._device = device

    def __call__(self, index: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        packed = self._mini_batch.micro_batches[index]
        inputs = LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs.detach() if self._old is None else self._old[index],
            rollout_logprobs=self._on_device(packed.rollout_logprobs),
            advantages=self._on_device(packed.advantages),
            loss_mask=self._on_device(packed.loss_mask),
            sequence_ids=self._on_device(packed.sequence_ids),
            num_sequences=len(packed.cu_seqlens) - 1,
        )
        outputs = policy_loss(inputs, self._objective, self._mini_batch.denominators)
        training_metrics(self.metrics, inputs, outputs, entropy)
        return outputs.loss

    def _on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.as_tensor(array, device=self._device)


class SftLoss:
    """Mean negative log-likelihood of a mini-batch's masked-in tokens."""

    def __init__(self, mini_batch: MiniBatch, device: torch.device) -> None:
        self.metrics = MetricAccumulator(SFT, device)
        self._mini_batch = mini_batch
        self._device = device

    def __call__(self, index: int, logprobs: Tensor, entropy: Tensor) -> Tensor:
        mask = torch.as_tensor(self._mini_batch.micro_batches[index].loss_mask, device=self._device)
        loss = sft_loss(logprobs, mask, self._mini_batch.denominators).loss
        sft_metrics(self.metrics, logprobs, mask, loss, entropy)
        return loss
