"""Metrics as Prometheus has them: names, labels, a real endpoint, the dashboard and the table of synonyms."""

from __future__ import annotations

import itertools
import math
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_rl.config.lab import PrometheusConfig
from megatron_rl.config.sources import ConfigError
from megatron_rl.lab.console import Console
from megatron_rl.lab.console_page import ServerLoad
from megatron_rl.lab.declared import OPEN, WrittenName
from megatron_rl.lab.declared_all import DECLARATION
from megatron_rl.lab.metric_kinds import LAYER
from megatron_rl.lab.prometheus_names import export, exported
from megatron_rl.lab.prometheus_sink import PrometheusSink, check_prometheus
from megatron_rl.lab.sinks import Line
from megatron_rl.lab.synonyms import SYNONYMS
from megatron_rl.lab.timer import PhaseTimer
from megatron_rl.rollout.server import free_ports
from tools import write_dashboard


def written() -> Iterator[tuple[str, WrittenName]]:
    """Yields every declared name as a run would write it; an open field has a 1, or a metric's name."""
    for table in DECLARATION.tables:
        for metric in table.metrics:
            choices = [["1"] if values in OPEN else list(values) for values in metric.fields.values()]
            for values in itertools.product(*choices):
                fields = dict(zip(metric.fields, values, strict=True))
                for statistic in metric.kind.statistics or ("",):
                    last = "layer_03" if statistic == LAYER else statistic
                    name = table.prefix + metric.name.format(**fields) + (f"/{last}" if last else "")
                    yield name, WrittenName(table, metric, fields, last)


def test_no_name_has_a_space_or_what_dashboards_do_not_take() -> None:
    for name, _ in written():
        assert re.fullmatch(r"[A-Za-z0-9_./-]+", name), name
    timer = PhaseTimer()
    with timer.phase("old log-probs"):
        pass
    assert list(timer.drain()) == ["time/old_log-probs"]


def test_a_name_of_prometheus_stands_for_one_metric_with_the_same_labels() -> None:
    owners: dict[str, tuple[object, tuple[str, ...]]] = {}
    series = set()
    for name, found in written():
        shown = exported(found)
        assert re.fullmatch(r"[a-z_][a-z0-9_]*", shown.name), name
        assert all(re.fullmatch(r"[a-z_]+", label) for label in shown.labels)
        by_layer = found.layer is not None
        owner = ((found.table.file, found.table.prefix, found.metric.name, by_layer), tuple(shown.labels))
        assert owners.setdefault(shown.name, owner) == owner, name
        assert shown.selector not in series
        series.add(shown.selector)


@pytest.mark.parametrize(
    ("file", "name", "selector"),
    [
        ("metrics.jsonl", "ratio/p99", 'megatron_rl_ratio{statistic="p99"}'),
        ("metrics.jsonl", "loss", "megatron_rl_loss"),
        (
            "metrics.jsonl",
            "kl/rollout_old/k3",
            'megatron_rl_kl_by_pair_estimate_nats{pair="rollout_old",estimate="k3"}',
        ),
        ("metrics.jsonl", "time/weight_sync", 'megatron_rl_time_by_phase_seconds{phase="weight_sync"}'),
        ("metrics.jsonl", "routing/entropy/layer_03", 'megatron_rl_routing_entropy_by_layer_nats{layer="3"}'),
        ("metrics.jsonl", "weights/bytes_per_second", "megatron_rl_weights_bytes_per_second"),
        ("metrics.jsonl", "throughput/tokens_per_second", "megatron_rl_throughput_tokens_per_second"),
        ("eval.jsonl", "avg_at_k", "megatron_rl_eval_avg_at_k"),
    ],
)
def test_names_have_units_and_labels(file: str, name: str, selector: str) -> None:
    found = export(file, name)
    assert found is not None
    assert found.selector == selector


def test_the_endpoint_serves_the_newest_step_and_what_runs(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    config = PrometheusConfig(port=port)
    console = Console(10, shows=False)
    sink = PrometheusSink(config, tmp_path, "abc", 10, console)

    class Leader:
        load = ServerLoad(live=2, servers=3, running=17, waiting=4)

    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        names = [f"{each.name} {' '.join(each.labels.values())}".strip() for each in samples]
        assert len(names) == len(set(names)), "Prometheus refuses a series that is there twice"
        return dict(zip(names, (each.value for each in samples), strict=True))

    try:
        before = scrape()
        assert before["megatron_rl_rollout_steps_total"] == 0
        assert "megatron_rl_requests running" not in before
        console.leader = Leader()
        for step in (1, 2):
            values = {"loss": float(step), "entropy/p99": None, **({"lr": 0.5} if step == 1 else {})}
            sink.write(Line("metrics", {"step": step, "mini_batch": 0, "weight_version": 0}, 0.0, {"loss": -9.0}, 4))
            sink.write(Line("steps", {"step": step, "weight_version": 0}, 0.0, values, 4 * step))
        sink.write(Line("eval", {"step": 2, "weight_version": 2}, 0.0, {"avg_at_k": 0.75}, 8))
        with console.phase("weight sync"):
            now = scrape()
        with pytest.raises(ConfigError, match=f"lab.prometheus: cannot listen on 127.0.0.1, port {port}: "):
            check_prometheus(config)
    finally:
        sink.close()
    assert now["megatron_rl_loss"] == 2.0
    assert math.isnan(now["megatron_rl_entropy_nats p99"])
    assert "megatron_rl_lr" not in now, "the newest step has none"
    assert (now["megatron_rl_rollout_steps_total"], now["megatron_rl_optimizer_steps_total"]) == (2, 8)
    assert now["megatron_rl_rollout_steps_planned"] == 10
    assert now["megatron_rl_eval_avg_at_k"] == 0.75
    assert now["megatron_rl_phase_info weight_sync"] == 1
    assert now[f"megatron_rl_run_info abc {tmp_path}"] == 1
    assert [now[f"megatron_rl_requests {state}"] for state in ("running", "waiting")] == [17, 4]
    assert [now[f"megatron_rl_servers {state}"] for state in ("live", "ejected")] == [2, 1]
    check_prometheus(config)  # the port is free again


def test_the_dashboard_matches_its_list_and_refuses_what_is_not_declared() -> None:
    page = write_dashboard.PAGE.read_text()
    assert page == write_dashboard.write_page(), "run: python tools/write_dashboard.py"
    with pytest.raises(ValueError, match=r"Wrong: metrics.jsonl has no metric loss/mean"):
        write_dashboard.expressions(write_dashboard.Panel("Wrong", ("loss/mean",)))


def test_every_name_with_synonyms_is_declared_and_named_once() -> None:
    for each in SYNONYMS:
        assert DECLARATION.find(each.file, each.name) is not None, each.name
        assert each.trl or each.verl or each.slime
    names = [(each.file, each.name) for each in SYNONYMS]
    assert len(names) == len(set(names))
