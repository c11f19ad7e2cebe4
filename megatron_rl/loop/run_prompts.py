"""The prompts of an RL run on this rank, and what reads and judges the responses to them."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.data.prompts import Fields, PromptDataset, load_sft_samples
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.environments.dialogue import make_dialogue
from megatron_rl.environments.episodes import Environments
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.rewards import Judges
from megatron_rl.rewards.checked_prompts import load_prompts
from megatron_rl.rewards.trial import try_verifier
from megatron_rl.rollout.turns import MultiTurn, open_conversation

if TYPE_CHECKING:  # it imports Megatron-Core
    from megatron_rl.ranks.place import Place


@dataclass(frozen=True)
class RunPrompts:
    """`train` is each data-parallel leader's, `heldout` rank 0's; None on other ranks, and if rollouts are replayed."""

    train: PromptDataset | None
    heldout: PromptDataset | None
    tokenizer: Any
    judges: Judges
    turns: MultiTurn | None
    """On data-parallel leaders, if the policy talks to an environment."""

    @classmethod
    def load(cls, config: Config, place: Place, vocab_size: int) -> RunPrompts:
        """Reads and checks all of this rank's prompts and their references. Tries a user's verifier and the environment
        on the first. Raises DataError, RewardError, EnvError."""
        tokenizer = load_tokenizer(config.model.path)
        data = config.data
        asks = config.rollout.replay_from is None
        train = heldout = None
        if asks and place.leads_replica:
            train = read_prompts(config, data.train, tokenizer, vocab_size)
        if asks and data.heldout and place.rank == 0:
            heldout = read_prompts(config, data.heldout, tokenizer, vocab_size)
        prompts = cls(train, heldout, tokenizer, Judges.of(config.reward), None)
        if train is None:
            return prompts
        try:
            try_verifier(prompts.judges, train[0])
            return dataclasses.replace(prompts, turns=open_turns(config, tokenizer, train[0]))
        except BaseException:
            prompts.close()
            raise

    def close(self) -> None:
        self.judges.close()
        if self.turns is not None:
            self.turns.environments.close()


def read_prompts(config: Config, source: str, tokenizer: Any, vocab_size: int) -> PromptDataset:
    """Reads and checks the prompts of data.train or data.heldout. Raises DataError and RewardError."""
    data = config.data
    return load_prompts(
        source,
        Fields(data.prompt_field, data.answer_field, data.verifier, data.chat_template),
        tokenizer,
        data.max_prompt_tokens,
        vocab_size=vocab_size,
        judges=lambda: Judges.of(config.reward),
    )


def read_examples(config: SftConfig, vocab_size: int) -> list[Sample]:
    """Reads and checks all examples of supervised fine-tuning. Raises DataError."""
    data = config.data
    fields = Fields(data.prompt_field, data.response_field, chat_template=data.chat_template)
    return load_sft_samples(
        data.train, fields, load_tokenizer(config.model.path), data.max_tokens, vocab_size=vocab_size
    )


def open_turns(config: Config, tokenizer: Any, first: Prompt) -> MultiTurn | None:
    """What the policy talks to, once a conversation on the first prompt has been opened; None if it answers once.
    Raises EnvError."""
    environment = config.rollout.environment
    if environment is None:
        return None
    dialogue = make_dialogue(tokenizer, environment.renderer)
    environments = Environments(environment.name, config.reward)
    turns = MultiTurn(environments, dialogue, environment.max_turns, config.data.max_prompt_tokens)

    async def try_first() -> None:
        async with environments.episode() as episode:
            await open_conversation(turns, episode, first)

    try:
        environments.wait_until_ready()
        asyncio.run(try_first())
    except BaseException:
        environments.close()
        raise
    return turns
