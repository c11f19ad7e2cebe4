"""Batches for tests of objectives and metrics, and reference losses in float64 NumPy without shared code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
import torch
import yaml
from objective_centering import mean_terms, random_top
from pydantic import TypeAdapter

from megatron_rl.config.sources import PRESETS
from megatron_rl.config.switches import (
    ClipConfig,
    CorrectionConfig,
    IcePop,
    KLConfig,
    MinClip,
    Mis,
    ObjectiveConfig,
    SequenceMask,
    Tis,
)
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.inputs import LossInputs

GRPO = ObjectiveConfig(ratio="token", aggregation="seq-mean-token-mean", clip=MinClip(low=0.2, high=0.2))
DAPO = ObjectiveConfig(ratio="token", aggregation="token-mean", clip=MinClip(low=0.2, high=0.28))
# With these clips some of the short sequences are clipped, but not all.
GSPO = ObjectiveConfig(ratio="sequence", aggregation="seq-mean-token-mean", clip=MinClip(low=0.04, high=0.06))
GSPO_TOKEN = GSPO.model_copy(update={"ratio": "sequence-token"})
OBJECTIVES = {"grpo": GRPO, "dapo": DAPO, "gspo": GSPO, "gspo-token": GSPO_TOKEN}
FAMILY = {
    file.stem: ObjectiveConfig.model_validate(yaml.safe_load(file.read_text())["objective"])
    for file in sorted(PRESETS.glob("*.yaml"))
}
"""The unchanged presets."""
CORRECTIONS: list[CorrectionConfig] = [
    Tis(high=1.3),
    Tis(level="sequence", high=1.3),
    Mis(high=1.3),
    Mis(low=0.8, high=1.3),
    Mis(level="sequence", low=0.5, high=2.0),
    Mis(level="geometric", low=0.7, high=1.5),
    IcePop(low=0.8, high=1.3),
    IcePop(low=0.6, high=1.2, negative_low=0.9, negative_high=3.0),
    SequenceMask(delta=0.01),
]

LOW_FOR_ICEPOP = 1e-6


def correction_of(kind: str, **keys: object) -> CorrectionConfig:
    """Returns a correction of any kind. The lower bound of icepop never acts, unless `keys` sets another."""
    if kind == "icepop":
        keys = {"low": LOW_FOR_ICEPOP, **keys}
    return TypeAdapter(CorrectionConfig).validate_python({"kind": kind, **keys})


def kl_of(kind: str, **keys: object) -> KLConfig:
    return TypeAdapter(KLConfig).validate_python({"kind": kind, **keys})


def clip_of(kind: str) -> ClipConfig:
    """Returns a clip of this kind with the band 0.8 to 1.2."""
    return TypeAdapter(ClipConfig).validate_python({"kind": kind, "low": 0.2, "high": 0.2})


@dataclass(frozen=True, eq=False)
class TrainedSequence:
    """One prompt with its response; arrays are [n]."""

    logprobs: np.ndarray
    old: np.ndarray
    rollout: np.ndarray
    entropy: np.ndarray
    mask: np.ndarray
    advantage: float | np.ndarray
    """Advantage of the response, or [n] per token, as from a critic."""
    shift: np.ndarray | None = None
    reference: np.ndarray | None = None
    prompt: int = 0
    """Number of the prompt that it answers."""
    top: np.ndarray | None = None
    """[n, k] log pi_theta of mu's most likely tokens."""
    top_rollout: np.ndarray | None = None
    """[n, k] log mu of them; -inf for one that is missing."""

    @cached_property
    def advantages(self) -> np.ndarray:
        """[|y|] advantages of the masked-in tokens."""
        return np.broadcast_to(self.advantage, self.mask.shape)[self.mask]


def random_sequences(
    seed: int, lengths: Sequence[int], drift: float = 0.3, mismatch: float = 0.1, *, by_token: bool = False
) -> list[TrainedSequence]:
    """Draws sequences with these numbers of masked-in tokens; masked-out tokens hold NaN. Prompts 0 and up have one to
    three responses, in turn.

    With `by_token`, each token has its own advantage. `drift` moves both policy and routers; at 0 the shift is 1.
    """
    rng = np.random.default_rng(seed)
    routers = np.random.default_rng([seed, 1])
    sequences = []
    prompts = itertools.chain.from_iterable(itertools.repeat(prompt, 1 + prompt % 3) for prompt in itertools.count())
    for length, prompt in zip(lengths, prompts, strict=False):
        n = length + int(rng.integers(1, 5))
        mask = np.zeros(n, dtype=bool)
        mask[rng.permutation(n)[:length]] = True
        old = -rng.exponential(1.0, n)
        values = {
            "old": old,
            "logprobs": old + drift * rng.normal(size=n),
            "rollout": old + mismatch * rng.normal(size=n),
            "entropy": rng.exponential(1.0, n),
            "shift": np.exp(-drift * routers.exponential(0.7, n)),
        }
        values = {name: np.where(mask, value, np.nan) for name, value in values.items()}
        top, top_rollout = random_top(np.random.default_rng([seed, 2, len(sequences)]), n, drift, mismatch)
        values |= {
            "top": np.where(mask[:, None], top, np.nan),
            "top_rollout": np.where(mask[:, None], top_rollout, np.nan),
        }
        advantage = np.where(mask, rng.normal(size=n), np.nan) if by_token else float(rng.normal())
        sequences.append(TrainedSequence(**values, mask=mask, advantage=advantage, prompt=prompt))
    return sequences


def pack(sequences: Sequence[TrainedSequence], dtype: torch.dtype = torch.float64, padding: int = 0) -> LossInputs:
    def tensor(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor(np.concatenate([*arrays, np.full((padding, *arrays[0].shape[1:]), np.nan)]), dtype=dtype)

    lengths = [len(sequence.mask) for sequence in sequences]
    mask = np.concatenate([*(sequence.mask for sequence in sequences), np.zeros(padding, dtype=bool)])
    ids = np.concatenate([np.repeat(np.arange(len(sequences)), lengths), np.full(padding, len(sequences) - 1)])
    return LossInputs(
        logprobs=tensor([sequence.logprobs for sequence in sequences]).requires_grad_(),
        old_logprobs=tensor([sequence.old for sequence in sequences]),
        rollout_logprobs=tensor([sequence.rollout for sequence in sequences]),
        advantages=tensor([np.where(s.mask, s.advantage, np.nan) for s in sequences]),
        loss_mask=torch.as_tensor(mask),
        sequence_ids=torch.as_tensor(ids.astype(np.int64)),
        num_sequences=len(sequences),
        router_shift=tensor([sequence.shift for sequence in sequences]),
        top_logprobs=tensor([s.top for s in sequences]) if sequences[0].top is not None else None,
        top_rollout_logprobs=tensor([s.top_rollout for s in sequences]) if sequences[0].top is not None else None,
        prompts=[sequence.prompt for sequence in sequences],
    )


def packed_entropy(sequences: Sequence[TrainedSequence], padding: int = 0) -> torch.Tensor:
    return torch.tensor(np.concatenate([*(s.entropy for s in sequences), np.full(padding, np.nan)]))


def denominators(sequences: Sequence[TrainedSequence]) -> Denominators:
    return _denominators(sequences, [int(sequence.mask.sum()) for sequence in sequences])


def _denominators(sequences: Sequence[TrainedSequence], lengths: Sequence[int]) -> Denominators:
    by_prompt = {
        prompt: sum(length for each, length in zip(sequences, lengths, strict=True) if each.prompt == prompt)
        for prompt in {sequence.prompt for sequence in sequences}
    }
    return Denominators(sum(lengths), sum(length > 0 for length in lengths), by_prompt)


def split(items: Sequence[TrainedSequence], parts: int, seed: int) -> list[list[TrainedSequence]]:
    """Shuffles the items and divides them into at most `parts` non-empty parts."""
    rng = np.random.default_rng(seed)
    shuffled = [items[i] for i in rng.permutation(len(items))]
    cuts = np.sort(rng.integers(0, len(items) + 1, parts - 1))
    bounds = [0, *cuts, len(items)]
    return [shuffled[a:b] for a, b in itertools.pairwise(bounds) if b > a]


Logprobs = list[np.ndarray]  # per sequence, its masked-in tokens


def sequence_terms(
    sequence: TrainedSequence, config: ObjectiveConfig, new: np.ndarray, stopped: np.ndarray
) -> list[float]:
    """Returns the terms of a sequence's tokens at `new`, before aggregation; stop-gradients read `stopped`."""
    if not len(new):
        return []
    factors = correction_factors(sequence, config, stopped)
    values, penalties = surrogate_terms(sequence, config, new, stopped), kl_penalties(sequence, config, new)
    means = sequence.advantages * mean_terms(
        sequence.top, sequence.top_rollout, sequence.mask, sequence.advantages, config
    )
    return [v * f - m - kl for v, f, m, kl in zip(values, factors, means, penalties, strict=True) if f is not None]


def aggregate(terms: Sequence[list[float]], prompts: Sequence[int], config: ObjectiveConfig) -> float:
    """Returns the loss of the terms of each sequence."""
    prompts = [prompt for term, prompt in zip(terms, prompts, strict=True) if term]
    terms = [term for term in terms if term]
    if not terms:
        return 0.0
    lengths = [len(term) for term in terms]
    match config.aggregation:
        case "token-mean":
            return -sum(map(sum, terms)) / sum(lengths)
        case "prompt-mean":
            together = [
                [value for term, own in zip(terms, prompts, strict=True) if own == prompt for value in term]
                for prompt in sorted(set(prompts))
            ]
            return -fmean(map(fmean, together))
        case "seq-mean-token-mean":
            return -fmean(map(fmean, terms))
        case "seq-mean-token-sum":
            return -fmean(map(sum, terms))
        case "constant-length":
            return -sum(map(sum, terms)) / (len(terms) * config.constant_length)


def surrogate_terms(
    sequence: TrainedSequence, config: ObjectiveConfig, new: np.ndarray, stopped: np.ndarray
) -> np.ndarray:
    """Returns each masked-in token's term of J, before corrections and aggregation."""
    old, mu, advantages = sequence.old[sequence.mask], sequence.rollout[sequence.mask], sequence.advantages
    if config.router_shift is not None:  # multiplies every ratio by the shift, raised to its floor
        shift = np.log(np.maximum(sequence.shift[sequence.mask], config.router_shift))
        old, mu = old - shift, mu - shift
    base = old if config.denominator == "old" else mu
    clip = config.clip
    below, above = (getattr(clip, bound, None) for bound in ("low", "high"))
    low = -math.inf if below is None else 1 - below
    high = math.inf if above is None else 1 + above
    if config.ratio == "geometric":
        bounded = [
            min(x, math.inf if above is None else above)
            if a > 0
            else max(x, -math.inf if below is None else -below)
            if a < 0
            else x
            for x, a in zip(new - base, advantages, strict=True)
        ]
        return math.exp(fmean(bounded)) * advantages
    ratio = RATIO[config.ratio]
    weight = ratio(stopped, stopped, base)
    match clip.kind:
        case "min":
            pairs = zip(ratio(new, stopped, base), advantages, strict=True)
            return np.array([_clipped(each, advantage, low, high, clip.dual) for each, advantage in pairs])
        case "mask":
            r = ratio(stopped, stopped, old)
            kept = np.where(advantages > 0, r <= high, r >= low)
            return kept * weight * advantages * new
        case "weight":
            return np.clip(weight, low, high) * advantages * new
        case "tapered":
            return np.where(advantages > 0, 1.0, np.clip(weight, low, high)) * advantages * new
        case "soft-gate":
            tau = np.where(advantages > 0, clip.tau_positive, clip.tau_negative)
            return 4 / tau / (1 + np.exp(-tau * (ratio(new, stopped, base) - 1))) * advantages


def _clipped(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    value = min(ratio * advantage, min(max(ratio, low), high) * advantage)
    return max(value, dual * advantage) if dual is not None and advantage < 0 else value


def kl_penalties(sequence: TrainedSequence, config: ObjectiveConfig, new: np.ndarray) -> np.ndarray:
    """Returns beta KL(pi_theta, pi_ref) of each masked-in token if KL is in the loss, else 0."""
    if config.kl.kind == "none" or config.kl.place == "reward":
        return np.zeros(len(new))
    base = (sequence.old if config.denominator == "old" else sequence.rollout)[sequence.mask]
    return config.kl.beta * kl_estimate(config.kl.kind, sequence.reference[sequence.mask], new, base)


def kl_estimate(kind: str, ref: np.ndarray, new: np.ndarray, base: np.ndarray | None = None) -> np.ndarray:
    """Estimates KL(new, ref) per token from samples of new; `unbiased` uses samples of base."""
    q_over_p = np.exp(ref) / np.exp(new)
    k3 = q_over_p - 1 - np.log(q_over_p)
    match kind:
        case "k1":
            return -np.log(q_over_p)
        case "k2":
            return np.log(q_over_p) ** 2 / 2
        case "k3":
            return k3
        case "unbiased":
            return np.exp(new) / np.exp(base) * k3


def correction_factors(sequence: TrainedSequence, config: ObjectiveConfig, stopped: np.ndarray) -> list[float | None]:
    """Returns the factor of each masked-in token's term; None means that the token counts as masked out."""
    correction, mu = config.correction, sequence.rollout[sequence.mask]
    if correction.kind == "none":
        return [1.0] * len(mu)
    old = sequence.old[sequence.mask] if config.denominator == "old" else stopped
    rho = np.exp(old) / np.exp(mu)
    level = getattr(correction, "level", "token")
    if len(rho) and level != "token":
        rho = np.full(len(rho), math.prod(rho) if level == "sequence" else _geometric_mean(rho))
    low, high = getattr(correction, "low", None) or 0.0, getattr(correction, "high", math.inf)
    if correction.kind == "icepop":  # has another band where A < 0, if one is set
        bad = sequence.advantages < 0
        low = np.where(bad, correction.negative_low or low, low)
        high = np.where(bad, correction.negative_high or high, high)
    # A ratio against mu contains rho already.
    held = np.ones(len(rho)) if config.denominator == "old" else rho
    inside = (low <= rho) & (rho <= high)
    match correction.kind:
        case "tis":
            return list(np.minimum(rho, high) / held)
        case "mis":
            return [each if ok else None for each, ok in zip(rho / held, inside, strict=True)]
        case "icepop":
            return [each if ok else 0.0 for each, ok in zip(rho / held, inside, strict=True)]
        case "sequence-mask":
            drifted = bool(len(mu)) and np.mean(mu - stopped) > correction.delta
            return [0.0 if drifted and advantage < 0 else 1.0 for advantage in sequence.advantages]


def kept_denominators(sequences: Sequence[TrainedSequence], config: ObjectiveConfig) -> Denominators:
    """Returns the denominators of a mini-batch without the tokens that its correction rejects."""
    factors = [correction_factors(s, config, s.logprobs[s.mask]) for s in sequences]
    return _denominators(sequences, [sum(factor is not None for factor in each) for each in factors])


def _geometric_mean(ratios: np.ndarray) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


RATIO: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "token": lambda new, stopped, base: np.exp(new) / np.exp(base),
    "sequence": lambda new, stopped, base: np.full(len(new), _geometric_mean(np.exp(new) / np.exp(base))),
    "sequence-token": lambda new, stopped, base: (
        _geometric_mean(np.exp(stopped) / np.exp(base)) * np.exp(new) / np.exp(stopped)
    ),
    "sequence-product": lambda new, stopped, base: np.full(len(new), math.prod(np.exp(new) / np.exp(base))),
}


def reference(sequences: Sequence[TrainedSequence], config: ObjectiveConfig) -> tuple[float, np.ndarray]:
    """Returns the loss and its gradient, as `differentiated`. Only a moved sequence's terms are computed again."""
    prompts = [sequence.prompt for sequence in sequences]
    at_rest = [sequence_terms(s, config, s.logprobs[s.mask], s.logprobs[s.mask]) for s in sequences]

    def loss(live: Logprobs, frozen: Logprobs) -> float:
        each = zip(sequences, at_rest, live, frozen, strict=True)
        terms = [rest if new is own else sequence_terms(s, config, new, own) for s, rest, new, own in each]
        return aggregate(terms, prompts, config)

    return differentiated(sequences, loss)


def differentiated(
    sequences: Sequence[TrainedSequence], loss: Callable[[Logprobs, Logprobs], float]
) -> tuple[float, np.ndarray]:
    """Returns the loss, and its gradient at each masked-in token in order, by central differences."""
    here = [sequence.logprobs[sequence.mask] for sequence in sequences]
    step = 1e-6
    gradient = []
    for i, values in enumerate(here):
        for t in range(len(values)):
            ends = []
            for sign in (1, -1):
                moved = [*here]
                moved[i] = values.copy()
                moved[i][t] += sign * step
                ends.append(loss(moved, here))
            gradient.append((ends[0] - ends[1]) / (2 * step))
    return loss(here, here), np.array(gradient)
