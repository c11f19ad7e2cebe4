"""What a stage returns in place of logits: the policy's log-probs and entropies, or the critic's values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_rl.engine.logprobs import TokenLogProbs, VocabularyShard


class PolicyModel(GPTModel):
    """A stage of the policy. The last one returns [T, 2 + k], fp32: the log-prob of each label, the entropy, and the
    log-probs of k more tokens at each position, if any are asked for."""

    def __init__(
        self, *args: Any, unpadded_vocab_size: int, temperature: float, logit_chunk_tokens: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.logit_chunk_tokens = logit_chunk_tokens
        self.head_dtype: torch.dtype | None = None
        """Dtype of the logits, for a study of precision; None: the model's own. Log-softmax is in fp32 anyway."""
        tp = self.pg_collection.tp
        self.shard = VocabularyShard(start=tp.rank() * self.vocab_size // tp.size(), size=unpadded_vocab_size, group=tp)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """Takes the place of the logits: hidden_states [T, 1, H] (sequence-parallel), labels [1 + k, T]."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        _await_weights(self.output_layer)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        dtype = self.head_dtype or weight.dtype
        logprobs, entropy, top = TokenLogProbs.apply(
            hidden_states.squeeze(1).to(dtype),
            weight.to(dtype),
            labels[0],
            labels[1:].t(),
            self.temperature,
            self.shard,
            self.logit_chunk_tokens,
        )
        return torch.cat([logprobs[:, None], entropy[:, None], top], dim=-1)


def _await_weights(layer: torch.nn.Module) -> None:
    """Waits for weights that are gathered during the forward pass (engine.overlap all).

    DDP does it in a hook before each module's forward pass, and the output layer's is never called here.
    """
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())


class ValueHead(torch.nn.Module):
    """One number from each hidden state, the same on every tensor-parallel rank. Weights not yet set."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, hidden_size, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(1, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, 1], fp32."""
        return F.linear(hidden.float(), self.weight.float(), self.bias.float())


class ValueModel(GPTModel):
    """A stage of the critic. The last one returns [T, 1], fp32: the value of the state before each label."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = ValueHead(self.config.hidden_size, self.config.params_dtype)

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # All ranks compute the same values, so each takes its own slice of the gradient and nothing is summed.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return self.output_layer(hidden_states.squeeze(1))
