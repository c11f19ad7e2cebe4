"""The section `objective`: its switches, and the keys that each kind of a switch reads. Imports without torch.

`clip`, `correction` and `kl` name their kind by `kind`, `advantage` by `estimator`. A later layer that names another
kind replaces the section; a layer that names the same kind, or none, sets single keys.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_rl.config.bounds import Frozen, Positive, PositiveInt

LowBound = Annotated[float, Field(ge=0, lt=1)]
HighBound = Annotated[float, Field(ge=0, le=1e6)]

# ---- clip: what bounds the importance ratio w, and what is made of it -------------------------------------------


class MinClip(Frozen):
    """PPO's min(w A, clip(w) A) [1707.06347]."""

    kind: Literal["min"] = "min"
    """Selects this kind."""
    low: LowBound | None = 0.2
    """The band of w is 1 - low to 1 + high. The geometric ratio has its own band: -low to high of each token's log w_t.
    Defaults to 0.2; null disables."""
    high: HighBound | None = 0.2
    """Defaults to 0.2; null disables."""
    dual: Annotated[float, Field(gt=1, le=1e6)] | None = None
    """Dual clip: w A is at least dual * A if A is negative. Defaults to null, which disables it."""


class MaskClip(Frozen):
    """MiniRL's mask [2512.01374]: drops a token if pi_theta/pi_old leaves the band in the direction of A."""

    kind: Literal["mask"] = "mask"
    """Selects this kind."""
    low: LowBound | None
    """The lower bound of pi_theta/pi_old is 1 - low; null: no bound."""
    high: HighBound | None
    """The upper bound of pi_theta/pi_old is 1 + high; null: no bound."""


class WeightClip(Frozen):
    """CISPO [2506.13585]: the bounded w is a weight without a gradient."""

    kind: Literal["weight"] = "weight"
    """Selects this kind."""
    low: LowBound | None = None
    """The lower bound of w is 1 - low. Defaults to null: no bound."""
    high: HighBound | None = None
    """The upper bound of w is 1 + high. Defaults to null: no bound."""


class TaperedClip(Frozen):
    """TOPR [2503.14286]: weight 1 if A is positive, else the bounded w without a gradient."""

    kind: Literal["tapered"] = "tapered"
    """Selects this kind."""
    low: LowBound | None = None
    """The lower bound of w is 1 - low. Defaults to null: no bound."""
    high: HighBound | None = None
    """The upper bound of w is 1 + high. Defaults to null: no bound."""


class SoftGate(Frozen):
    """SAPO's sigmoid of w [2511.20347], which has temperatures in place of bounds."""

    kind: Literal["soft-gate"] = "soft-gate"
    """Selects this kind."""
    tau_positive: Positive
    """Temperature if A is positive."""
    tau_negative: Positive
    """Temperature if A is zero or negative."""


BandClip = MinClip | MaskClip | WeightClip | TaperedClip
ClipConfig = Annotated[BandClip | SoftGate, Field(discriminator="kind")]

# ---- advantage --------------------------------------------------------------------------------------------------


class GroupAdvantage(Frozen):
    """Advantage of a response, from the rewards of all responses to its prompt."""

    estimator: Literal["group"] = "group"
    """Selects this estimator."""
    baseline: Literal["mean", "leave-one-out", "none"] = "mean"
    """Subtracted from each reward: the group's mean, or the mean of the other responses, RLOO [2402.14740]."""
    std: Literal["population", "sample", "none"] = "sample"
    """Standard deviation of the group's rewards, by which the difference is divided."""


class Gae(Frozen):
    """Advantage of each token, from the critic's values [1506.02438]. Needs the section `critic`."""

    estimator: Literal["gae"] = "gae"
    """Selects this estimator."""
    baseline: Literal["mean", "none"] = "mean"
    """Subtracted from each token's advantage: the mean over the rollout batch."""
    std: Literal["population", "sample", "none"] = "sample"
    """Standard deviation over the rollout batch, by which the difference is divided."""
    gamma: Annotated[float, Field(gt=0, le=1)]
    """Discount."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)]
    """Weight of later steps: 0 uses one reward and the next value, 1 all rewards of the response."""


AdvantageConfig = Annotated[GroupAdvantage | Gae, Field(discriminator="estimator")]

# ---- correction of the mismatch between trainer and rollout engine ----------------------------------------------
# rho = pi_old/mu scales a token's term. Under `denominator: rollout` the ratio is omega = pi_theta/mu, which holds rho
# already: the correction only bounds it.


class NoCorrection(Frozen):
    kind: Literal["none"] = "none"
    """Selects this kind."""


class Tis(Frozen):
    """Truncated importance sampling: a token's term times min(rho, high)."""

    kind: Literal["tis"] = "tis"
    """Selects this kind."""
    level: Literal["token", "sequence"] = "token"
    """rho of each token, or the product over the response."""
    high: Positive
    """Upper bound of the factor."""


class Mis(Frozen):
    """A token's term times rho within low to high; others leave the loss and its denominators."""

    kind: Literal["mis"] = "mis"
    """Selects this kind."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """rho of each token, the product over the response, or its geometric mean."""
    low: Positive | None = None
    """Lower bound of rho. Defaults to null: no bound."""
    high: Positive
    """Upper bound of rho."""


class IcePop(Frozen):
    """A token's term times rho within low to high, else 0 [2510.18855]. The band may be another if A is negative
    [2610.11959]."""

    kind: Literal["icepop"] = "icepop"
    """Selects this kind."""
    low: Positive
    """Lower bound of rho."""
    high: Positive
    """Upper bound of rho."""
    negative_low: Positive | None = None
    """Lower bound of rho if A is negative. Defaults to null: `low`."""
    negative_high: Positive | None = None
    """Upper bound of rho if A is negative. Defaults to null: `high`."""


class SequenceMask(Frozen):
    """DeepSeek-V3.2's mask: 0 for a response with A < 0 whose mean log(mu/pi_theta) is over delta."""

    kind: Literal["sequence-mask"] = "sequence-mask"
    """Selects this kind."""
    delta: Annotated[float, Field(ge=0, le=1e6)]
    """Bound of a response's mean log(mu/pi_theta), in nats per token."""


CorrectionConfig = Annotated[NoCorrection | Tis | Mis | IcePop | SequenceMask, Field(discriminator="kind")]

# ---- kl: KL(policy, pi_ref), estimated from the sampled tokens, times beta --------------------------------------


class NoKL(Frozen):
    kind: Literal["none"] = "none"
    """No KL, and no reference model."""


class KL(Frozen):
    """Estimator of the KL at each token (http://joschu.net/blog/kl-approx.html); k3 is GRPO's."""

    kind: Literal["k1", "k2", "k3"]
    """Selects the estimator."""
    place: Literal["loss", "reward"] = "loss"
    """loss: KL of pi_theta, added to the loss, with a gradient; reward: KL of pi_old, taken off the reward."""
    beta: Positive
    """Coefficient of the KL."""


class UnbiasedKL(Frozen):
    """k3 times the token's ratio, pi_theta/pi_old or pi_theta/mu (DeepSeek-V3.2). In the loss only: the ratio is 1 when
    rewards are made."""

    kind: Literal["unbiased"] = "unbiased"
    """Selects this kind."""
    place: Literal["loss"] = "loss"
    """loss: added to the loss, with a gradient."""
    beta: Positive
    """Coefficient of the KL."""


KLConfig = Annotated[NoKL | KL | UnbiasedKL, Field(discriminator="kind")]


# ---- centering ---------------------------------------------------------------------------------------------------


class Centering(Frozen):
    """Score centering [2609.20807]: takes off each token's term its mean over mu, with the same clip and correction.
    Needs objective.denominator rollout, objective.ratio token and objective.clip.kind weight."""

    top_k: Annotated[int, Field(ge=1, le=1024)] = 128
    """Number of mu's most likely tokens that the servers return for each token; 8 bytes each. The rest of the
    vocabulary counts as proportional to pi_theta. A vocabulary of no more tokens is returned whole: the mean is exact.
    """


class ObjectiveConfig(Frozen):
    """The switches of an objective; a preset sets them (megatron_rl/config/presets)."""

    ratio: Literal["token", "sequence", "sequence-token", "sequence-product", "geometric"] = "token"
    """token: PPO, GRPO [2402.03300]; sequence: GSPO [2507.18071]; sequence-token: GSPO-token; sequence-product: TOPR
    [2503.14286]; geometric: GMPO [2507.20673]."""
    denominator: Literal["old", "rollout"] = "old"
    """pi_old, recomputed by the trainer, or mu, the rollout engine's log-probs."""
    clip: ClipConfig = MinClip()
    aggregation: Literal[
        "token-mean", "prompt-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant-length"
    ] = "seq-mean-token-mean"
    """token-mean: mean over all tokens. prompt-mean: mean over prompts, of the mean over all tokens of the prompt's
    responses. The others are means over responses: of their token mean, of their token sum, or of their token sum /
    constant_length."""
    constant_length: PositiveInt | None = None
    """Tokens by which the constant-length aggregation divides (Dr.GRPO [2503.20783]). Defaults to null. The other
    aggregations need null."""
    advantage: AdvantageConfig = GroupAdvantage()
    correction: CorrectionConfig = NoCorrection()
    kl: KLConfig = NoKL()
    router_shift: Annotated[float, Field(gt=0, le=1)] | None = None
    """Smallest router shift of RSPO [2510.23027]. Each token's ratio is multiplied by the router shift before the clip.
    It measures how little the routers have moved since pi_old. Costs one more forward pass for each mini-batch.
    Defaults to null, which disables it."""
    centering: Centering | None = None
    """Defaults to null, which disables it."""
    custom: str | None = None
    """Your own loss, `package.module:function`, which may lie in the working directory. It is called in place of
    objectives.policy_loss.policy_loss with equal arguments. It does not change advantages, nor the denominators under a
    correction."""
