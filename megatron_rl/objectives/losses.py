"""The clip and the aggregation of an objective. Shapes as in megatron_rl.objectives.inputs.

w is the importance ratio, whichever was chosen; a surrogate is what each token adds to J, before the aggregation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rl.config.switches import (
    BandClip,
    ClipConfig,
    MaskClip,
    MinClip,
    ObjectiveConfig,
    SoftGate,
    TaperedClip,
    WeightClip,
)
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.inputs import Clipping
from megatron_rl.objectives.ratios import RATIOS, Tokens, shifted, token_log_ratio

# log w beyond which the soft gate is flat to the last bit of float64. exp(log w) may overflow there, and its gradient
# would be 0 * inf.
FLAT_GATE = 20.0


def surrogate(log_weight: Tensor, tokens: Tokens, where: Clipping, config: ObjectiveConfig) -> Tensor:
    """[M] from log w [M]."""
    if config.ratio == "geometric":
        return geometric_surrogate(log_weight, tokens, where, config.clip)
    match config.clip:
        case MinClip() as clip:
            return clipped_surrogate(log_weight, tokens, where, clip)
        case MaskClip():
            return masked_surrogate(log_weight, tokens, where)
        case WeightClip() as clip:
            return weighted_surrogate(log_weight, tokens, clip)
        case TaperedClip() as clip:
            return tapered_surrogate(log_weight, tokens, clip)
        case SoftGate() as gate:
            return gated_surrogate(log_weight, tokens, gate)


def clipped_surrogate(log_weight: Tensor, tokens: Tokens, where: Clipping, clip: MinClip) -> Tensor:
    """min(w A, clip(w, 1 - low, 1 + high) A) [1707.06347, equation 7].

    With the dual clip [1912.09729, equation 5], not below dual * A where A < 0. Where a clip is active the
    value is a constant: no gradient. Elsewhere the gradient in log w is w A.
    """
    bounded = where.active_low | where.active_high
    bound = torch.full_like(log_weight, 1 + (clip.high or 0.0)).masked_fill(where.active_low, 1 - (clip.low or 0.0))
    if clip.dual is not None and where.active_dual is not None:
        bounded = bounded | where.active_dual
        bound = bound.masked_fill(where.active_dual, clip.dual)
    # Not torch.minimum: the gradient of a clipped ratio that overflows would be 0 * inf.
    ratio = torch.where(bounded, bound, log_weight.masked_fill(bounded, 0.0).exp())
    return ratio * tokens.advantages


def masked_surrogate(log_weight: Tensor, tokens: Tokens, where: Clipping) -> Tensor:
    """M sg[w] A log pi, M = 0 where the clip of r = pi_theta/pi_old is active: MiniRL [2512.01374]."""
    dropped = where.active_low | where.active_high
    weight = log_weight.detach().masked_fill(dropped, 0.0).exp().masked_fill(dropped, 0.0)
    return weight * tokens.advantages * tokens.logprobs


def weighted_surrogate(log_weight: Tensor, tokens: Tokens, clip: WeightClip) -> Tensor:
    """sg[clip(w, 1 - low, 1 + high)] A log pi: CISPO [2506.13585]. Every token keeps a gradient."""
    low, high = log_band(clip)
    return log_weight.detach().clamp(low, high).exp() * tokens.advantages * tokens.logprobs


def tapered_surrogate(log_weight: Tensor, tokens: Tokens, clip: TaperedClip) -> Tensor:
    """A log pi where A > 0, sg[clip(w, 1 - low, 1 + high)] A log pi elsewhere: TOPR [2503.14286]."""
    low, high = log_band(clip)
    weight = log_weight.detach().clamp(low, high).exp().masked_fill(tokens.advantages > 0, 1.0)
    return weight * tokens.advantages * tokens.logprobs


def gated_surrogate(log_weight: Tensor, tokens: Tokens, gate: SoftGate) -> Tensor:
    """(4/tau) sigmoid(tau (w - 1)) A, tau by the sign of A: SAPO [2511.20347]."""
    tau = torch.full_like(log_weight, gate.tau_negative).masked_fill(tokens.advantages > 0, gate.tau_positive)
    ratio = log_weight.clamp(max=FLAT_GATE).exp()
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * tokens.advantages


def geometric_surrogate(log_weight: Tensor, tokens: Tokens, where: Clipping, clip: ClipConfig) -> Tensor:
    """exp((1/|y_i|) sum_t clip(log r_t, -low, high)) A, at each token of i; the clip acts by the sign of A: GMPO
    [2507.20673]."""
    low, high = log_band(clip, geometric=True)
    bounded = log_weight.masked_fill(where.active_low, low).masked_fill(where.active_high, high)
    return tokens.sequence_mean(bounded)[tokens.sequence_ids].exp() * tokens.advantages


def clipping(tokens: Tokens, config: ObjectiveConfig) -> Clipping:
    """Finds the tokens whose ratio, times the router shift if the objective has one, leaves its band.

    A mask is about staleness, so it uses pi_theta/pi_old whatever the ratio's denominator is.
    """
    clip = config.clip
    dual = clip.dual if isinstance(clip, MinClip) else None
    base = "old" if isinstance(clip, MaskClip) else config.denominator
    by_token = shifted(token_log_ratio(tokens, base).detach(), tokens, config.router_shift)
    log_ratio = RATIOS[config.ratio](by_token, tokens)
    low, high = log_band(clip, geometric=config.ratio == "geometric")
    below, above = log_ratio < low, log_ratio > high
    acts_below, acts_above = _acting(tokens.advantages, clip)
    return Clipping(
        below=below,
        above=above,
        active_low=below & acts_below,
        active_high=above & acts_above,
        active_dual=None if dual is None else (log_ratio > math.log(dual)) & (tokens.advantages < 0),
    )


def _acting(advantages: Tensor, clip: ClipConfig) -> tuple[Tensor, Tensor]:
    """[M] bool each, where a clip acts below and above its band: takes the gradient, or changes the weight."""
    match clip:
        case WeightClip():
            return torch.ones_like(advantages, dtype=torch.bool), torch.ones_like(advantages, dtype=torch.bool)
        case TaperedClip():
            return advantages <= 0, advantages <= 0
        case _:
            return advantages < 0, advantages > 0


def log_band(clip: ClipConfig, geometric: bool = False) -> tuple[float, float]:
    """Bounds of log w; infinite where there are none."""
    if not isinstance(clip, BandClip):
        return -math.inf, math.inf
    low = -math.inf if clip.low is None else -clip.low if geometric else math.log1p(-clip.low)
    high = math.inf if clip.high is None else clip.high if geometric else math.log1p(clip.high)
    return low, high


def token_weights(tokens: Tokens, lengths: Tensor, config: ObjectiveConfig, denominators: Denominators) -> Tensor:
    """[M] what each token's term is multiplied by: the aggregation and the mini-batch's denominator in one.

    token-mean is DAPO [2503.14476, equation 8], prompt-mean MiMo-V2.6 [2610.11959], seq-mean-token-mean GRPO
    [2402.03300, equation 3], constant-length Dr.GRPO [2503.20783]. lengths [S] int64 are |y_i|. Raises ValueError when
    constant-length has no constant_length, or prompt-mean no prompts.
    """
    # A correction may have rejected all tokens of a sequence or of the mini-batch: their terms are 0, and not 0 * inf.
    sequences = max(denominators.sequences, 1)
    each = torch.ones_like(tokens.old_logprobs)
    match config.aggregation:
        case "token-mean":
            return each / max(denominators.tokens, 1)
        case "prompt-mean":
            return each / _tokens_of_prompts(tokens, denominators)[tokens.sequence_ids] / max(denominators.prompts, 1)
        case "seq-mean-token-mean":
            return each / (lengths.clamp(min=1)[tokens.sequence_ids] * sequences)
        case "seq-mean-token-sum":
            return each / sequences
        case "constant-length":
            if config.constant_length is None:
                raise ValueError("objective.constant_length: not set, needed by aggregation: constant-length")
            return each / (config.constant_length * sequences)


def _tokens_of_prompts(tokens: Tokens, denominators: Denominators) -> Tensor:
    """[S] masked-in tokens of all responses to each sequence's prompt, at least 1."""
    if tokens.prompts is None or (denominators.tokens and not denominators.prompt_tokens):
        raise ValueError("objective.aggregation: prompt-mean needs the sequences' prompts and their numbers of tokens")
    counts = [max(denominators.prompt_tokens.get(prompt, 0), 1) for prompt in tokens.prompts]
    return torch.tensor(counts, dtype=tokens.old_logprobs.dtype, device=tokens.old_logprobs.device)
