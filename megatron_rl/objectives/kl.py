"""Estimators of KL(p, q) from samples of p, by token; log_ratio = log q - log p of what was sampled, any shape.

http://joschu.net/blog/kl-approx.html. Their means agree; their variances and gradients do not.
"""

from __future__ import annotations

from torch import Tensor


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
    """k3 times r = exp(log_importance), for samples that are not of p = pi_theta but of pi_old: unbiased again, in
    value and in gradient (DeepSeek-V3.2). log_importance = log pi_theta - log pi_old, of log_ratio's shape."""
    return log_importance.exp() * k3(log_ratio)
