"""The declaration of metrics: its page, its patterns, and what each declaration must say."""

from __future__ import annotations

import re

import pytest

from megatron_rl.lab.declared import NUMBER, Declaration, DeclaredMetric, DeclaredTable, Healthy
from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.lab.metric_kinds import Kind
from megatron_rl.lab.metrics import ROLLOUT, SFT, TRAINING, VALUE
from megatron_rl.lab.sketch import MetricAccumulator
from tools import write_metrics

METRICS = [(table, metric) for table in DECLARATION.tables for metric in table.metrics]
NAMES = [f"{table.file} {table.prefix}{metric.name}" for table, metric in METRICS]


def test_the_metrics_page_matches_the_declaration() -> None:
    page = write_metrics.PAGE.read_text()
    assert page == write_metrics.write_page(), "the declaration has changed; run: python tools/write_metrics.py"


@pytest.mark.parametrize(("table", "metric"), METRICS, ids=NAMES)
def test_a_declaration_says_what_the_metric_is(table: DeclaredTable, metric: DeclaredMetric) -> None:
    assert metric.unit
    assert re.search(r"[^.]\.$", metric.meaning), "the meaning is a sentence"
    assert set(re.findall(r"{(\w+)}", metric.name)) == metric.fields.keys()
    assert set(re.findall(r"{(\w+)}", metric.meaning)) <= metric.fields.keys()
    assert all(metric.fields.values())
    if metric.healthy is not None:
        assert metric.healthy.source, "a range without a source is invented"


@pytest.mark.parametrize(
    ("name", "pattern", "statistic", "layer"),
    [
        ("loss", "loss", "", None),
        ("ratio/p99", "ratio", "p99", None),
        ("ratio/chi2", "ratio", "chi2", None),
        ("entropy/not_finite", "entropy", "not_finite", None),
        ("kl/rollout_old/k3", "kl/{pair}/{estimate}", "", None),
        ("grad_norm/router", "grad_norm/{weights}", "", None),
        ("routing/set_mismatch/old_policy/live/layer_07", "set_mismatch/{pair}", "layer_07", 7),
        ("routing/set_mismatch/rerun/layer_103", "set_mismatch/{pair}", "layer_103", 103),
        ("routing/entropy/max", "entropy", "max", None),
        ("time/old_log-probs", "time/{phase}", "", None),
    ],
)
def test_a_written_name_is_found(name: str, pattern: str, statistic: str, layer: int | None) -> None:
    found = DECLARATION.find("metrics.jsonl", name)
    assert found is not None
    assert (found.metric.name, found.statistic, found.layer) == (pattern, statistic, layer)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("metrics.jsonl", "nothing"),
        ("metrics.jsonl", "ratio"),  # a ratio is written with statistics only
        ("metrics.jsonl", "entropy/chi2"),
        ("metrics.jsonl", "loss/mean"),
        ("metrics.jsonl", "kl/old_rollout/k3"),
        ("metrics.jsonl", "routing/entropy/layer_7"),
        ("metrics.jsonl", "avg_at_k"),
        ("eval.jsonl", "pass_at_"),
        ("eval.jsonl", "loss"),
    ],
)
def test_a_name_that_is_not_declared_is_not_found(file: str, name: str) -> None:
    assert DECLARATION.find(file, name) is None


def test_the_meaning_of_a_name_has_the_meanings_of_its_fields() -> None:
    found = DECLARATION.find("metrics.jsonl", "kl/old_policy/k3")
    assert found is not None
    assert found.meaning == (
        "Mean over tokens of k3 = q/p - 1 - log(q/p), an estimate of KL(p, q) with (p, q) = (pi_old, pi_theta), the "
        "drift of the updates."
    )
    number = DECLARATION.find("eval.jsonl", "pass_at_16")
    assert number is not None
    assert "one of 16 responses" in number.meaning


def test_two_declarations_of_one_name_are_an_error() -> None:
    metric = DeclaredMetric("loss", Kind.SUM, "1", "The loss.")
    pattern = DeclaredMetric("{which}", Kind.SUM, "1", "A {which}.", fields={"which": {"a": "a", "loss": "loss"}})
    with pytest.raises(ValueError, match=r"loss of metrics\.jsonl is declared twice"):
        Declaration([DeclaredTable("", "metrics.jsonl", "", (metric, pattern))])
    other_file = DeclaredTable("", "eval.jsonl", "", (pattern,))
    Declaration([DeclaredTable("", "metrics.jsonl", "", (metric,)), other_file])


def test_accumulators_have_the_declared_names_and_kinds() -> None:
    assert TRAINING["rho/beyond_2"] is Kind.MEAN
    assert TRAINING["clip/high/any/sequence"] is Kind.MEAN
    assert TRAINING["sequence_ratio"] is Kind.RATIO
    assert "lr" not in TRAINING  # a value, which no accumulator sums
    assert VALUE["outcome_residual"] is Kind.TAIL
    assert list(SFT) == ["loss", "tokens", "nll", "entropy"]
    assert ROLLOUT["group/dead/all_wrong"] is Kind.MEAN
    for kinds in (TRAINING, VALUE, SFT, ROLLOUT):
        MetricAccumulator(kinds)


@pytest.mark.parametrize("kind", [Kind.VALUE, Kind.LAYERS])
def test_an_accumulator_refuses_a_kind_that_it_cannot_sum(kind: Kind) -> None:
    with pytest.raises(KeyError):
        MetricAccumulator({"x": kind})


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0, 0, "0: w"), (None, 1, "at most 1: w"), (0, None, "at least 0: w"), (0, 1, "0 to 1: w")],
)
def test_a_healthy_range_is_written_in_words(low: float | None, high: float | None, words: str) -> None:
    assert write_metrics.describe_range(Healthy(low, high, "w")) == words


def test_a_field_of_numbers_holds_digits_only() -> None:
    table = DeclaredTable("", "f", "", (DeclaredMetric("at_{j}", Kind.TAIL, "1", "At {j}.", fields={"j": NUMBER}),))
    declaration = Declaration([table])
    found = declaration.find("f", "at_12/mean")
    assert found is not None
    assert (dict(found.values), found.statistic) == ({"j": "12"}, "mean")
    assert declaration.find("f", "at_x/mean") is None
