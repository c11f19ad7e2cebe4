"""RSPO's router shift: numbers by hand, and transformers' float64 routers as the reference in every layout and mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forks
from objective_reference import FAMILY
from routing_worker import LENGTHS, drifted_samples
from safetensors.torch import load_file
from shift_worker import MODES
from taps import make_tap
from tiny_models import VOCAB_SIZE, make_tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_rl.data.packing import pack
from megatron_rl.data.sample import Sample
from megatron_rl.data.schedule import Denominators
from megatron_rl.engine.distribute import MiniBatch, Outcome
from megatron_rl.engine.packed_losses import PolicyLoss
from megatron_rl.routing.scores import router_logprobs
from megatron_rl.routing.shift import RouterShift, router_distance

MOE_LAYERS, EXPERTS, TOP_K = (0, 2, 3), 8, 2

# Numbers by hand


def test_a_layers_shift_is_the_geometric_mean_over_experts() -> None:
    old = torch.tensor([[0.5, 0.2], [0.5, 0.2], [0.3, 0.3]]).log()
    new = torch.tensor([[0.25, 0.2], [0.6, 0.1], [0.3, 0.3]]).log()
    # exp(-|log a/b|) is the smaller probability divided by the larger one.
    expected = [math.sqrt(1 / 2 * 1), math.sqrt(5 / 6 * 1 / 2), 1.0]
    np.testing.assert_allclose(router_distance(new, old).neg().exp(), expected, rtol=1e-6)
    np.testing.assert_allclose(router_distance(old, new).neg().exp(), expected, rtol=1e-6)
    assert router_distance(old, old).tolist() == [0.0] * 3


@pytest.mark.parametrize(("sd", "gamma"), [(0.1, 0.923), (0.3, 0.787), (1.0, 0.450)])
def test_gamma_of_half_normal_distances(sd: float, gamma: float) -> None:
    """The paper's mean is geometric. The arithmetic mean of exp(-|d|) over experts gives 0.925, 0.799 and 0.523."""
    quantiles = (torch.arange(4096) + 0.5) / 4096
    moved = sd * torch.special.ndtri(quantiles)[None]
    old = torch.full_like(moved, -3.0)
    assert router_distance(old + moved, old).neg().exp().item() == pytest.approx(gamma, abs=5e-4)


def test_an_expert_with_vanishing_probability_has_a_finite_distance() -> None:
    assert router_distance(torch.tensor([[-900.0, -1.0]]), torch.tensor([[-1.0, -1.0]])).item() == 899 / 2
    tap = make_tap(EXPERTS, pre_softmax=True)
    gone, here = router_logprobs(tap, torch.tensor([[1.0, 0.0]])), torch.tensor([[-1.0, -1.0]])
    assert router_distance(gone, gone).tolist() == [0.0]
    assert router_distance(gone, here).isfinite().all()


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_router_log_probs_cover_all_experts_for_logits_and_for_probabilities(pre_softmax: bool) -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    scores = probabilities if pre_softmax else probabilities.log() + 7
    found = router_logprobs(make_tap(3, pre_softmax=pre_softmax), scores.bfloat16() if not pre_softmax else scores)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.exp(), probabilities, rtol=0.03)


def test_layer_distances_add_up_over_the_experts_that_pi_old_used() -> None:
    taps = [make_tap(3, layer=layer, column=column) for column, layer in enumerate((1, 4))]
    old = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]).log()
    new = torch.tensor([[0.1, 0.3, 0.6], [0.1, 0.2, 0.7]]).log()
    used, chosen_now = torch.tensor([[0, 1], [2, 1]]), torch.tensor([[2, 1], [2, 1]])
    nothing = torch.zeros(2, 2, dtype=torch.long)
    shift = RouterShift([1, 2], torch.device("cpu"))
    for tap in taps:
        shift.keep(1, tap, old, nothing, used)
    for tap in taps:
        shift.compare(1, tap, new, nothing, chosen_now)
    layer = [math.log(6) / 2, (math.log(8 / 7) + math.log(2)) / 2]
    np.testing.assert_allclose(shift.distances[1], [2 * d for d in layer], rtol=1e-5)
    assert shift.distances[0].tolist() == [0.0]


def test_a_loss_without_its_router_shift_is_an_error() -> None:
    packed = pack(drifted_samples(VOCAB_SIZE, MOE_LAYERS, EXPERTS, TOP_K), [1.0] * len(LENGTHS))
    zeros = torch.zeros(packed.tokens)
    outcomes = tuple(Outcome(i, 0, 1.0) for i in range(len(LENGTHS)))
    mini_batch = MiniBatch(0, (packed,), (outcomes,), Denominators(1, 1))
    loss = PolicyLoss(FAMILY["rspo"], mini_batch, [zeros], torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"objective\.router_shift and the mini-batch's router shift: one is set"):
        loss(0, zeros, zeros)
    loss.router_shift = [torch.ones(packed.tokens)]
    assert loss(0, zeros, zeros).item() == pytest.approx(-len(LENGTHS))


# Real ranks against transformers' routers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(pi_old, pi_theta): every weight differs a little, enough to change some experts."""
    root = tmp_path_factory.mktemp("models")
    old = make_tiny_model(root / "old", num_layers=4, mlp_only_layers=(1,))
    new = make_tiny_model(root / "new", num_layers=4, mlp_only_layers=(1,))
    model = AutoModelForCausalLM.from_pretrained(old, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(new)
    return old, new


Chosen = list[torch.Tensor]
"""[n, K] ids of each MoE layer."""


def run_routers(
    path: Path, sample: Sample, route: Callable[[int, torch.Tensor], torch.Tensor]
) -> tuple[list[torch.Tensor], Chosen]:
    """Returns log-probs [n, experts] and ids [n, K] by MoE layer. `route(column, probabilities)` chooses the ids."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    logprobs: list[torch.Tensor] = []
    chosen: Chosen = []

    def force(router: Qwen3MoeTopKRouter, column: int) -> None:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
            probabilities = logits.softmax(-1)
            ids = route(column, probabilities)
            scores = probabilities.gather(1, ids)
            logprobs.append(logits.log_softmax(-1))
            chosen.append(ids)
            return logits, scores / scores.sum(-1, keepdim=True), ids

        router.forward = forward

    for column, layer in enumerate(MOE_LAYERS):
        force(model.model.layers[layer].mlp.gate, column)
    with torch.no_grad():
        model(torch.as_tensor(sample.token_ids.astype(np.int64))[None])
    return logprobs, chosen


def reference(old: Path, new: Path, sample: Sample, mode: str) -> np.ndarray:
    """Returns the router shift of each token, [n] float64."""
    assert sample.trace is not None
    present = torch.as_tensor(sample.trace.present)
    present = torch.cat([present, torch.zeros(len(sample.token_ids) - len(present), dtype=torch.bool)])
    ids = torch.zeros(len(present), len(MOE_LAYERS), TOP_K, dtype=torch.long)
    ids[: len(sample.trace.present)] = torch.as_tensor(sample.trace.experts.astype(np.int64))

    def live(column: int, probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities.topk(TOP_K, dim=-1).indices

    def rollouts(column: int, probabilities: torch.Tensor) -> torch.Tensor:
        return torch.where(present[:, None], ids[:, column], live(column, probabilities))

    before, used = run_routers(old, sample, rollouts if mode == "r3" else live)
    update = {"none": live, "r2": lambda column, _: used[column], "r3": rollouts}[mode]
    after, _ = run_routers(new, sample, update)
    product = np.ones(len(present))
    for a, b, experts in zip(before, after, used, strict=True):
        p, q = a.exp().gather(1, experts).numpy(), b.exp().gather(1, experts).numpy()
        product *= (np.minimum(p, q) / np.maximum(p, q)).prod(axis=1) ** (1 / TOP_K)
    return product ** (1 / len(MOE_LAYERS))


@pytest.fixture(scope="module")
def expected(models: tuple[Path, Path]) -> dict[tuple[str, int], np.ndarray]:
    samples = drifted_samples(VOCAB_SIZE, MOE_LAYERS, EXPERTS, TOP_K)
    found = {(mode, n): reference(*models, sample, mode) for mode in MODES for n, sample in enumerate(samples)}
    for mode in MODES:
        values = np.concatenate([found[mode, n] for n in range(len(samples))])
        assert values.min() < 0.8 < values.max() < 1  # else the comparison would show nothing
    return found


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (1, ["tp=1"]),
        pytest.param(
            2, ["tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "ep=2", "cp=2,ep=2"], marks=pytest.mark.distributed, id="2 ranks"
        ),
        pytest.param(
            4, ["tp=2,cp=2", "tp=2,pp=2", "cp=2,pp=2,vpp=2"], marks=[pytest.mark.distributed, pytest.mark.slow]
        ),
    ],
)
def test_the_router_shift_equals_the_reference_in_every_layout(
    forks: Forks,
    models: tuple[Path, Path],
    expected: dict[tuple[str, int], np.ndarray],
    tmp_path: Path,
    ranks: int,
    layouts: list[str],
) -> None:
    forks.world(ranks, "shift_worker:main", *models, tmp_path, layouts)
    seen = set()
    for file in sorted(tmp_path.glob("*.safetensors")):
        for key, values in load_file(file).items():
            *kind, mode, layout, number = key.split("/")
            wanted = expected[mode, int(number)]
            assert values.dtype == torch.float32
            assert len(values) == len(wanted)
            if kind == ["same"]:
                assert (values == 1).all(), key
            else:
                np.testing.assert_allclose(values, wanted, atol=2e-5, err_msg=key)
                seen.add((mode, layout, int(number)))
    assert seen == {(mode, layout, n) for mode in MODES for layout in layouts for n in range(len(LENGTHS))}
