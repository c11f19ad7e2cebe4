"""Score centering in float64 NumPy: mu's most likely tokens, and the mean of each token's term over mu."""

from __future__ import annotations

import math

import numpy as np

from megatron_rl.config.switches import IcePop, ObjectiveConfig, Tis, WeightClip


def random_top(
    rng: np.random.Generator, n: int, drift: float, mismatch: float, size: int = 7, k: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Draws [n, k] log-probs, under pi_theta and mu, of mu's k most likely tokens in a vocabulary of `size`.

    Every fifth position has one token fewer.
    """
    logits = 2 * rng.normal(size=(n, size))
    moved = logits + (drift + mismatch) * rng.normal(size=(n, size))
    q, p = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (logits, moved))
    order = np.argsort(-q, axis=-1)[:, :k]
    top, top_rollout = np.take_along_axis(p, order, -1), np.take_along_axis(q, order, -1)
    top_rollout[::5, -1] = -np.inf
    return top, top_rollout


def mean_terms(
    top: np.ndarray | None,
    top_rollout: np.ndarray | None,
    mask: np.ndarray,
    advantages: np.ndarray,
    config: ObjectiveConfig,
) -> np.ndarray:
    """Returns sum_v q_v f(p_v/q_v) log p_v of each masked-in token, with mu's tail in proportion to pi_theta's."""
    if config.centering is None or top is None or top_rollout is None:
        return np.zeros(int(mask.sum()))
    found = []
    for log_p, log_q, advantage in zip(top[mask], top_rollout[mask], advantages, strict=True):
        there = log_q > -np.inf
        p, q = np.exp(log_p[there]), np.exp(log_q[there])
        alpha = (1 - q.sum()) / (1 - p.sum())
        masses = q * centred_weight(p / q, advantage, config) - alpha * centred_weight(1 / alpha, advantage, config) * p
        found.append((masses * log_p[there]).sum())
    return np.array(found)


def centred_weight(ratio: np.ndarray, advantage: float, config: ObjectiveConfig) -> np.ndarray:
    """Returns f(pi_theta/mu)."""
    clip, correction = config.clip, config.correction
    assert isinstance(clip, WeightClip)
    low = -math.inf if clip.low is None else 1 - clip.low
    weight = np.clip(ratio, low, math.inf if clip.high is None else 1 + clip.high)
    if isinstance(correction, Tis):
        return weight * np.minimum(1, correction.high / ratio)
    if isinstance(correction, IcePop):
        below = correction.negative_low if advantage < 0 and correction.negative_low else correction.low
        above = correction.negative_high if advantage < 0 and correction.negative_high else correction.high
        return weight * ((ratio >= below) & (ratio <= above))
    return weight


def metrics(
    top: np.ndarray, top_rollout: np.ndarray, new: np.ndarray, mu: np.ndarray, advantage: float, config: ObjectiveConfig
) -> dict[str, list[float]]:
    """Returns each metric of score centering at each of a response's tokens.

    Half an L1 norm is computed over a vocabulary of the head and one token for the tail, whose gradient has one sign.
    """
    found: dict[str, list[float]] = {name: [] for name in ("rollout_mass", "policy_mass", "alpha", "drift", "score")}
    for log_p, log_q, own, own_mu in zip(top, top_rollout, new, mu, strict=True):
        there = log_q > -np.inf
        p, q = np.exp(log_p[there]), np.exp(log_q[there])
        p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
        masses = q * centred_weight(p / q, advantage, config)
        found["rollout_mass"].append(1 - q[-1])
        found["policy_mass"].append(1 - p[-1])
        found["alpha"].append(q[-1] / p[-1])
        found["drift"].append(np.abs(masses - p * masses.sum()).sum() / 2)
        weight = centred_weight(np.exp(own - own_mu), advantage, config)
        found["score"].append(float(weight) * max(1 - np.exp(own), 0.0))
    return found
