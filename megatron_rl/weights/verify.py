"""Verifies a sync: compares log-probs of servers and trainer, and the checksums of servers.

Log-probs are compared on fixed tokens and on tokens that the servers sample. The two find different faults. Fixed
tokens are scored untempered, so they show the weights alone. Sampled tokens have the log-probs of importance ratios, at
the run's temperature, which a misconfigured server may report differently. Checksums must be equal between servers that
store the weights in the same form.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from megatron_rl.data.packing import PackedBatch, pack
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.versions import Versions
from megatron_rl.engine.policy import Policy
from megatron_rl.models.architecture import Architecture
from megatron_rl.ranks.collectives import broadcast_bytes
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.sampler import Continuation, Sampling
from megatron_rl.weights.all_servers import WeightSyncError

PROBE_SEQUENCES, PROBE_TOKENS = 4, 48


@dataclass(frozen=True)
class SampledAnswer:
    """Tokens that a server sampled, with their log-probs."""

    url: str
    token_ids: list[int]  # of prompt and response
    logprobs: list[float]  # of the response


@dataclass(frozen=True)
class Asked:
    """Answers of the servers after a sync."""

    scores: dict[str, list[list[float]]]  # by URL: log-probs of tokens 1 and later of each sequence of the probe
    answers: list[SampledAnswer]
    checksums: dict[str, str]  # by URL
    forms: dict[str, tuple[int, str]]  # by URL; see form_of
    are_exact: bool  # all servers compute in fp32 on a CPU; a GPU may round fp32 to TF32


@dataclass(frozen=True)
class Verification:
    """Largest and mean |log-prob difference| on the probe over all servers, and a server's largest mean on its samples.

    In nats; see _gaps.
    """

    max_abs_diff: float
    mean_abs_diff: float
    sampled_mean_abs_diff: float


def probe(arch: Architecture) -> list[list[int]]:
    """Random token ids, equal in every run. They visit many experts, and no policy is certain of them."""
    tokens = min(PROBE_TOKENS, arch.max_position_embeddings)
    return np.random.default_rng(0).integers(0, arch.vocab_size, (PROBE_SEQUENCES, tokens)).tolist()


def pack_probe(sequences: Sequence[list[int]], policy: Policy) -> PackedBatch:
    samples = [
        Sample.start(Prompt(str(i), "", (ids[0],), "", ""), 0).extend(ids[1:], [0.0] * (len(ids) - 1), 0)
        for i, ids in enumerate(sequences)
    ]
    layout = policy.layout
    return pack(samples, [0.0] * len(samples), cp=layout.cp, tp=layout.tp, multiple=layout.token_multiple)


def trainer_logprobs(policy: Policy, sequences: Sequence[list[int]], temperature: float) -> list[np.ndarray] | None:
    """The policy's log-probs of tokens 1 and later of each sequence on rank 0; None on other ranks. Collective."""
    batch = pack_probe(sequences, policy)
    # An interleaved pipeline needs several micro-batches; all are equal here.
    batches = [batch] * (policy.layout.pp if policy.layout.vpp > 1 else 1)
    answers = policy.logprobs(batches, temperature=temperature)
    flat = answers[0][0].cpu().numpy()[batch.loss_mask].astype(np.float32).tobytes() if answers else None
    flat = _from_last_stage(flat, policy)
    if policy.place.rank != 0:
        return None
    ends = np.cumsum([len(ids) - 1 for ids in sequences])[:-1]
    return np.split(np.frombuffer(flat, np.float32), ends)


def _from_last_stage(data: bytes | None, policy: Policy) -> bytes:
    """Returns the last stage's bytes on all ranks of the replica."""
    return broadcast_bytes(data, policy.place.replica, source=policy.place.replica.size() - 1)


async def ask_servers(clients: Sequence[SGLangClient], arch: Architecture, temperature: float, version: int) -> Asked:
    """Asks all servers for scores, samples and checksums. Raises RolloutError."""
    sequences = probe(arch)
    prompts = [ids[: max(1, len(ids) // 2)] for ids in sequences]

    async def sample(client: SGLangClient, prompt: list[int]) -> SampledAnswer:
        longest = max(1, len(sequences[0]) - len(prompt))
        sampling = Sampling(1, longest, temperature, arch.vocab_size, Versions(version), seed=0)
        begun = Sample.start(Prompt("probe", "", tuple(prompt), "", ""), 0)
        sample = await Continuation(begun, longest, 0, sampling).complete(client)
        return SampledAnswer(client.url, sample.token_ids.tolist(), sample.rollout_logprobs[len(prompt) :].tolist())

    async def score(client: SGLangClient) -> list[list[float]]:
        return await asyncio.gather(*(client.score(ids) for ids in sequences))

    # Each server answers at least once, and a single server answers all prompts.
    turns = range(max(len(clients), len(prompts)))
    answers = await asyncio.gather(*(sample(clients[n % len(clients)], prompts[n % len(prompts)]) for n in turns))
    scores = await asyncio.gather(*(score(client) for client in clients))
    checksums = await asyncio.gather(*(client.weights_checksum() for client in clients))
    infos = await asyncio.gather(*(client.server_info() for client in clients))
    urls = [client.url for client in clients]
    return Asked(
        dict(zip(urls, scores, strict=True)),
        answers,
        dict(zip(urls, checksums, strict=True)),
        dict(zip(urls, map(form_of, infos), strict=True)),
        all((info.get("dtype"), info.get("device")) == ("float32", "cpu") for info in infos),
    )


def sampled_sequences(asked: Asked | None, policy: Policy) -> list[list[int]]:
    """Returns the tokens of rank 0's answers on all ranks. Collective."""
    mine = None if asked is None else orjson.dumps([answer.token_ids for answer in asked.answers])
    sequences: list[list[int]] = orjson.loads(broadcast_bytes(mine, policy.place.control))
    return sequences


def verify(
    asked: Asked, expected: Sequence[np.ndarray], sampled: Sequence[np.ndarray], bound: float, temperature: float
) -> Verification:
    """Compares the servers with the trainer's log-probs of the probe (`expected`) and of whole answers (`sampled`).

    Raises WeightSyncError, which names the server whose log-probs or checksum differ.
    """
    differences = []
    for url, scores in asked.scores.items():
        gaps = np.concatenate([_gaps(np.array(s), e) for s, e in zip(scores, expected, strict=True)])
        if not gaps.max() <= bound:
            raise WeightSyncError(
                f"{url}: log-probs of the probe differ from the trainer's by up to {gaps.max():.3g} "
                f"(mean {gaps.mean():.3g}), more than weights.verify_bound {bound:g}; its weights are not the "
                "trainer's: does it serve a model of another shape than model.path? Or a quantised one? If it is the "
                "same model on kernels that round more coarsely, raise weights.verify_bound",
                [url],
            )
        differences.append(gaps)
    check_checksums(asked.checksums, asked.forms)
    worst = 0.0
    for url in asked.scores:
        pairs = [
            (np.array(answer.logprobs), logprobs[-len(answer.logprobs) :])
            for answer, logprobs in zip(asked.answers, sampled, strict=True)
            if answer.url == url
        ]
        # Use the mean: a server's fault moves all its log-probs, while rounding to bf16 can send one token to
        # other experts. Rounding of logits counts 1 / temperature times.
        mean = float(np.concatenate([_gaps(served, ours) for served, ours in pairs]).mean())
        if not mean <= bound / min(1.0, temperature):
            raise WeightSyncError(
                f"{url}: log-probs of what it sampled at rollout.temperature {temperature:g} differ from the "
                f"trainer's by {mean:.3g} in the mean, more than weights.verify_bound {bound:g} allows, though its "
                "weights are right: it samples from other log-probs than it reports. Start it without "
                "SGLANG_RETURN_ORIGINAL_LOGPROB and without its own sampling defaults or logit processors, or raise "
                "weights.verify_bound if its kernels only round more coarsely",
                [url],
            )
        worst = max(worst, mean)
    everything = np.concatenate(differences)
    return Verification(float(everything.max()), float(everything.mean()), worst)


def check_checksums(checksums: Mapping[str, str], forms: Mapping[str, tuple[int, str]]) -> None:
    """Raises WeightSyncError if servers that store weights in one form hold different ones. Both by URL. At fault are
    those that differ from more than half."""
    for form in set(forms.values()):
        alike = {url: checksum for url, checksum in checksums.items() if forms[url] == form}
        ((most, count), *others) = Counter(alike.values()).most_common()
        if others:
            odd = [url for url, checksum in alike.items() if checksum != most and 2 * count > len(alike)]
            raise WeightSyncError(f"servers hold different weights, by checksum: {alike}", odd)


def form_of(info: Mapping[str, Any]) -> tuple[int, str]:
    """Returns tp_size and dtype of a server's settings, which change the checksum of equal weights."""
    return info.get("tp_size", 1), str(info.get("dtype"))


def _gaps(served: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """|difference|, divided by |log p| if that is above 1: rounding grows with the log-prob of an unlikely token."""
    return np.abs(served - expected) / np.maximum(1.0, np.abs(expected))
