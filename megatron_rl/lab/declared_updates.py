"""Declares the metrics of optimizer steps: the policy's, the critic's, and those of supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_rl.lab.declared import METRIC, NUMBER, DeclaredMetric, DeclaredTable, Healthy
from megatron_rl.lab.metric_kinds import Kind

SUM, MEAN, TAIL, RATIO, VALUE = Kind.SUM, Kind.MEAN, Kind.TAIL, Kind.RATIO, Kind.VALUE

BEYOND = (2, 10)
"""F(tau): fraction of tokens with max(rho, 1/rho) > tau."""
Bins = Mapping[str, tuple[float, float]]
"""Lower and upper bound of each bin; the upper one is outside."""
ENTROPY_BINS: Bins = {"entropy_low": (0.0, 0.1), "entropy_middle": (0.1, 1.0), "entropy_high": (1.0, math.inf)}
"""Bins of tokens by entropy in nat, below 0.1 a token is almost certain, and 1 is a choice of e tokens."""
LAG_BINS: Bins = {"lag_0": (0, 1), "lag_1": (1, 2), "lag_2_3": (2, 4), "lag_4_7": (4, 8), "lag_8_up": (8, math.inf)}
"""Bins of tokens by lag in weight versions."""


def _bounds(low: float, high: float) -> str:
    if high - low == 1:
        return f"of {low:g}"
    return f"of {low:g} or more" if math.isinf(high) else f"from {low:g} to below {high:g}"


PAIRS = {
    "rollout_old": "(p, q) = (mu, pi_old), the mismatch of the engines",
    "old_policy": "(p, q) = (pi_old, pi_theta), the drift of the updates",
    "policy_reference": "(p, q) = (pi_theta, pi_ref), the distance from the reference",
}
ESTIMATES = {"k1": "k1 = -log(q/p)", "k3": "k3 = q/p - 1 - log(q/p)"}
UNITS = {"token": "tokens", "sequence": "sequences with at least one such token"}
NEVER = Healthy(0, 0, "only a gradient that is not finite, or an alarm, skips an optimizer step")

_NORMS = {
    "router": "routers",
    "expert": "experts",
    "attention": "attention layers",
    "embedding": "embedding and output layer",
    "other": "all other weights, such as norms and dense layers",
}

POLICY = DeclaredTable(
    "Optimizer steps of the policy",
    "metrics.jsonl",
    "",
    (
        DeclaredMetric(
            "loss", SUM, "1", "Loss that the optimizer step minimises: -J of the objective, or the nll of fine-tuning."
        ),
        DeclaredMetric("tokens", SUM, "token", "Number of tokens that the optimizer step trains on."),
        DeclaredMetric("sequences", SUM, "sequence", "Number of responses with at least one token to train on."),
        DeclaredMetric("entropy", TAIL, "nat", "Entropy of pi_theta over the full vocabulary, by token."),
        DeclaredMetric("advantage", TAIL, "1", "Advantage A, averaged over the tokens of each sequence."),
        DeclaredMetric(
            "ratio", RATIO, "1", "r = pi_theta/pi_old by token; exactly 1 in the first mini-batch.", "PPO [1707.06347]"
        ),
        DeclaredMetric(
            "rho",
            RATIO,
            "1",
            "rho = pi_old/mu by token: how far trainer and rollout engine disagree.",
            "R3 [2510.11370]",
        ),
        DeclaredMetric("omega", RATIO, "1", "omega = pi_theta/mu = r rho by token.", "MiniRL [2512.01374]"),
        DeclaredMetric(
            "sequence_ratio",
            RATIO,
            "1",
            "s = exp(mean over a sequence's tokens of log r); of log omega if the objective's denominator is rollout.",
            "GSPO [2507.18071]",
        ),
        DeclaredMetric(
            "abs_log_sequence_ratio",
            TAIL,
            "nat",
            "|log s| by sequence; choose GSPO's clip from its quantiles.",
            "GSPO [2507.18071]",
        ),
        DeclaredMetric(
            "rho/beyond_{tau}",
            MEAN,
            "fraction of tokens",
            "F({tau}): fraction of tokens with max(rho, 1/rho) > {tau}.",
            "R3 [2510.11370] reports F(2) of 2.54e-4 without and 5.83e-6 with R3",
            fields={"tau": {str(tau): str(tau) for tau in BEYOND}},
        ),
        DeclaredMetric("abs_logprob_gap", TAIL, "nat", "|log pi_old - log mu| by token."),
        DeclaredMetric(
            "mismatch/{measure}/{bin}",
            MEAN,
            "nat or fraction",
            "{measure}, of {bin}.",
            "MiMo-V2.6 [2610.11959] for lags",
            fields={
                "measure": {
                    "share": "Fraction of tokens",
                    "abs_logprob_gap": "Mean of |log pi_old - log mu|",
                    "k1": "Mean of k1, an estimate of KL(mu, pi_old)",
                    "k3": "Mean of k3, an estimate of KL(mu, pi_old)",
                    **{f"beyond_{tau}": f"Fraction of tokens with max(rho, 1/rho) > {tau}" for tau in BEYOND},
                },
                "bin": {
                    **{
                        name: f"tokens at which pi_theta has an entropy {_bounds(*b)} nat"
                        for name, b in ENTROPY_BINS.items()
                    },
                    **{
                        name: f"tokens of a weight version {_bounds(*b)} before pi_old's"
                        for name, b in LAG_BINS.items()
                    },
                },
            },
        ),
        DeclaredMetric(
            "log_perplexity_gap",
            TAIL,
            "nat",
            "Log perplexity under pi_old minus log perplexity under mu, by sequence.",
        ),
        DeclaredMetric(
            "kl/{pair}/{estimate}",
            MEAN,
            "nat",
            "Mean over tokens of {estimate}, an estimate of KL(p, q) with {pair}.",
            "Schulman's estimators; R3 [2510.11370] reports KL(mu, pi_old) of 1.535e-3 without and 7.5e-4 with R3",
            fields={"pair": PAIRS, "estimate": ESTIMATES},
        ),
        DeclaredMetric(
            "clip/{side}/{acts}/{unit}",
            MEAN,
            "fraction",
            "Fraction of {unit} {side} the band of the clip, {acts}.",
            "GSPO [2507.18071] shows about 0.15 of tokens for GSPO and 0.0013 for GRPO (read off a figure)",
            fields={
                "side": {"low": "whose ratio is below", "high": "whose ratio is above"},
                "acts": {"active": "if the clip also acts on the gradient", "any": "whether or not the clip acts"},
                "unit": UNITS,
            },
        ),
        DeclaredMetric(
            "router_shift",
            TAIL,
            "1",
            "Router shift factor gamma by token, before its floor; 1 if no router has moved.",
            "RSPO [2510.23027]",
        ),
        DeclaredMetric(
            "router_shift/floored",
            MEAN,
            "fraction of tokens",
            "Fraction of tokens whose router shift factor the floor raised.",
            "RSPO [2510.23027]",
        ),
        DeclaredMetric(
            "clip/dual/{unit}",
            MEAN,
            "fraction",
            "Fraction of {unit} whose gradient the dual clip takes.",
            "Dual clip [1912.09729]",
            fields={"unit": UNITS},
        ),
        DeclaredMetric(
            "centering/{what}",
            TAIL,
            "1",
            "Score centering, by token: {what}.",
            "score centering [2609.20807]",
            fields={
                "what": {
                    "rollout_mass": "probability of mu's most likely tokens under mu",
                    "policy_mass": "their probability under pi_theta",
                    "alpha": "probability of all other tokens under mu over that under pi_theta",
                    "drift": "half the L1 norm, in the logits, of the gradient that is taken off",
                    "score": "half the L1 norm, in the logits, of the gradient of the sampled token's term",
                }
            },
        ),
        DeclaredMetric(
            "correction/{what}/{unit}",
            MEAN,
            "fraction",
            "Fraction of {unit} whose {what} because of the mismatch between mu and the trainer.",
            "docs/algorithms.md, Corrections",
            fields={"what": {"masked": "term was dropped", "truncated": "weight was reduced"}, "unit": UNITS},
        ),
        DeclaredMetric("lr", VALUE, "1", "Learning rate of the optimizer step."),
        DeclaredMetric(
            "grad_norm", VALUE, "1", "Global norm of the gradient before clipping; null if it is not finite."
        ),
        DeclaredMetric(
            "grad_norm/{weights}",
            VALUE,
            "1",
            "Norm of the gradient before clipping, of {weights} only; the squares of all add up to grad_norm's.",
            fields={"weights": _NORMS},
        ),
        DeclaredMetric(
            "grad_norm/router/layer_{layer}",
            VALUE,
            "1",
            "Norm of the gradient before clipping, of one layer's router.",
            fields={"layer": NUMBER},
        ),
        DeclaredMetric(
            "skipped",
            VALUE,
            "0 or 1",
            "1 if the optimizer step was skipped because its gradient is not finite, or by an alarm.",
            healthy=NEVER,
        ),
        DeclaredMetric(
            "alarm/{metric}/{action}",
            VALUE,
            "0 or 1",
            "1 if the alarm of `lab.alarms` on this metric fired.",
            fields={"metric": METRIC, "action": {"warn": "warn", "skip": "skip", "stop": "stop"}},
        ),
    ),
)

FINE_TUNING = DeclaredTable(
    "Supervised fine-tuning",
    "metrics.jsonl",
    "",
    (DeclaredMetric("nll", TAIL, "nat", "Negative log-likelihood of the response's tokens, by token."),),
    "`megatron-rl sft` writes these, and of the policy's metrics `loss`, `tokens`, `entropy`, `lr`, `grad_norm`, "
    "`grad_norm/{weights}` and `skipped`.",
)

CRITIC = DeclaredTable(
    "Optimizer steps of the critic",
    "metrics.jsonl",
    "critic/",
    (
        DeclaredMetric("loss", SUM, "1", "Value loss that the critic's optimizer step minimises.", "PPO [1707.06347]"),
        DeclaredMetric("value", TAIL, "1", "V of the critic in training, by token."),
        DeclaredMetric(
            "return", TAIL, "1", "Target of the critic by token: A + V_old, before A is normalised.", "GAE [1506.02438]"
        ),
        DeclaredMetric("residual", TAIL, "1", "Return minus V, by token."),
        DeclaredMetric("outcome", TAIL, "1", "Discounted rewards that followed the token; no value is in it."),
        DeclaredMetric("outcome_residual", TAIL, "1", "Outcome minus V, by token."),
        DeclaredMetric(
            "clipped", MEAN, "fraction of tokens", "Fraction of tokens on which the clip of the value acts."
        ),
        DeclaredMetric(
            "explained_variance",
            VALUE,
            "1",
            "1 - Var(return - V) / Var(return) of a mini-batch before its update.",
        ),
        DeclaredMetric(
            "explained_variance/outcome",
            VALUE,
            "1",
            "1 - Var(outcome - V) / Var(outcome) of a mini-batch before its update.",
        ),
        DeclaredMetric("lr", VALUE, "1", "Learning rate of the critic's optimizer step."),
        DeclaredMetric("grad_norm", VALUE, "1", "Global norm of the critic's gradient before clipping."),
        DeclaredMetric(
            "grad_norm/{weights}",
            VALUE,
            "1",
            "Norm of the critic's gradient before clipping, of {weights} only.",
            fields={"weights": _NORMS | {"value_head": "value head"}},
        ),
        DeclaredMetric(
            "grad_norm/router/layer_{layer}",
            VALUE,
            "1",
            "Norm of the critic's gradient before clipping, of one layer's router.",
            fields={"layer": NUMBER},
        ),
        DeclaredMetric("skipped", VALUE, "0 or 1", "1 if the critic's optimizer step was skipped.", healthy=NEVER),
        DeclaredMetric(
            "later/grad_norm/max",
            VALUE,
            "1",
            "Largest norm of the critic's gradient in the passes over the rollout batch after the first.",
        ),
        DeclaredMetric(
            "later/skipped",
            VALUE,
            "optimizer step",
            "Number of skipped optimizer steps in the critic's passes after the first.",
            healthy=NEVER,
        ),
    ),
)
