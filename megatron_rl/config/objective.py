"""What the switches of an objective say together, and with other sections. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rl.config.schema import Config
from megatron_rl.config.switches import KL, Gae, IcePop, MaskClip, MinClip, Mis, NoCorrection, Tis


def check_objective(config: Config) -> Iterator[str]:
    """Yields one line for each contradiction."""
    objective, train = config.objective, config.train
    if objective.aggregation == "constant-length" and objective.constant_length is None:
        yield "objective.constant_length: not set, needed by objective.aggregation constant-length"
    if objective.router_shift is not None and not train.recompute_old_logprobs:
        yield (
            f"objective.router_shift: {objective.router_shift}, but train.recompute_old_logprobs is false: there is no "
            "old-log-prob pass whose routers it could be measured from"
        )
    if objective.ratio == "geometric" and not isinstance(objective.clip, MinClip):
        kind = objective.clip.kind
        yield f"objective.clip.kind: {kind}, but objective.ratio geometric has its own clip; set it to min"
    if isinstance(objective.advantage, Gae) and config.critic is None:
        yield "critic: not set, needed by objective.advantage.estimator gae; the preset ppo sets it"
    yield from _check_correction(config)
    yield from _check_centering(config)
    yield from _check_kl_in_reward(config)
    yield from _check_old_policy(config)


def _check_correction(config: Config) -> Iterator[str]:
    objective, correction = config.objective, config.objective.correction
    if isinstance(correction, Mis | IcePop) and correction.low is not None and correction.low > correction.high:
        yield f"objective.correction.low: {correction.low} is above objective.correction.high {correction.high}"
    if isinstance(correction, IcePop):
        yield from _check_negative_band(correction)
    if isinstance(correction, Mis) and (objective.denominator == "rollout" or not config.train.recompute_old_logprobs):
        yield (
            "objective.correction.kind: mis takes tokens out of the denominators, for which rho must be known before "
            "the update; it needs objective.denominator old and train.recompute_old_logprobs true (icepop does not)"
        )


def _check_negative_band(band: IcePop) -> Iterator[str]:
    """Checks the band of rho for negative A, which takes bounds that are not set from the other band."""
    if band.negative_low is None and band.negative_high is None:
        return
    low, high = band.negative_low or band.low, band.negative_high or band.high
    if low > high:
        yield (
            f"objective.correction.negative_low: {low} is above objective.correction.negative_high {high}; one that is "
            "not set is that of objective.correction.low and high"
        )


def _check_centering(config: Config) -> Iterator[str]:
    """Checks that the objective weighs each token by a function of its own pi_theta/mu, which alone has a mean over
    mu."""
    objective = config.objective
    if objective.centering is None:
        return
    needed = {
        "ratio": (objective.ratio, "token"),
        "denominator": (objective.denominator, "rollout"),
        "clip.kind": (objective.clip.kind, "weight"),
    }
    for key, (found, expected) in needed.items():
        if found != expected:
            yield f"objective.{key}: {found}, but objective.centering needs {expected}"
    if objective.router_shift is not None:
        yield f"objective.router_shift: {objective.router_shift}, but objective.centering needs null"
    correction = objective.correction
    if isinstance(correction, Tis) and correction.level != "token":
        yield f"objective.correction.level: {correction.level}, but objective.centering needs token"
    elif not isinstance(correction, NoCorrection | IcePop | Tis):
        yield f"objective.correction.kind: {correction.kind}, but objective.centering needs none, icepop or tis"


def _check_kl_in_reward(config: Config) -> Iterator[str]:
    kl = config.objective.kl
    in_reward = isinstance(kl, KL) and kl.place == "reward"
    if in_reward and not isinstance(config.objective.advantage, Gae) and config.reward.overlong_filter:
        yield (
            "reward.overlong_filter: true, but under objective.kl.place reward a filtered response has no tokens whose "
            "KL could be taken off its reward, and would raise its group's mean; set one of them otherwise"
        )


def _check_old_policy(config: Config) -> Iterator[str]:
    """Checks that nothing needs pi_old's own log-probs if they are not recomputed."""
    objective, train = config.objective, config.train
    if train.recompute_old_logprobs or train.mini_batches == 1:
        return
    if objective.denominator == "old" or isinstance(objective.clip, MaskClip):
        asks = "objective.denominator old" if objective.denominator == "old" else "objective.clip.kind mask"
        yield (
            f"train.recompute_old_logprobs: false needs train.mini_batches 1, not {train.mini_batches}, under {asks}: "
            "after the first update the policy is no longer the old one. objective.denominator rollout does without it"
        )
