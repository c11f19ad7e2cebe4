"""The prompts of an RL run on this rank, and what reads and judges the responses to them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from megatron_rl.config.multi_turn import EnvironmentConfig
from megatron_rl.config.schema import Config
from megatron_rl.data.prompts import Fields, PromptDataset
from megatron_rl.data.sample import Prompt
from megatron_rl.environments.dialogue import make_dialogue
from megatron_rl.environments.episodes import Environments
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.ranks.place import Place
from megatron_rl.rewards import Judges
from megatron_rl.rewards.checked_prompts import load_prompts
from megatron_rl.rollout.turns import MultiTurn, open_conversation


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
        """Reads and checks all of this rank's prompts and their references, and opens a conversation on the first.
        Raises DataError, RewardError, EnvError."""
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
        turns = None
        if train is not None and config.rollout.environment is not None:
            turns = _open_turns(config.rollout.environment, config, tokenizer, train[0])
        return cls(train, heldout, tokenizer, Judges.of(config.reward), turns)

    def close(self) -> None:
        self.judges.close()
        if self.turns is not None:
            self.turns.environments.close()


def _open_turns(environment: EnvironmentConfig, config: Config, tokenizer: Any, first: Prompt) -> MultiTurn:
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
