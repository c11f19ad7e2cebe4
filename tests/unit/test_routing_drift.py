"""Routing metrics against values by hand and a plain Python reference, for any division of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from taps import of_logits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_rl.routing.drift import PAIRS, RERUN, LayerRun, RoutingStats, common, peak_over_mean

LAYERS, EXPERTS, TOP_K = (1, 4), 6, 3
CPU = torch.device("cpu")
PAIR = PAIRS[0]


def stats() -> RoutingStats:
    return RoutingStats(LAYERS, EXPERTS, TOP_K, CPU, micro_batches=2, expert_ranks=2)


def compare(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]], valid: Sequence[bool]) -> dict[str, float]:
    found = stats()
    found.expect(PAIR, 0, torch.tensor(valid))
    for layer in LAYERS:
        found.compare([PAIR], 0, layer, torch.tensor(a), torch.tensor(b))
    found.count_tokens()
    return found.finalize()


def test_common_counts_shared_experts_in_any_order() -> None:
    a = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 2]], dtype=torch.uint8)
    b = torch.tensor([[2, 0, 1], [0, 1, 5], [3, 4, 5]])
    assert common(a, b).tolist() == [3, 2, 0]


def test_routing_changes_by_hand() -> None:
    # Rows: equal; another order; one of three experts differs; all differ; not valid.
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


def test_the_two_published_measures_differ_eightfold_for_one_of_eight_experts() -> None:
    found = RoutingStats([0], 9, 8, CPU)
    found.expect(PAIR, 0, torch.tensor([True]))
    found.compare([PAIR], 0, 0, torch.arange(8)[None], torch.tensor([[0, 1, 2, 3, 4, 5, 6, 8]]))
    report = found.finalize()
    assert report[f"routing/set_mismatch/{PAIR}/layer_00"] == 1
    assert report[f"routing/expert_change/{PAIR}/layer_00"] == 1 / 8


def test_layers_have_equal_weight_and_the_extremes_are_reported() -> None:
    found = stats()
    ids = torch.tensor([[0, 1, 2]])
    for layer, gap, rows in ((1, 3.0, 1), (4, 1.0, 2)):
        logits = torch.tensor([[gap, gap, gap, 0.0, 0.0, 0.0]]).repeat(rows, 1)
        nothing = torch.zeros(rows, dtype=torch.bool)
        found.observe_router(0, layer, of_logits(logits), ids.repeat(rows, 1), ids.repeat(rows, 1), nothing, ~nothing)
    report = found.finalize()
    margins = {key.rpartition("/")[2]: value for key, value in report.items() if key.startswith("routing/margin/")}
    assert margins == {"layer_01": 3.0, "layer_04": 1.0, "mean": 2.0, "min": 1.0, "max": 3.0}
    assert report["routing/fallback/mean"] == 1
    assert not [name for name in report if "live_overlap" in name]  # no row was replayed


def test_router_metrics_by_hand() -> None:
    logits = torch.tensor([[4.0, 3, 2, 1, 0, 0], [0, 0, 0, 0, 0, 0], [9, 9, 9, 9, 9, 9]])
    used = torch.tensor([[0, 1, 2], [0, 1, 3], [5, 5, 5]])
    live = torch.tensor([[0, 1, 2], [0, 1, 2], [5, 5, 5]])
    found = stats()
    replayed, valid = torch.tensor([False, True, True]), torch.tensor([True, True, False])
    found.observe_router(0, 4, of_logits(logits), used, live, replayed, valid)
    report = found.finalize()
    weights = [math.exp(x) for x in logits[0].tolist()]
    entropy = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)
    assert report["routing/entropy/layer_04"] == pytest.approx((entropy + math.log(6)) / 2, rel=1e-6)
    assert report["routing/margin/layer_04"] == 0.5  # 2 - 1, and 0
    assert report["routing/live_overlap/layer_04"] == pytest.approx(2 / 3)  # one row is replayed
    assert report["routing/fallback/layer_04"] == 1 / 2
    assert report["routing/max_vio/layer_04"] == 1.0  # loads 2 2 1 1 0 0, their mean 1
    assert report["routing/dead_experts/layer_04"] == 2
    assert report["routing/load_cv/layer_04"] == pytest.approx(math.sqrt(4 / 6))
    assert report["routing/cold_experts/layer_04"] == pytest.approx(2 / 6)
    masses = (sum(weights[:3]) / sum(weights), 3 / 6)
    assert report["routing/mass/layer_04"] == pytest.approx(sum(masses) / 2, rel=1e-6)
    assert not [name for name in report if name.endswith("layer_01")]
    for over in ("mean", "min", "max"):  # over layers that have rows
        assert report[f"routing/margin/{over}"] == 0.5


def test_a_cold_expert_has_less_than_a_tenth_of_the_mean_load() -> None:
    found = RoutingStats([0], 4, 1, CPU)
    ids = torch.tensor([0] * 60 + [1] * 57 + [2] * 3)[:, None]  # a mean load of 30; 3 is no less than a tenth
    found.observe_router(0, 0, of_logits(torch.zeros(120, 4)), ids, ids, None, torch.ones(120, dtype=torch.bool))
    assert found.finalize()["routing/cold_experts/layer_00"] == 1 / 4
    assert found.finalize()["routing/dead_experts/layer_00"] == 1


def test_the_load_of_expert_ranks_is_counted_by_micro_batch_and_layer() -> None:
    found = stats()  # experts 0 to 2 are on the first rank, 3 to 5 on the second
    valid = torch.tensor([True, True, False])
    for micro_batch, ids in enumerate(([[0, 1, 2], [0, 1, 3], [3, 4, 5]], [[3, 4, 5], [0, 4, 5], [0, 1, 2]])):
        chosen = torch.tensor(ids)
        found.observe_router(micro_batch, 4, of_logits(torch.zeros(3, EXPERTS)), chosen, chosen, None, valid)
    assert found.rank_load.tolist() == [[[0, 0], [5, 1]], [[0, 0], [1, 5]]]
    assert peak_over_mean(found.rank_load).tolist() == [[0, 5 / 3], [0, 5 / 3]]
    # Over the whole mini-batch both ranks have the same load, so only the peak shows the imbalance.
    assert not [name for name in found.finalize() if "ep_peak" in name]
    found.peaks = peak_over_mean(found.rank_load).amax(0)
    assert found.finalize()["routing/ep_peak/layer_04"] == found.finalize()["routing/ep_peak/max"] == 5 / 3
    assert "routing/ep_peak/layer_01" not in found.finalize()


def test_replay_metrics_are_absent_without_replay() -> None:
    found = stats()
    ids = torch.tensor([[0, 1, 2]])
    found.observe_router(0, 1, of_logits(torch.randn(1, EXPERTS)), ids, ids, None, torch.tensor([True]))
    report = found.finalize()
    assert "routing/entropy/layer_01" in report
    assert not [name for name in report if "overlap" in name or "fallback" in name]


def test_an_accumulator_without_rows_reports_nothing() -> None:
    found = stats()
    assert found.finalize() == {}
    feed(found, draw(0, 5), torch.zeros(5, dtype=torch.bool), 0)
    found.count_tokens()
    assert found.finalize() == {}


def test_an_underflowed_probability_adds_no_entropy() -> None:
    found = stats()
    ids, valid = torch.tensor([[0, 1, 2]]), torch.tensor([True])
    scores = of_logits(torch.tensor([[0.0, 0, 0, 0, -math.inf, -math.inf]]))
    found.observe_router(0, 1, scores, ids, ids, None, valid)
    assert found.finalize()["routing/entropy/layer_01"] == pytest.approx(math.log(4))


def test_there_is_no_margin_if_every_expert_is_chosen() -> None:
    found = RoutingStats([0], 2, 2, CPU)
    ids = torch.tensor([[1, 0]])
    found.observe_router(0, 0, of_logits(torch.tensor([[0.0, 1.0]])), ids, ids, None, torch.tensor([True]))
    assert not [name for name in found.finalize() if "margin" in name]


def test_an_undeclared_or_unexpected_pair_is_an_error() -> None:
    found, ids = stats(), torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match="found 'rolout_old'; expected one of rollout_old/effective, "):
        found.expect("rolout_old", 0, torch.tensor([True]))
    with pytest.raises(KeyError):
        found.compare([PAIR], 0, 1, ids, ids)


def test_the_autograd_graph_is_not_kept_alive() -> None:
    found = stats()
    ids = torch.tensor([[0, 1, 2]])
    scores = of_logits(torch.randn(1, EXPERTS, requires_grad=True))
    found.observe_router(0, 1, scores, ids, ids, None, torch.tensor([True]))
    assert not any(sums.requires_grad for sums in found.sums())


def test_nothing_synchronises_with_the_device_before_finalize() -> None:
    """A fake tensor has no values, so it refuses calls that wait for values: item, nonzero, bincount."""
    with FakeTensorMode():
        found = stats()
        feed(found, draw(0, 5), slice(None), 0)
        found.count_tokens()


def draw(seed: int, rows: int) -> dict[str, Tensor]:
    """logits [rows, LAYERS, EXPERTS]; used, live [rows, LAYERS, TOP_K]; replayed, valid [rows]."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, len(LAYERS), EXPERTS, generator=g)
    return {
        "logits": logits,
        "used": torch.rand(logits.shape, generator=g).topk(TOP_K).indices,
        "live": logits.topk(TOP_K).indices,
        "replayed": torch.rand(rows, generator=g) < 0.7,
        "valid": torch.rand(rows, generator=g) < 0.8,
    }


def feed(
    found: RoutingStats,
    data: dict[str, Tensor],
    rows: slice | Tensor,
    micro_batch: int,
    layers: Sequence[int] = LAYERS,
    pair: str = PAIR,
) -> None:
    """Feeds a micro-batch as a rank with these rows and layers sees it."""
    d = {name: values[rows] for name, values in data.items()}
    found.expect(pair, micro_batch, d["valid"])
    for layer in layers:
        place = LAYERS.index(layer)
        used, live = d["used"][:, place], d["live"][:, place]
        scores = of_logits(d["logits"][:, place])
        found.observe_router(micro_batch, layer, scores, used, live, d["replayed"], d["valid"])
        found.compare([pair], micro_batch, layer, used, live)


def test_layers_of_a_micro_batch_are_measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, int, int]] = []
    run = LayerRun(lambda micro_batch, places, given: measured.append((micro_batch, places.start, len(given))))
    small = [torch.zeros(3, 4)]
    for micro_batch, place in ((0, 0), (0, 1), (1, 2), (1, 4), (1, 5)):
        run.add(micro_batch, place, small)
    run.add(1, 6, [torch.zeros(2, 4)])
    run.measure()
    assert measured == [(0, 0, 2), (1, 2, 1), (1, 4, 2), (1, 6, 1)]
    measured.clear()
    monkeypatch.setattr("megatron_rl.routing.drift.RUN_BYTES", 2 * small[0].nbytes - 1)
    for place in range(5):
        run.add(0, place, small)
    run.measure()
    assert measured == [(0, 0, 2), (0, 2, 2), (0, 4, 1)]


def report_of(data: dict[str, Tensor]) -> dict[str, float]:
    found = stats()
    feed(found, data, slice(None), 0)
    found.count_tokens()
    return found.finalize()


def reduced(ranks: Sequence[RoutingStats]) -> dict[str, float]:
    """Returns the report of all ranks after their sums are added up."""
    for parts in zip(*(rank.sums() for rank in ranks), strict=True):
        parts[0].copy_(torch.stack(parts).sum(0))
    return ranks[0].finalize()


seeds, counts = st.integers(0, 2**20), st.integers(1, 40)


@given(seed=seeds, rows=counts, data=st.data())
def test_metrics_do_not_depend_on_micro_batches_or_ranks(seed: int, rows: int, data: st.DataObject) -> None:
    drawn = draw(seed, rows)
    # Three ranks with two micro-batches each; rows are in any of them, and some are empty.
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)))
    ranks = [stats() for _ in range(3)]
    for part in range(6):
        feed(ranks[part // 2], drawn, owner == part, part % 2)
    for rank in ranks:
        rank.count_tokens()
    assert reduced(ranks) == pytest.approx(report_of(drawn))


@given(seed=seeds, rows=counts)
def test_metrics_do_not_depend_on_pipeline_stages(seed: int, rows: int) -> None:
    drawn = draw(seed, rows)
    stages = [stats() for _ in range(3)]  # the last one has no routers
    for stage, layers in zip(stages, ([LAYERS[0]], [LAYERS[1]], []), strict=True):
        for part, pair in ((slice(0, rows // 2), PAIR), (slice(rows // 2, None), PAIR), (slice(None), RERUN)):
            feed(stage, drawn, part, int(part.start == rows // 2), layers, pair)
    for parts in zip(*(stage.differing() for stage in stages), strict=True):
        parts[0].copy_(torch.stack(parts).sum(0))
    stages[0].count_tokens()
    whole = report_of(drawn)
    found = reduced(stages)
    for name in (name for name in whole if PAIR in name):
        assert found[name] == pytest.approx(whole[name]), name
        assert found[name.replace(PAIR, RERUN)] == pytest.approx(whole[name]), name


@given(seed=seeds, rows=counts)
def test_values_in_padding_are_never_read(seed: int, rows: int) -> None:
    drawn = draw(seed, rows)
    padding = ~drawn["valid"]
    spoilt = {name: values.clone() for name, values in drawn.items()}
    spoilt["logits"][padding] = math.nan
    spoilt["used"][padding] = EXPERTS + 7
    spoilt["live"][padding] = -1
    spoilt["replayed"][padding] ^= True
    without = {name: values[drawn["valid"]] for name, values in drawn.items()}
    assert report_of(spoilt) == pytest.approx(report_of(without))


@given(seed=seeds, rows=counts)
def test_the_order_of_a_rows_experts_affects_only_top1_change(seed: int, rows: int) -> None:
    drawn = draw(seed, rows)
    turned = report_of({**drawn, "used": drawn["used"].roll(1, dims=-1)})
    report = report_of(drawn)
    kept = {name for name in report if "top1_change" not in name}
    assert {name: turned[name] for name in kept} == {name: report[name] for name in kept}
    same = report_of({**drawn, "used": drawn["live"].roll(1, dims=-1)})
    for name, value in same.items():
        if "top1_change" in name:
            assert value == 1, name
        elif "set_mismatch" in name or "expert_change" in name or "token_layers" in name:
            assert value == 0, name


@given(seed=seeds, rows=counts)
def test_ids_of_any_integer_type_and_bf16_logits_are_accepted(seed: int, rows: int) -> None:
    drawn = draw(seed, rows)
    drawn["logits"] = drawn["logits"].bfloat16()
    narrow = {**drawn, "logits": drawn["logits"].float(), "used": drawn["used"].byte(), "live": drawn["live"].short()}
    assert report_of(narrow) == report_of(drawn)


@given(seed=seeds, rows=counts)
def test_random_rows_equal_the_reference(seed: int, rows: int) -> None:
    drawn = draw(seed, rows)
    expected: dict[str, float] = {}
    for place, layer in enumerate(LAYERS):
        for name, value in reference_of_layer(drawn, place).items():
            expected[f"routing/{name}/layer_{layer:02d}"] = value
    for name in {key.rpartition("/")[0] for key in expected}:
        values = [value for key, value in expected.items() if key.startswith(f"{name}/layer_")]
        expected |= {f"{name}/mean": float(np.mean(values)), f"{name}/min": min(values), f"{name}/max": max(values)}
    if drawn["valid"].any():
        used, live = (drawn[name][drawn["valid"]].tolist() for name in ("used", "live"))
        differing = [sum(set(a) != set(b) for a, b in zip(u, v, strict=True)) for u, v in zip(used, live, strict=True)]
        expected[f"routing/token_layers/{PAIR}/mean"] = float(np.mean(differing))
        expected[f"routing/token_layers/{PAIR}/any"] = float(np.mean([count > 0 for count in differing]))
    assert report_of(drawn) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def reference_of_layer(drawn: dict[str, Tensor], place: int) -> dict[str, float]:
    counted = np.flatnonzero(drawn["valid"].numpy())
    if not len(counted):
        return {}
    used, live = (drawn[name][:, place].tolist() for name in ("used", "live"))
    logits = drawn["logits"][:, place].double().numpy()[counted]
    replayed = [r for r in counted if drawn["replayed"][r]]
    shared = {r: len(set(used[r]) & set(live[r])) for r in counted}
    loads = [sum(expert in used[r] for r in counted) for expert in range(EXPERTS)]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ordered = -np.sort(-logits, axis=-1)
    expected = {
        f"set_mismatch/{PAIR}": np.mean([shared[r] < TOP_K for r in counted]),
        f"expert_change/{PAIR}": np.mean([1 - shared[r] / TOP_K for r in counted]),
        f"top1_change/{PAIR}": np.mean([used[r][0] != live[r][0] for r in counted]),
        "entropy": np.mean(-(p * np.log(p)).sum(-1)),
        "margin": np.mean(ordered[:, TOP_K - 1] - ordered[:, TOP_K]),
        "max_vio": (max(loads) - np.mean(loads)) / np.mean(loads),
        "dead_experts": loads.count(0),
        "load_cv": np.std(loads) / np.mean(loads),
        "cold_experts": np.mean([load < 0.1 * np.mean(loads) for load in loads]),
        "mass": np.mean([sum(row[e] for e in used[r]) for row, r in zip(p, counted, strict=True)]),
        "fallback": 1 - len(replayed) / len(counted),
    }
    if replayed:
        expected["live_overlap"] = np.mean([shared[r] / TOP_K for r in replayed])
    return {name: float(value) for name, value in expected.items()}
