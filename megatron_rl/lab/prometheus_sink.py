"""Serves the newest metrics of a run to Prometheus, on rank 0."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_rl.config.lab import PrometheusConfig
from megatron_rl.config.load import ConfigError
from megatron_rl.lab.console import Console
from megatron_rl.lab.prometheus_names import PREFIX, export
from megatron_rl.lab.sinks import Line


def check_prometheus(config: PrometheusConfig | None) -> None:
    """Raises ConfigError if the address cannot be listened on, before servers start."""
    if config is None:
        return
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        with socket.create_server((config.host, config.port), family=family):
            pass
    except OSError as error:
        raise ConfigError(
            f"lab.prometheus: cannot listen on {config.host}, port {config.port}: {error.strerror or error}; name a "
            "free port, and an address of this machine"
        ) from None


class PrometheusSink(Collector):
    """Holds the newest line of rollout steps, of evaluations and of checkpoints. A metric that is not finite is NaN."""

    what = "the endpoint for Prometheus"

    def __init__(self, config: PrometheusConfig, run_dir: Path, run_id: str, steps: int, console: Console) -> None:
        """Raises ConfigError if the address cannot be listened on. `steps`: of the whole run."""
        self.directory = run_dir
        self._run_id = run_id
        self._steps = steps
        self._console = console
        self._newest: dict[str, Line] = {}
        self._lock = threading.Lock()
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(config.port, addr=config.host, registry=registry)
        except OSError as error:
            raise ConfigError(f"lab.prometheus: {error}") from error

    def write(self, line: Line) -> None:
        if line.file != "metrics":
            with self._lock:
                self._newest[line.file] = line

    def sync(self) -> None: ...

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterable[Metric]:
        """Called by the server for each scrape, on a thread of its own."""
        with self._lock:
            newest = dict(self._newest)
        yield from self._of_the_run(newest)
        families: dict[str, GaugeMetricFamily] = {}
        for file, line in newest.items():
            for name, value in line.values.items():
                found = export("metrics.jsonl" if file == "steps" else f"{file}.jsonl", name)
                if found is None:
                    continue
                if found.name not in families:
                    families[found.name] = GaugeMetricFamily(found.name, found.help, labels=[*found.labels])
                families[found.name].add_metric([*found.labels.values()], math.nan if value is None else value)
        yield from families.values()

    def _of_the_run(self, newest: Mapping[str, Line]) -> Iterator[Metric]:
        run = GaugeMetricFamily(f"{PREFIX}_run_info", "The run; always 1.", labels=["run_dir", "id"])
        run.add_metric([str(self.directory), self._run_id], 1)
        yield run
        phase = GaugeMetricFamily(f"{PREFIX}_phase_info", "What rank 0 does at the moment; always 1.", labels=["phase"])
        phase.add_metric([(self._console.running or "between phases").replace(" ", "_")], 1)
        yield phase
        last = newest.get("steps")
        for name, meaning, count in (
            ("rollout_steps", "Rollout steps that are done.", last.tags["step"] if last else 0),
            ("optimizer_steps", "Optimizer steps that are done.", last.optimizer_steps if last else 0),
        ):
            yield CounterMetricFamily(f"{PREFIX}_{name}", meaning, value=count)
        yield GaugeMetricFamily(f"{PREFIX}_rollout_steps_planned", "Rollout steps of the whole run.", value=self._steps)
        if (load := self._console.load) is not None:
            servers = GaugeMetricFamily(f"{PREFIX}_servers", "Rollout servers of rank 0, by state.", labels=["state"])
            servers.add_metric(["live"], load.live)
            servers.add_metric(["ejected"], load.servers - load.live)
            yield servers
            requests = GaugeMetricFamily(
                f"{PREFIX}_requests", "Rank 0's responses to come, by state.", labels=["state"]
            )
            requests.add_metric(["running"], load.running)
            requests.add_metric(["waiting"], load.waiting)
            yield requests
