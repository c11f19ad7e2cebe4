"""Has a server on a CPU sample each response by the seed of its request, whatever else it computes at that time.

SGLang has this under --enable-deterministic-inference, whose kernels need a GPU. Without it all requests draw from one
stream of random numbers, so a response depends on the requests beside it. Here a token depends on the request's seed,
the token's position and the probabilities alone. The probabilities themselves still differ in their last bits between
batches, which seldom changes a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def take_seeds(info: Any, kind: type, batch: Any, *args: object) -> Any:
    """Gives SGLang's SamplingBatchInfo `info` the seeds of the batch's requests."""
    import torch

    info.sampling_seed = torch.tensor(
        [seed_of(request.sampling_params.sampling_seed, request.rid) for request in batch.reqs], dtype=torch.int64
    )
    return info


def seed_of(asked: int | None, name: str) -> int:
    """Returns the seed that a request asks for. A request without one gets a seed of its name: another one than other
    requests, but the same on all tensor-parallel ranks of the server, each of which samples for itself."""
    if asked is not None:
        return asked
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())


def sample(logprobs: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """Log-probs [N, V], seeds [N] and positions [N] of the next tokens -> the tokens [N, 1], int64."""
    import torch

    rising = logprobs.double().exp().cumsum(-1)
    drawn = torch.from_numpy(uniform(seeds.numpy(), positions.numpy())).unsqueeze(-1)
    return torch.searchsorted(rising, drawn * rising[:, -1:], right=True)


def sample_filtered(
    sglangs: Callable[..., Any],
    probs: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    need_min_p_sampling: bool,
    sampling_seed: Tensor,
    positions: Tensor,
    *,
    return_filtered_probs: bool = False,
    max_top_k: int | None = None,
) -> Any:
    """Replaces SGLang's `top_k_top_p_min_p_sampling_from_probs_torch`, for batches in which a request is greedy or asks
    for top_k, top_p or min_p. Probs [N, V] -> the tokens [N], int32.

    SGLang draws among sorted tokens, so a request beside such a one would get another token for its seed; and with
    seeds it ends the scheduler at a min_p. `return_filtered_probs` is left to SGLang: nothing here asks for it.
    """
    import torch

    if return_filtered_probs:
        filters = top_ks, top_ps, min_ps, need_min_p_sampling
        return sglangs(probs, *filters, sampling_seed, positions, return_filtered_probs=True, max_top_k=max_top_k)
    ranked, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    # Rounded sums may be above 1, but a top_p of 1 drops nothing.
    dropped = (before > top_ps.unsqueeze(-1)) & (top_ps < 1).unsqueeze(-1)
    dropped |= torch.arange(ranked.shape[-1]) >= top_ks.unsqueeze(-1)
    dropped |= ranked < ranked[:, :1] * min_ps.unsqueeze(-1)
    kept = probs.masked_fill(dropped.scatter(-1, tokens, dropped), 0.0)
    return sample(kept.log(), sampling_seed, positions).view(-1).int()


def uniform(seeds: np.ndarray[Any, Any], positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns numbers in [0, 1) [N], float64: of the stream SplitMix64 with each seed, the one at each position."""
    state = seeds.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
