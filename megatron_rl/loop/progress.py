"""The progress of an RL run: what a checkpoint keeps besides the networks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.data.prompts import PromptCursor
from megatron_rl.engine.manifest import State


def is_due(step: int, steps: int, every: int) -> bool:
    """Tells whether what happens `every` so many of `steps` is due. 0: only after the last one, when all is due."""
    return step == steps or (every > 0 and step % every == 0)


def steps_of(config: Config | SftConfig) -> int:
    return config.train.steps if isinstance(config, Config) else config.steps


def check_steps(config: Config | SftConfig, made: int, by: str, *, left: int = 0) -> None:
    """Raises ConfigError, which names the key, unless at least `left` steps follow the steps that `by` has made."""
    key, steps = "train.steps" if isinstance(config, Config) else "steps", steps_of(config)
    if steps < made + left:
        raise ConfigError(f"{key}: {steps}, but {by} has made {made} steps; give {key} above {made}")


@dataclass
class Progress:
    """The policy is weight version `step`."""

    step: int
    """Rollout steps that are done."""
    steps: int
    """Rollout steps of the whole run: train.steps."""
    cursor: PromptCursor
    """The first prompt that no step has taken."""
    taken: tuple[int, ...] = ()
    """Numbers of the prompts after the cursor that steps have taken (rollout.over_sampling)."""
    owes_evaluation: bool = True
    """Whether the evaluation that is due after `step` has not been made."""

    @classmethod
    def of(cls, state: State | None, steps: int, seed: int) -> Progress:
        """The progress of a checkpoint, or that of a new run."""
        if state is None:
            return cls(0, steps, PromptCursor(seed))
        cursor = PromptCursor(**state.cursor)
        return cls(state.step, steps, cursor, tuple(state.taken), owes_evaluation=not state.evaluated)

    @property
    def state(self) -> State:
        return State(
            step=self.step,
            cursor=self.cursor.as_json(),
            taken=list(self.taken),
            weight_version=self.step,
            evaluated=not self.owes_evaluation,
        )

    def due(self, every: int) -> bool:
        return is_due(self.step, self.steps, every)
