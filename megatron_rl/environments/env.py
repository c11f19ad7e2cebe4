"""What an environment is, how it is found by its name, and how what it returns is checked. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.errors import UserError
from megatron_rl.named_code import ResultError, find_named

Message = dict[str, Any]
"""`role` and `content` as text. A message of the policy may also have `reasoning_content`, and `tool_calls` in the form
of OpenAI's chat API."""

BUILT_IN = {
    "calculator": "megatron_rl.environments.calculator:Calculator",
    "guessing": "megatron_rl.environments.guessing:Guessing",
}


class Env(Protocol):
    """One conversation. Each sample has an object of its own, which is made without arguments. An attribute `tools` of
    its class may list tools in the form of OpenAI's chat API."""

    def reset(self, prompt: Prompt) -> list[Message]:
        """Returns the messages that open the conversation. They must be the same for all samples of the prompt."""
        ...

    def step(self, message: Message) -> tuple[list[Message], Verdict | float | None, bool]:
        """Takes the policy's message. Returns the messages that answer it, a reward, and whether this is the end."""
        ...


class EnvError(UserError):
    """An environment does not exist, does not start, or cannot open a conversation. Names it, and the prompt."""


@dataclass(frozen=True)
class Opening:
    messages: list[Message]
    tools: list[dict[str, Any]]


@dataclass(frozen=True)
class EnvStep:
    """What a step returned. None: it said nothing about this."""

    messages: list[Message]
    reward: float | None
    correct: bool | None
    done: bool


@dataclass(frozen=True)
class Score:
    """What an environment has said about a conversation so far."""

    reward: float | None = None
    correct: bool | None = None

    def after(self, step: EnvStep) -> Score:
        """The rewards of all steps add up; the last verdict says what is correct."""
        if step.reward is None:
            return self
        return Score((self.reward or 0.0) + step.reward, self.correct if step.correct is None else step.correct)

    def of_whole(self) -> Verdict | None:
        """The verdict on a conversation that the environment has ended; None leaves it to the prompt's verifier."""
        if self.reward is None:
            return None
        return Verdict(self.reward, self.reward > 0 if self.correct is None else self.correct)

    def of_part(self) -> Verdict:
        """The verdict on a conversation that was cut off: what it has earned so far, and never correct."""
        return Verdict(self.reward or 0.0, False)


def get_env(name: str) -> type[Env]:
    """One of BUILT_IN, or a user's own as `package.module:Class`. Raises EnvError if it does not exist."""
    try:
        env: type[Env] = find_named("environment", name, BUILT_IN, "package.module:Class")
    except LookupError as error:
        raise EnvError(str(error)) from None
    missing = [method for method in ("reset", "step") if not callable(getattr(env, method, None))]
    if not isinstance(env, type) or missing:
        found = f"a class without {' and '.join(missing)}" if isinstance(env, type) else type(env).__name__
        raise EnvError(f"environment {name!r}: expected a class with reset and step, found {found}")
    return env


def call_reset(env: Env, prompt: Prompt) -> Opening:
    """Raises what reset raises, and ResultError if it returns no messages."""
    messages = _messages("reset", env.reset(prompt))
    if not messages:
        raise ResultError("reset returned no messages; nothing would open the conversation")
    return Opening(messages, list(getattr(env, "tools", ())))


def call_step(env: Env, message: Message) -> EnvStep:
    """Raises what step raises, and ResultError if it returns anything else than the protocol says."""
    result = env.step(message)
    if not isinstance(result, tuple) or len(result) != 3:
        raise ResultError(f"step returned {result!r:.100}, expected a tuple of messages, reward and done")
    messages, judged, done = result
    if not isinstance(done, bool):
        raise ResultError(f"step returned done = {done!r:.100}, expected True or False")
    answers = _messages("step", messages)
    if not answers and not done:
        raise ResultError("step returned no messages, but the conversation is not done")
    if judged is None:
        return EnvStep(answers, None, None, done)
    reward, correct = (judged.reward, bool(judged.correct)) if isinstance(judged, Verdict) else (judged, None)
    try:
        reward = float(reward)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise ResultError(f"step returned the reward {judged!r:.100}, expected a finite number, a Verdict or None")
    return EnvStep(answers, reward, correct, done)


def _messages(method: str, found: Any) -> list[Message]:
    if not isinstance(found, list):
        raise ResultError(f"{method} returned {found!r:.100} as messages, expected a list")
    for message in found:
        texts = isinstance(message, dict) and [message.get("role"), message.get("content")]
        if not texts or not all(isinstance(text, str) for text in texts) or message["role"] == "assistant":
            raise ResultError(
                f"{method} returned the message {message!r:.100}, expected role and content as text, and another role "
                "than assistant, which is the policy's"
            )
    return found
