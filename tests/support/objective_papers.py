"""J of every preset with its paper's formula and numbers: float64 NumPy on lists of responses, no shared code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from objective_reference import Logprobs, TrainedSequence


@dataclass(frozen=True, eq=False)
class Response:
    """[|y|] log-probs of the masked-in tokens. `stopped` is pi_theta inside a stop-gradient; `gamma` is RSPO's router
    shift."""

    new: np.ndarray
    stopped: np.ndarray
    old: np.ndarray
    mu: np.ndarray
    gamma: np.ndarray
    advantage: float | np.ndarray  # per token with a critic and in gspo_token
    prompt: int = 0
    top: np.ndarray | None = None
    top_mu: np.ndarray | None = None


def ppo_terms(y: Response, low: float, high: float) -> np.ndarray:
    r, a = np.exp(y.new - y.old), y.advantage
    return np.minimum(r * a, np.clip(r, 1 - low, 1 + high) * a)


def grpo(batch: Sequence[Response]) -> float:
    return np.mean([ppo_terms(y, 0.2, 0.2).mean() for y in batch])


def dapo(batch: Sequence[Response]) -> float:
    return sum(ppo_terms(y, 0.2, 0.28).sum() for y in batch) / sum(len(y.new) for y in batch)


def ppo(batch: Sequence[Response]) -> float:
    return np.concatenate([ppo_terms(y, 0.2, 0.2) for y in batch]).mean()


def dr_grpo(batch: Sequence[Response]) -> float:
    return sum(ppo_terms(y, 0.2, 0.2).sum() for y in batch) / (len(batch) * 3000)


def gspo(batch: Sequence[Response]) -> float:
    s = np.array([np.prod(np.exp(y.new - y.old)) ** (1 / len(y.new)) for y in batch])
    a = np.array([y.advantage for y in batch])
    return np.minimum(s * a, np.clip(s, 1 - 3e-4, 1 + 4e-4) * a).mean()


def gspo_token(batch: Sequence[Response]) -> float:
    per_response = []
    for y in batch:
        s = np.prod(np.exp(y.stopped - y.old)) ** (1 / len(y.new)) * np.exp(y.new) / np.exp(y.stopped)
        terms = np.minimum(s * y.advantage, np.clip(s, 1 - 3e-4, 1 + 4e-4) * y.advantage)
        per_response.append(terms.mean())
    return np.mean(per_response)


def gmpo(batch: Sequence[Response]) -> float:
    per_response = []
    for y in batch:
        sign = np.sign(y.advantage)
        r = np.exp(y.new - y.old)
        held = np.minimum(r**sign, np.clip(r, np.exp(-0.4), np.exp(0.4)) ** sign) ** sign
        per_response.append(np.prod(held) ** (1 / len(held)) * y.advantage)
    return np.mean(per_response)


def rspo(batch: Sequence[Response]) -> float:
    per_response = []
    for y in batch:
        sign = np.sign(y.advantage)
        w = np.exp(y.new - y.old) * np.maximum(y.gamma, 0.8)
        held = np.minimum(w**sign, np.clip(w, np.exp(-0.4), np.exp(0.4)) ** sign) ** sign
        per_response.append(np.prod(held) ** (1 / len(held)) * y.advantage)
    return np.mean(per_response)


def cispo(batch: Sequence[Response]) -> float:
    """Uses the cap of ScaleRL, TRL and ms-swift, because the paper gives no number."""
    terms = [np.minimum(np.exp(y.stopped - y.old), 5.0) * y.advantage * y.new for y in batch]
    return np.concatenate(terms).mean()


def sapo(batch: Sequence[Response]) -> float:
    per_response = []
    for y in batch:
        tau = 1.0 if y.advantage > 0 else 1.05
        gate = 4 / tau / (1 + np.exp(-tau * (np.exp(y.new - y.old) - 1)))
        per_response.append((gate * y.advantage).mean())
    return np.mean(per_response)


def rloo(batch: Sequence[Response]) -> float:
    return np.mean([(np.exp(y.stopped - y.old) * y.advantage * y.new).sum() for y in batch])


def minirl(batch: Sequence[Response]) -> float:
    total = 0.0
    for y in batch:
        r = np.exp(y.stopped - y.old)
        kept = r <= 1.27 if y.advantage > 0 else r >= 0.8
        total += (kept * np.minimum(np.exp(y.stopped - y.mu), 5.0) * y.advantage * y.new).sum()
    return total / len(batch)


def topr(batch: Sequence[Response]) -> float:
    total = 0.0
    for y in batch:
        weight = 1.0 if y.advantage > 0 else min(np.prod(np.exp(y.stopped) / np.exp(y.mu)), 1.0)
        total += weight * y.advantage * y.new.sum()
    return total / len(batch)


def icepop(batch: Sequence[Response]) -> float:
    """Ring-1T's equation without its KL, as grpo is without its own."""
    per_response = []
    for y in batch:
        k = np.exp(y.old - y.mu)
        per_response.append((np.where((k >= 0.5) & (k <= 5.0), k, 0.0) * ppo_terms(y, 0.2, 0.2)).mean())
    return np.mean(per_response)


def mimo(batch: Sequence[Response]) -> float:
    bounds = {True: (0.2, 5.0), False: (0.2, 5.0)}
    per_prompt = []
    for prompt in sorted({y.prompt for y in batch}):
        answers = [y for y in batch if y.prompt == prompt]
        total = 0.0
        for y in answers:
            r, advantages = np.exp(y.stopped - y.mu), np.broadcast_to(y.advantage, y.new.shape)
            for weight, a, logprob in zip(r, advantages, y.new, strict=True):
                low, high = bounds[a >= 0]
                total += weight * (low <= weight <= high) * a * logprob
        per_prompt.append(total / sum(len(y.new) for y in answers))
    return np.mean(per_prompt)


def score_centering(batch: Sequence[Response]) -> float:
    """Uses the paper's weight of 1 for REINFORCE, and its head and tail."""
    total = 0.0
    for y in batch:
        for logprob, a, log_p, log_q in zip(
            y.new, np.broadcast_to(y.advantage, y.new.shape), y.top, y.top_mu, strict=True
        ):
            q = np.exp(log_q)
            p = np.exp(log_p) * (q > 0)
            alpha = (1 - sum(q)) / (1 - sum(p))
            total += a * (logprob - sum((q - alpha * p) * log_p))
    return total / sum(len(y.new) for y in batch)


PAPERS: dict[str, Callable[[Sequence[Response]], float]] = {
    "cispo": cispo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gmpo": gmpo,
    "grpo": grpo,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "icepop": icepop,
    "mimo": mimo,
    "minirl": minirl,
    "ppo": ppo,
    "rloo": rloo,
    "rspo": rspo,
    "sapo": sapo,
    "score_centering": score_centering,
    "topr": topr,
}


def paper_loss(sequences: Sequence[TrainedSequence], name: str, live: Logprobs, frozen: Logprobs) -> float:
    batch = [
        Response(
            new,
            stopped,
            s.old[s.mask],
            s.rollout[s.mask],
            s.shift[s.mask],
            s.advantages if np.ndim(s.advantage) else s.advantage,
            s.prompt,
            None if s.top is None else s.top[s.mask],
            None if s.top_rollout is None else s.top_rollout[s.mask],
        )
        for s, new, stopped in zip(sequences, live, frozen, strict=True)
        if s.mask.any()
    ]
    return -PAPERS[name](batch)
