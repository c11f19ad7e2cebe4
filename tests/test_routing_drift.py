"""Routing metrics against hand-computed vectors and a reference in plain Python, however the rows are cut up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rl.routing.drift import PAIRS, RoutingStats, common

LAYERS, EXPERTS, TOP_K = (1, 4), 6, 3
CPU = torch.device("cpu")
PAIR = PAIRS[0]


def stats() -> RoutingStats:
    return RoutingStats(LAYERS, EXPERTS, TOP_K, CPU)


def compare(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], valid: Sequence[bool]) -> dict[str, float]:
    found = stats()
    found.expect(PAIR, 0, torch.tensor(valid))
    for layer in LAYERS:
        found.compare(PAIR, 0, layer, torch.tensor(a), torch.tensor(b))
    found.count_tokens()
    return found.finalize()


def test_common_counts_experts_of_both_whatever_their_order() -> None:
    a = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]], dtype=torch.uint8)
    b = torch.tensor([[2, 0, 1], [0, 1, 5], [3, 4, 5]])
    assert common(a, b).tolist() == [3, 2, 0]


def test_changes_by_hand() -> None:
    # The same; another order; one expert of three; all; and a row that does not count.
    a = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    b = [[0, 1, 2], [1, 0, 2], [0, 1, 3], [3, 4, 5], [5, 4, 3]]
    report = compare(a, b, [True, True, True, True, False])
    for over in ("layer_01", "layer_04", "mean", "min", "max"):
        assert report[f"routing/set_mismatch/{PAIR}/{over}"] == 2 / 4
        assert report[f"routing/expert_change/{PAIR}/{over}"] == pytest.approx((1 / 3 + 1) / 4)
        assert report[f"routing/top1_change/{PAIR}/{over}"] == 2 / 4
    assert report[f"routing/token_layers/{PAIR}/mean"] == 4 / 4  # two tokens, both layers
    assert report[f"routing/token_layers/{PAIR}/any"] == 2 / 4
    assert not [name for name in report if PAIRS[1] in name or "entropy" in name or "max_vio" in name]


def test_a_router_by_hand() -> None:
    logits = torch.tensor([[4.0, 3, 2, 1, 0, 0], [0, 0, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9]])
    used = torch.tensor([[0, 1, 2], [0, 1, 3], [5, 5, 5]])
    live = torch.tensor([[0, 1, 2], [0, 1, 2], [5, 5, 5]])
    found = stats()
    replayed, valid = torch.tensor([False, True, True]), torch.tensor([True, True, False])
    found.observe_router(4, logits, used, live, replayed, valid)
    report = found.finalize()
    weights = [math.exp(x) for x in logits[0].tolist()]
    entropy = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    assert report["routing/entropy/layer_04"] == pytest.approx((entropy + math.log(6)) / 2, rel=1e-6)
    assert report["routing/margin/layer_04"] == 0.5  # 2 - 1, and 0
    assert report["routing/live_overlap/layer_04"] == pytest.approx(2 / 3)  # of the one replayed row
    assert report["routing/fallback/layer_04"] == 1 / 2
    assert report["routing/max_vio/layer_04"] == 1.0  # loads 2 2 1 1 0 0, their mean 1
    assert report["routing/dead_experts/layer_04"] == 2
    assert not [name for name in report if name.endswith("layer_01")]


def test_nothing_is_said_of_a_replay_that_does_not_take_place() -> None:
    found = stats()
    ids = torch.tensor([[0, 1, 2]])
    found.observe_router(1, torch.randn(1, EXPERTS), ids, ids, None, torch.tensor([True]))
    assert not [name for name in found.finalize() if "overlap" in name or "fallback" in name]


def draw(seed: int, rows: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, EXPERTS, generator=g)
    return {
        "logits": logits,
        "used": torch.rand(rows, EXPERTS, generator=g).topk(TOP_K).indices,
        "live": logits.topk(TOP_K).indices,
        "replayed": torch.rand(rows, generator=g) < 0.7,
        "valid": torch.rand(rows, generator=g) < 0.8,
    }


def feed(found: RoutingStats, data: dict[str, Tensor], rows: slice, micro_batch: int) -> None:
    d = {name: values[rows] for name, values in data.items()}
    found.expect(PAIR, micro_batch, d["valid"])
    for layer in LAYERS:
        found.observe_router(layer, d["logits"], d["used"], d["live"], d["replayed"], d["valid"])
        found.compare(PAIR, micro_batch, layer, d["used"], d["live"])


@settings(max_examples=40)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 40), data=st.data())
def test_cutting_rows_into_micro_batches_and_ranks_changes_nothing(seed: int, rows: int, data: st.DataObject) -> None:
    drawn, cut = draw(seed, rows), data.draw(st.integers(0, rows))
    whole = stats()
    feed(whole, drawn, slice(None), 0)
    whole.count_tokens()
    first, second = stats(), stats()
    feed(first, drawn, slice(0, cut), 0)
    feed(first, drawn, slice(cut, cut), 1)
    feed(second, drawn, slice(cut, None), 0)
    for part in (first, second):
        part.count_tokens()
    for mine, other in zip(first.sums(), second.sums(), strict=True):
        mine += other
    expected = whole.finalize()
    assert first.finalize() == pytest.approx(expected)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 40))
def test_random_rows_equal_the_reference(seed: int, rows: int) -> None:
    drawn = draw(seed, rows)
    found = stats()
    feed(found, drawn, slice(None), 0)
    report = found.finalize()
    d = {name: values.double().numpy() for name, values in drawn.items()}
    counted = [r for r in range(rows) if d["valid"][r]]
    if not counted:
        assert report == {}
        return
    shared = {r: len(set(d["used"][r]) & set(d["live"][r])) for r in counted}
    loads = np.zeros(EXPERTS)
    for r in counted:
        loads[d["used"][r].astype(int)] += 1
    p = np.exp(d["logits"]) / np.exp(d["logits"]).sum(-1, keepdims=True)
    ordered = -np.sort(-d["logits"], axis=-1)
    expected = {
        f"set_mismatch/{PAIR}": np.mean([shared[r] < TOP_K for r in counted]),
        f"expert_change/{PAIR}": np.mean([1 - shared[r] / TOP_K for r in counted]),
        f"top1_change/{PAIR}": np.mean([d["used"][r][0] != d["live"][r][0] for r in counted]),
        "entropy": np.mean(-(p * np.log(p)).sum(-1)[counted]),
        "margin": np.mean((ordered[:, TOP_K - 1] - ordered[:, TOP_K])[counted]),
        "max_vio": loads.max() / loads.mean() - 1,
        "dead_experts": (loads == 0).sum(),
        "fallback": np.mean([not d["replayed"][r] for r in counted]),
    }
    replayed = [r for r in counted if d["replayed"][r]]
    if replayed:
        expected["live_overlap"] = np.mean([shared[r] / TOP_K for r in replayed])
    for name, value in expected.items():
        assert report[f"routing/{name}/layer_04"] == pytest.approx(value, rel=1e-5, abs=1e-6), name
