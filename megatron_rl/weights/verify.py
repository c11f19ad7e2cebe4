"""Proof that a sync arrived: the servers' log-probs of a fixed probe against the trainer's, and equal checksums."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rl.data.packing import PackedBatch, pack
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.engine.exchange import broadcast_bytes
from megatron_rl.engine.policy import Policy
from megatron_rl.models.architecture import Architecture
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.weights.collective import WeightSyncError

PROBE_SEQUENCES, PROBE_TOKENS = 4, 48


@dataclass(frozen=True)
class Verification:
    """Over all servers: largest and mean |log-prob difference| on the probe, in nats; see _gaps."""

    max_abs_diff: float
    mean_abs_diff: float


def probe(arch: Architecture) -> list[list[int]]:
    """The same random token ids in every run: they visit many experts, and no policy is certain of them."""
    tokens = min(PROBE_TOKENS, arch.max_position_embeddings)
    return np.random.default_rng(0).integers(0, arch.vocab_size, (PROBE_SEQUENCES, tokens)).tolist()


def pack_probe(sequences: Sequence[list[int]], policy: Policy) -> PackedBatch:
    samples = [
        Sample.start(Prompt(str(i), "", (ids[0],), "", ""), 0).extend(ids[1:], [0.0] * (len(ids) - 1), 0)
        for i, ids in enumerate(sequences)
    ]
    return pack(samples, [0.0] * len(samples), cp=policy.layout.cp, tp=policy.layout.tp)


def trainer_logprobs(policy: Policy) -> list[np.ndarray] | None:
    """The policy's untempered log-probs of the probe's tokens 1.., on rank 0; None elsewhere. Collective."""
    sequences = probe(policy.arch)
    batch = pack_probe(sequences, policy)
    # As many micro-batches as an interleaved pipeline needs; all are the same.
    batches = [batch] * (policy.layout.pp if policy.layout.vpp > 1 else 1)
    answers = policy.logprobs(batches, temperature=1.0)
    flat = answers[0][0].cpu().numpy()[batch.loss_mask].astype(np.float32).tobytes() if answers else None
    flat = _from_last_stage(flat, policy)
    if policy.place.rank != 0:
        return None
    return np.split(np.frombuffer(flat, np.float32), len(sequences))


def _from_last_stage(data: bytes | None, policy: Policy) -> bytes:
    """The last stage's bytes on all ranks of the replica."""
    return broadcast_bytes(data, policy.place.replica, source=policy.place.replica.size() - 1)


async def verify(
    clients: Sequence[SGLangClient],
    expected: Sequence[np.ndarray],
    sequences: Sequence[list[int]],
    bound: float,
) -> Verification:
    """Raises WeightSyncError naming the server whose log-probs or checksum differ."""
    differences = []
    for client in clients:
        served = await asyncio.gather(*(client.score(ids) for ids in sequences))
        gaps = np.concatenate([_gaps(np.array(s), e) for s, e in zip(served, expected, strict=True)])
        if not gaps.max() <= bound:
            raise WeightSyncError(
                f"{client.url}: log-probs of the probe differ from the trainer's by up to {gaps.max():.3g} "
                f"(mean {gaps.mean():.3g}), more than weights.verify_bound {bound:g}; its weights are not the trainer's"
            )
        differences.append(gaps)
    checksums = {client.url: await client.weights_checksum() for client in clients}
    if len(set(checksums.values())) > 1:
        raise WeightSyncError(f"servers hold different weights, by checksum: {checksums}")
    everything = np.concatenate(differences)
    return Verification(float(everything.max()), float(everything.mean()))


def _gaps(served: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|difference|, relative where |log p| > 1: a token that is all but impossible has a log-prob of many nats, and
    rounding grows with it."""
    return np.abs(served - expected) / np.maximum(1.0, np.abs(expected))
