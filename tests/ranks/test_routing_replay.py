"""Replay against a float64 reference: transformers' model with the trace's experts forced on its routers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks
from routing_worker import drifted_samples
from safetensors.torch import load_file
from taps import make_tap
from tiny_models import VOCAB_SIZE, make_tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_rl.data.sample import Sample
from megatron_rl.models.architecture import read_architecture
from megatron_rl.parity import file_gradients

MOE_LAYERS, EXPERTS, TOP_K = (0, 2, 3), 8, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "moe", num_layers=4, mlp_only_layers=(1,))


def force(router: Qwen3MoeTopKRouter, sample: Sample, column: int) -> None:
    """Makes the router choose the trace's experts in rows that have a route."""
    assert sample.trace is not None
    rows = torch.as_tensor(np.flatnonzero(sample.trace.present))
    ids = torch.as_tensor(sample.trace.experts[sample.trace.present, column].astype(np.int64))

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(TOP_K, dim=-1).indices
        chosen[rows] = ids
        scores = probabilities.gather(1, chosen)
        return logits, scores / scores.sum(-1, keepdim=True), chosen

    router.forward = forward


@pytest.fixture(scope="module")
def reference(model: Path) -> dict[str, torch.Tensor]:
    """float64 gradients of the sum of negative log-probs."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, experts_implementation="eager")
    whole.get_input_embeddings().padding_idx = None
    for sample in drifted_samples(VOCAB_SIZE, MOE_LAYERS, EXPERTS, TOP_K):
        for column, layer in enumerate(MOE_LAYERS):
            force(whole.model.layers[layer].mlp.gate, sample, column)
        ids = torch.as_tensor(sample.token_ids.astype(np.int64))
        logprobs = whole(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        (-logprobs[torch.as_tensor(sample.loss_mask[1:])].sum()).backward()
    return file_gradients(whole, read_architecture(model))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "ranks", "recompute"),
    [
        ("tp=1", 1, "full"),
        ("tp=2", 2, "none"),
        ("pp=2,vpp=2", 2, "full"),
        pytest.param("cp=2,ep=2", 2, "full", marks=pytest.mark.slow),
        pytest.param("dp=2", 2, "none", marks=pytest.mark.slow),
        pytest.param("tp=2,pp=2,ep=2", 4, "full", marks=pytest.mark.slow),
    ],
)
def test_gradients_under_replayed_routes_equal_the_reference(
    forks: Forks,
    model: Path,
    reference: dict[str, torch.Tensor],
    tmp_path: Path,
    layout: str,
    ranks: int,
    recompute: str,
) -> None:
    forks.world(ranks, "routing_worker:main", model, layout, recompute, tmp_path / "found.safetensors")
    found = load_file(tmp_path / "found.safetensors")
    identical, drifted_differs = found.pop("bits").tolist()
    assert identical, "replaying a forward pass's own routes changed its log-probs"
    assert drifted_differs, "the drifted routes are the live ones: nothing is tested"
    assert {name.removeprefix("grad/") for name in found} == reference.keys()
    for name, expected in reference.items():
        scale = expected.abs().max()
        assert (found[f"grad/{name}"].double() - expected).abs().max() <= 1e-4 * scale, name
    routers = [name for name in reference if name.endswith("mlp.gate.weight")]
    assert len(routers) == len(MOE_LAYERS)
    for name in routers:
        assert found[f"grad/{name}"].abs().max() > 1e-3, f"{name}: the gradient does not reach the router"


def test_expert_order_does_not_depend_on_the_order_that_topk_returns() -> None:
    """Megatron-Core 0.19 sorts experts only in passes with gradients."""
    tap = make_tap(EXPERTS)
    scores = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.no_grad():
        scores[7] = 1.0  # equal scores must have a fixed order too
    wanted = scores.topk(3, dim=1)
    plain = None
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):

        def top(scores: torch.Tensor, k: int, order: list[int] = order, **_: None) -> tuple[torch.Tensor, torch.Tensor]:
            values, ids = scores.topk(k, dim=1)
            return values[:, order], ids[:, order]

        values, ids = tap.get_replay_topk(scores, 3, default_compute_topk=top)
        plain = ids if plain is None else plain
        assert torch.equal(ids, plain)
        assert torch.equal(values, wanted.values)
        (gradient,) = torch.autograd.grad(values.sum(), scores)
        assert torch.equal(gradient, torch.zeros_like(scores).scatter(1, ids, 1.0))
    assert plain is not None
    others = torch.arange(50) != 7
    assert torch.equal(plain[others], wanted.indices[others])


@pytest.mark.distributed
def test_routes_reach_the_replica_of_their_sample_if_sample_numbers_have_gaps(forks: Forks, model: Path) -> None:
    """Samples without a verdict are left out, so the numbers of the others are not their positions."""
    samples = {tuple(s.token_ids.tolist()): s for s in drifted_samples(VOCAB_SIZE, MOE_LAYERS, EXPERTS, TOP_K)}
    found = 0
    for ranks in forks.world(2, "exchange_worker:distributed", model, "dp=2"):
        assert ranks, "a replica got no sample"
        for batch in ranks:
            ends = batch["cu_seqlens"][1:]
            for start, end in zip(batch["cu_seqlens"][:-1], ends, strict=True):
                tokens = batch["tokens"][start:end].tolist()
                (sample,) = (s for ids, s in samples.items() if tuple(tokens[: len(ids)]) == ids)
                assert sample.trace is not None
                rows = slice(start, start + sample.trace.rows)
                assert np.array_equal(batch["present"][rows], sample.trace.present)
                present = sample.trace.present
                assert np.array_equal(batch["experts"][rows][present], sample.trace.experts[present])
                found += 1
    assert found == len(samples)
