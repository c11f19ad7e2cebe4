"""Estimators of KL(p, q) from samples of p, by token; log_ratio = log q - log p of what was sampled, any shape.

http://joschu.net/blog/kl-approx.html. Their means agree; their variances and gradients do not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_rl.config.switches import KL, NoKL, ObjectiveConfig, UnbiasedKL
from megatron_rl.objectives.ratios import Tokens, token_log_ratio


def k1(log_ratio: Tensor) -> Tensor:
    """-log(q/p): unbiased, of either sign."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """log(q/p)^2 / 2: biased, never negative; its mean gradient in q is that of KL(p, q) where p = q."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative; the KL term of GRPO [2402.03300, equation 4]."""
    return log_ratio.expm1() - log_ratio


def unbiased(log_ratio: Tensor, log_importance: Tensor) -> Tensor:
    """k3 times r = exp(log_importance), for samples of another policy than p = pi_theta: unbiased in value and in
    gradient (DeepSeek-V3.2). log_importance = log pi_theta - log pi_old, of log_ratio's shape; mu takes the place of
    pi_old under `denominator: rollout`."""
    return log_importance.exp() * k3(log_ratio)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By kind of KL; UnbiasedKL needs the importance ratio too."""


def kl_terms(tokens: Tokens, config: ObjectiveConfig, uncounted: Tensor | None = None) -> Tensor:
    """[M] beta times the estimate of KL(pi_theta, pi_ref) at each token, differentiable in log pi_theta: what is added
    to the loss [2402.03300, equation 3]; 0 where `uncounted` [M] bool. Raises ValueError without pi_ref or a kind."""
    kl = config.kl
    if tokens.reference_logprobs is None or isinstance(kl, NoKL):
        raise ValueError("objective.kl: a KL term needs reference_logprobs and a kind other than none")
    log_ratio = tokens.reference_logprobs - tokens.logprobs
    log_importance = token_log_ratio(tokens, config.denominator)
    if uncounted is not None:  # before exp: the gradient of 0 times what overflows is NaN
        log_ratio = log_ratio.masked_fill(uncounted, 0.0)
        log_importance = log_importance.masked_fill(uncounted, 0.0)
    if isinstance(kl, UnbiasedKL):
        return kl.beta * unbiased(log_ratio, log_importance)
    return kl.beta * ESTIMATORS[kl.kind](log_ratio)


def in_loss(config: ObjectiveConfig) -> bool:
    return not isinstance(config.kl, NoKL) and config.kl.place == "loss"


def in_reward(config: ObjectiveConfig) -> bool:
    return isinstance(config.kl, KL) and config.kl.place == "reward"
