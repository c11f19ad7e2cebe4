"""Keys that are set and do nothing, because of another key. No torch.

The loader takes them out if a preset has set them; check_config refuses those that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rl.config.schema import Config, OptimConfig, SftConfig
from megatron_rl.config.switches import Gae, MinClip, NoKL


@dataclass(frozen=True)
class Idle:
    """A key, its value as messages show it, and the key that keeps it from having an effect."""

    key: str
    value: object
    cause: str
    why: str
    fix: str = ""

    def __str__(self) -> str:
        value = f" {self.value}" if self.value else ""
        return f"{self.key}:{value} {self.why}"

    @property
    def mistake(self) -> str:
        """The line of an error."""
        return f"{self}; {self.fix}" if self.fix else str(self)


def idle_keys(config: Config | SftConfig) -> Iterator[Idle]:
    """Yields every key that is set and does nothing."""
    yield from _of_optim(config.optim, "optim")
    if not isinstance(config, Config):
        return
    yield from _of_objective(config)
    if config.critic is not None:
        if isinstance(config.objective.advantage, Gae):
            yield from _of_optim(config.critic.optim, "critic.optim")
        else:
            why = "does nothing under objective.advantage.estimator group"
            yield Idle("critic", "", "objective.advantage.estimator", why, "set it to null")
    if config.rollout.replay_from is not None:
        yield from _of_replay(config)
    if config.eval.every and config.data.heldout is None:
        why = "does nothing without data.heldout: there is nothing to evaluate on"
        yield Idle("eval.every", config.eval.every, "data.heldout", why)


def _of_optim(optim: OptimConfig, section: str) -> Iterator[Idle]:
    if optim.schedule == "constant":
        for key, value in (("decay_steps", optim.decay_steps), ("min_lr", optim.min_lr)):
            if value:
                why = f"does nothing under {section}.schedule constant"
                yield Idle(f"{section}.{key}", value, f"{section}.schedule", why)


def _of_objective(config: Config) -> Iterator[Idle]:
    objective = config.objective
    if objective.aggregation != "constant-length" and objective.constant_length is not None:
        why = f"does nothing under objective.aggregation {objective.aggregation}"
        yield Idle("objective.constant_length", objective.constant_length, "objective.aggregation", why)
    if isinstance(objective.clip, MinClip) and objective.clip.dual is not None and objective.ratio == "geometric":
        why = "does nothing under objective.ratio geometric, which has its own clip"
        yield Idle("objective.clip.dual", objective.clip.dual, "objective.ratio", why)
    if isinstance(objective.kl, NoKL) and config.model.reference is not None:
        why = "is not read under objective.kl.kind none"
        yield Idle("model.reference", config.model.reference, "objective.kl.kind", why)


def _of_replay(config: Config) -> Iterator[Idle]:
    """What asks for servers, of which a run on saved rollouts has none."""
    rollout, cause = config.rollout, "rollout.replay_from"
    without = "does nothing under rollout.replay_from, which uses no servers"
    if rollout.servers.urls:
        yield Idle("rollout.servers.urls", list(rollout.servers.urls), cause, without, "drop it")
    if rollout.servers.urls_file is not None:
        yield Idle("rollout.servers.urls_file", str(rollout.servers.urls_file), cause, without, "drop it")
    if rollout.servers.colocate:
        yield Idle("rollout.servers.colocate", True, cause, without, "set it to false")
    if rollout.lag:
        why = f"does nothing under {cause}; the saved rollouts are as old as they are"
        yield Idle("rollout.lag", rollout.lag, cause, why, "set it to 0")
    if rollout.over_sampling is not None:
        why = f"does nothing under {cause}, which trains on all groups that were saved"
        yield Idle("rollout.over_sampling", rollout.over_sampling, cause, why, "set it to null")
    if config.weights.verify:
        yield Idle("weights.verify", config.weights.verify, cause, without, "set it to 0")
    if config.weights.stress.kind != "none":
        why = f"{without}; the saved rollouts are as stressed as the run that made them"
        yield Idle("weights.stress", config.weights.stress.kind, cause, why, "set weights.stress.kind to none")
    if config.data.heldout is not None:
        yield Idle("data.heldout", config.data.heldout, cause, f"{without} to evaluate with", "set it to null")
    if rollout.dynamic_sampling is not None:
        why = f"does nothing under {cause}, which trains on all groups that were saved"
        yield Idle("rollout.dynamic_sampling", "", cause, why, "set it to null")
    if rollout.environment is not None:
        yield Idle("rollout.environment", "", cause, without, "set it to null")
