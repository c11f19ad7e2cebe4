"""What the switches of an objective say together. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.config.schema import Config, ObjectiveConfig, TrainConfig

# By kind, the parameters of a correction that it reads; those of NEEDED must be set.
CORRECTION_KEYS = {
    "none": (),
    "tis": ("high",),
    "mis": ("low", "high"),
    "icepop": ("low", "high"),
    "sequence-mask": ("delta",),
}
NEEDED = {"tis": ("high",), "mis": ("high",), "icepop": ("low", "high"), "sequence-mask": ("delta",)}
LEVELS = {"tis": ("token", "sequence"), "mis": ("token", "sequence", "geometric")}


def check_objective(config: Config) -> Iterator[str]:
    """One line for each contradiction."""
    objective = config.objective
    if objective.aggregation == "constant-length" and objective.constant_length is None:
        yield "objective.constant_length: not set, needed by objective.aggregation constant-length"
    if objective.aggregation != "constant-length" and objective.constant_length is not None:
        yield (
            f"objective.constant_length: {objective.constant_length} does nothing under objective.aggregation "
            f"{objective.aggregation}"
        )
    if objective.router_shift is not None and not config.train.recompute_old_logprobs:
        yield (
            f"objective.router_shift: {objective.router_shift}, but train.recompute_old_logprobs is false: there is no "
            "old-log-prob pass whose routers it could be measured from"
        )
    yield from _check_clip(objective)
    yield from _check_correction(objective, config.train)
    yield from _check_advantage(config)
    yield from _check_kl(config)
    yield from _check_old_policy(config)


def _check_clip(objective: ObjectiveConfig) -> Iterator[str]:
    clip = objective.clip
    gate = ("tau_positive", "tau_negative")
    for key in gate if clip.kind == "soft-gate" else ():
        if getattr(clip, key) is None:
            yield f"objective.clip.{key}: not set, needed by objective.clip.kind soft-gate"
    for key in ("low", "high") if clip.kind == "soft-gate" else gate:
        if getattr(clip, key) is not None:
            yield f"objective.clip.{key}: {getattr(clip, key)} does nothing under objective.clip.kind {clip.kind}"
    if clip.dual is not None and (clip.kind != "min" or objective.ratio == "geometric"):
        yield (
            f"objective.clip.dual: {clip.dual} does nothing under objective.clip.kind {clip.kind} and objective.ratio "
            f"{objective.ratio}; it is part of min(w A, clip(w) A)"
        )
    if objective.ratio == "geometric" and clip.kind != "min":
        yield f"objective.clip.kind: {clip.kind}, but objective.ratio geometric has its own clip; set it to min"


def _check_advantage(config: Config) -> Iterator[str]:
    advantage = config.objective.advantage
    uses_critic = advantage.estimator == "gae"
    for key in ("gamma", "gae_lambda"):
        value = getattr(advantage, key)
        if uses_critic and value is None:
            yield f"objective.advantage.{key}: not set, needed by objective.advantage.estimator gae"
        if not uses_critic and value is not None:
            yield f"objective.advantage.{key}: {value} does nothing under objective.advantage.estimator group"
    if uses_critic and advantage.baseline == "leave-one-out":
        yield (
            "objective.advantage.baseline: leave-one-out is of a group's rewards; objective.advantage.estimator gae "
            "needs mean or none"
        )
    if uses_critic and config.critic is None:
        yield "critic: not set, needed by objective.advantage.estimator gae; the preset ppo sets it"
    if not uses_critic and config.critic is not None:
        yield "critic: does nothing under objective.advantage.estimator group; set it to null"


def _check_kl(config: Config) -> Iterator[str]:
    kl = config.objective.kl
    if kl.kind == "none":
        if kl.beta is not None:
            yield f"objective.kl.beta: {kl.beta} does nothing under objective.kl.kind none"
        if config.model.reference is not None:
            yield f"model.reference: {config.model.reference} is not read under objective.kl.kind none"
        return
    if kl.beta is None:
        yield f"objective.kl.beta: not set, needed by objective.kl.kind {kl.kind}"
    if kl.place == "reward" and config.objective.advantage.estimator == "group" and config.reward.overlong_filter:
        yield (
            "reward.overlong_filter: true, but under objective.kl.place reward a filtered response has no tokens whose "
            "KL could be taken off its reward, and would raise its group's mean; set one of them otherwise"
        )
    if kl.kind == "unbiased" and kl.place == "reward":
        yield (
            "objective.kl.kind: unbiased weighs k3 by pi_theta/pi_old, which is 1 when rewards are made; with "
            "objective.kl.place reward use k1 or k3"
        )


def _check_old_policy(config: Config) -> Iterator[str]:
    """What can be done without pi_old's own log-probs."""
    objective, train = config.objective, config.train
    if train.recompute_old_logprobs or train.mini_batches == 1:
        return
    if objective.denominator == "old" or objective.clip.kind == "mask":
        asks = "objective.denominator old" if objective.denominator == "old" else "objective.clip.kind mask"
        yield (
            f"train.recompute_old_logprobs: false needs train.mini_batches 1, not {train.mini_batches}, under {asks}: "
            "after the first update the policy is no longer the old one. objective.denominator rollout does without it"
        )


def _check_correction(objective: ObjectiveConfig, train: TrainConfig) -> Iterator[str]:
    correction = objective.correction
    kind = correction.kind
    for key in ("low", "high", "delta"):
        if getattr(correction, key) is not None and key not in CORRECTION_KEYS[kind]:
            value = getattr(correction, key)
            yield f"objective.correction.{key}: {value} does nothing under objective.correction.kind {kind}"
    for key in NEEDED.get(kind, ()):
        if getattr(correction, key) is None:
            yield f"objective.correction.{key}: not set, needed by objective.correction.kind {kind}"
    if correction.level not in LEVELS.get(kind, ("token",)):
        allowed = " or ".join(LEVELS.get(kind, ("token",)))
        yield f"objective.correction.level: {correction.level}, but objective.correction.kind {kind} needs {allowed}"
    low, high = correction.low, correction.high
    if low is not None and high is not None and low > high:
        yield f"objective.correction.low: {low} is above objective.correction.high {high}"
    if kind == "mis" and (objective.denominator == "rollout" or not train.recompute_old_logprobs):
        yield (
            "objective.correction.kind: mis takes tokens out of the denominators, for which rho must be known before "
            "the update; it needs objective.denominator old and train.recompute_old_logprobs true (icepop does not)"
        )
