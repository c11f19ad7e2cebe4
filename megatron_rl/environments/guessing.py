"""A game: the policy guesses the number that is the prompt's reference answer, and hears whether it is larger."""

from __future__ import annotations

import re

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.environments.env import Message

HIGHER, LOWER = ">", "<"
_NUMBER = re.compile(r"\d{1,18}", re.ASCII)


class Guessing:
    """A guess is the last number of a message. The reward is 1 for the right guess, which ends the game. The number of
    turns bounds the guesses: half of what is left at each of n turns finds one of 2^n - 1 numbers."""

    def reset(self, prompt: Prompt) -> list[Message]:
        self._secret = int(prompt.answer)
        return [{"role": "user", "content": prompt.text}]

    def step(self, message: Message) -> tuple[list[Message], Verdict | float | None, bool]:
        numbers = _NUMBER.findall(message["content"])
        guess = int(numbers[-1]) if numbers else None
        if guess is None or guess == self._secret:
            return [], Verdict(float(guess is not None), guess is not None), True
        return [{"role": "user", "content": HIGHER if guess < self._secret else LOWER}], 0.0, False
