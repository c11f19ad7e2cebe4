"""Reads a run's endpoint for Prometheus while it is there."""

from __future__ import annotations

import re
import threading
import urllib.request
from types import TracebackType
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, frozenset[tuple[str, str]]]


class Scraper:
    """Asks again and again on a thread; `values` has the last value of every series that was ever there."""

    def __init__(self, port: int) -> None:
        self.values: dict[Series, float] = {}
        self.phases: set[str] = set()
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._ended.wait(0.05):
            try:
                with urllib.request.urlopen(self._url, timeout=5) as answer:
                    text = answer.read().decode()
            except OSError:
                continue
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    self.values[sample.name, frozenset(sample.labels.items())] = sample.value
                    if sample.name == "megatron_rl_phase_info":
                        self.phases.add(sample.labels["phase"])

    def has(self, expression: str) -> bool:
        """Returns whether a series was there that the selector selects; its instance is what Prometheus adds."""
        name, labels = parse_selector(expression)
        return any(name == found and labels <= its for found, its in self.values)


def parse_selector(expression: str) -> Series:
    """Returns name and labels of a PromQL selector of the dashboard, without the instance."""
    match = re.fullmatch(r"(\w+)(?:\{(.*)\})?", expression)
    assert match is not None, expression
    labels = frozenset(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
    return match[1], labels
