"""The prompts of an RL run on this rank, and what reads and judges the responses to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.data.prompts import Fields, PromptDataset
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.ranks.place import Place
from megatron_rl.rewards import Judges
from megatron_rl.rewards.checked_prompts import load_prompts


@dataclass(frozen=True)
class RunPrompts:
    """`train` is each data-parallel leader's, `heldout` rank 0's; None on other ranks, and if rollouts are replayed."""

    train: PromptDataset | None
    heldout: PromptDataset | None
    tokenizer: Any
    judges: Judges

    @classmethod
    def load(cls, config: Config, place: Place, vocab_size: int) -> RunPrompts:
        """Reads and checks all of this rank's prompts and their references. Raises DataError, RewardError."""
        tokenizer = load_tokenizer(config.model.path)
        data = config.data
        fields = Fields(data.prompt_field, data.answer_field, data.verifier, data.chat_template)

        def read(source: str) -> PromptDataset:
            return load_prompts(
                source,
                fields,
                tokenizer,
                data.max_prompt_tokens,
                vocab_size=vocab_size,
                judges=lambda: Judges.of(config.reward),
            )

        asks = config.rollout.replay_from is None
        train = read(data.train) if asks and place.leads_replica else None
        heldout = read(data.heldout) if asks and data.heldout and place.rank == 0 else None
        return cls(train, heldout, tokenizer, Judges.of(config.reward))
