"""What routers say of their choice, against transformers' own routers: probabilities, ranks, margins and shift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from taps import make_tap
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from megatron_rl.routing.drift import RoutingStats
from megatron_rl.routing.replay import Tap
from megatron_rl.routing.scores import router_logprobs, router_scores
from megatron_rl.routing.shift import RouterShift

ROWS, EXPERTS, TOP_K, GROUPS, BEST = 64, 16, 4, 4, 2
CPU = torch.device("cpu")
SIGMOID: dict[str, Any] = {"scores": "sigmoid", "groups": GROUPS, "groups_per_token": BEST}


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns logits [ROWS, EXPERTS] and a bias [EXPERTS]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, EXPERTS, generator=generator), 0.3 * torch.rand(EXPERTS, generator=generator)


def reference_choice(logits: Tensor, bias: Tensor) -> Tensor:
    """Returns [ROWS, EXPERTS]: the weights that transformers gives the experts, 0 for those not chosen."""
    config = DeepseekV3Config(
        hidden_size=EXPERTS,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=GROUPS,
        topk_group=BEST,
        routed_scaling_factor=1.0,
        moe_intermediate_size=8,
        n_shared_experts=1,
    )
    router = DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(bias)
    torch.nn.init.eye_(router.weight)
    _, weights, ids = router(logits)
    return torch.zeros_like(logits).scatter(1, ids, weights.detach())


def seen(tap: Tap, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scores [ROWS, EXPERTS] that Megatron-Core shows the tap, and the ids [ROWS, TOP_K] chosen."""
    found: list[Tensor] = []
    plain = tap.get_replay_topk

    class Spy:
        def get_replay_topk(self, scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            values, ids = plain(scores, *rest)
            found.extend((scores, ids))
            return values, ids

    features = tap.features
    topk_routing_with_score_function(
        logits,
        tap.top_k,
        use_pre_softmax=features.pre_softmax,
        num_groups=features.groups if features.groups > 1 else None,
        group_topk=features.groups_per_token if features.groups > 1 else None,
        score_function=features.scores,
        expert_bias=tap.bias,
        router_replay=Spy(),
    )
    return found[0], found[1]


def test_the_weights_of_the_chosen_are_their_probabilities_normalised() -> None:
    logits, bias = drawn()
    tap = make_tap(EXPERTS, top_k=TOP_K, bias=bias, **SIGMOID)
    scores, ids = seen(tap, logits)
    probabilities = router_logprobs(tap, scores).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(ROWS))
    chosen = probabilities.gather(1, ids)
    wanted = reference_choice(logits, bias)
    torch.testing.assert_close(torch.zeros_like(logits).scatter(1, ids, chosen / chosen.sum(-1, keepdim=True)), wanted)


def test_the_highest_ranked_experts_are_those_chosen() -> None:
    logits, bias = drawn(1)
    tap = make_tap(EXPERTS, top_k=TOP_K, bias=bias, **SIGMOID)
    scores, ids = seen(tap, logits)
    ranked = router_scores(tap, scores).ranked
    assert torch.equal(ranked.topk(TOP_K, dim=1).indices.sort().values, ids.sort().values)
    assert torch.equal(reference_choice(logits, bias) > 0, torch.zeros_like(logits).scatter(1, ids, 1.0) > 0)
    assert (ranked == float("-inf")).sum(-1).tolist() == [EXPERTS // GROUPS * (GROUPS - BEST)] * ROWS
    # Without groups the same bias chooses others.
    assert not torch.equal((scores.topk(TOP_K, dim=1).indices).sort().values, ids.sort().values)


@pytest.mark.parametrize("features", [{}, {"pre_softmax": True}, {"scores": "sigmoid"}, SIGMOID])
def test_metrics_are_those_of_the_definition(features: dict[str, Any]) -> None:
    logits, bias = drawn(2)
    tap = make_tap(EXPERTS, top_k=TOP_K, bias=bias if "scores" in features else None, **features)
    scores, ids = seen(tap, logits)
    stats = RoutingStats([0], EXPERTS, TOP_K, CPU)
    stats.observe_router(0, 0, router_scores(tap, scores), ids, ids, None, torch.ones(ROWS, dtype=torch.bool))
    found = stats.finalize()

    x = logits.double().numpy()
    weights = 1 / (1 + np.exp(-x)) if "scores" in features else np.exp(x)
    p = weights / weights.sum(-1, keepdims=True)
    taken = np.take_along_axis(p, ids.numpy(), -1)
    assert found["routing/entropy/layer_00"] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-5)
    assert found["routing/mass/layer_00"] == pytest.approx(taken.sum(-1).mean(), rel=1e-5)
    assert found["routing/margin/layer_00"] == pytest.approx(_margin(x, weights, bias.numpy(), features), rel=1e-4)


def _margin(x: np.ndarray, weights: np.ndarray, bias: np.ndarray, features: dict[str, Any]) -> float:
    """Returns the mean distance of the last expert chosen from the next that could have been, row by row."""
    rows = []
    for logits, sigmoids in zip(x, weights, strict=True):
        ranked = sigmoids + bias if "scores" in features else logits
        if "groups" in features:
            groups = ranked.reshape(GROUPS, -1)
            best = np.argsort(np.sort(groups)[:, -(TOP_K // BEST) :].sum(-1))[-BEST:]
            ranked = groups[best].ravel()
        ordered = np.sort(ranked)[::-1]
        rows.append(ordered[TOP_K - 1] - ordered[TOP_K])
    return float(np.mean(rows))


def test_router_shift_of_sigmoid_routers_is_that_of_their_probabilities() -> None:
    old, bias = drawn(3)
    new = old + 0.1 * drawn(4)[0]
    tap = make_tap(EXPERTS, top_k=TOP_K, bias=bias, **SIGMOID)
    shift = RouterShift([ROWS], CPU)
    used = seen(tap, old)[1]
    shift.keep(0, tap, seen(tap, old)[0], used, used)
    shift.compare(0, tap, seen(tap, new)[0], used, used)
    p, q = (torch.sigmoid(x.double()) / torch.sigmoid(x.double()).sum(-1, keepdim=True) for x in (old, new))
    wanted = (q / p).log().abs().gather(1, used).mean(-1)
    torch.testing.assert_close(shift.distances[0].double(), wanted, rtol=1e-4, atol=1e-6)
    # The bias moves no probability.
    assert wanted.min() > 0


def test_a_row_whose_groups_are_all_chosen_has_no_margin() -> None:
    tap = make_tap(8, top_k=4, scores="sigmoid", groups=4, groups_per_token=2)
    scores = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    stats = RoutingStats([0], 8, 4, CPU)
    said = router_scores(tap, scores)
    ids = said.ranked.topk(4, dim=1).indices
    stats.observe_router(0, 0, said, ids, ids, None, torch.ones(5, dtype=torch.bool))
    report = stats.finalize()
    assert not [name for name in report if "margin" in name]
    assert "routing/entropy/layer_00" in report
