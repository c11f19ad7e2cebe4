"""The console's page: every figure in a terminal of 80 x 24, and no line that is too long or one too many in any."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_rl.lab.console_figures import SECTIONS, number, plain
from megatron_rl.lab.console_page import Page, ServerLoad, draw
from megatron_rl.lab.declared_all import DECLARATION

PHASES = ("rollout", "schedule", "old_log-probs", "reference_log-probs", "router_shift", "update", "critic_update")
VALUES: dict[str, float | None] = {
    "rollout/reward/mean": 0.4375,
    "rollout/accuracy": 0.4062,
    "eval/avg_at_k": 0.512,
    "rollout/group/dead": 0.31,
    "rollout/response_length/mean": 1834.2,
    "rollout/response_length/max": 8192.0,
    "rollout/truncated": 0.062,
    "entropy/mean": 0.412,
    "kl/old_policy/k3": 3.1e-5,
    "kl/rollout_old/k3": 0.0012,
    "kl/policy_reference/k3": 0.0213,
    "clip/low/active/token": 0.0012,
    "clip/high/active/token": 0.0031,
    "grad_norm": None,
    "lr": 1e-6,
    "loss": -0.0021,
    "throughput/tokens_per_second": 48211.0,
    "throughput/mfu": 0.312,
    "memory/process": 18.2 * 2**30,
    "memory/gpu": 71.3 * 2**30,
    **{f"time/{name}": 10.0 * i + 3 for i, name in enumerate(PHASES)},
    "time/values": 5.0,
    "time/weight_sync": 4.4,
}
PAGE = Page(
    run="runs/" + "a-rather-long-directory/" * 12,
    step=128,
    steps=1000,
    elapsed=25533.0,
    left="48:11:09",
    phase="rollout",
    phase_seconds=31.0,
    values=VALUES,
    evaluated=120,
    checkpoint=(120, 1331.0),
    load=ServerLoad(7, 8, 2011, 310),
    warnings=[f"06:0{i}:10 alarm: {'x' * 150} {i}" for i in range(5)],
)


def lines_of(page: Page, width: int, height: int) -> list[str]:
    lines = draw(page, width, height).plain.split("\n")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    return lines


@pytest.mark.parametrize("size", [(80, 23), (200, 49), (150, 40), (56, 16), (40, 10), (20, 5), (9, 2), (1, 1)])
@pytest.mark.parametrize("empty", [False, True])
def test_nothing_overflows_a_terminal_of_any_size(size: tuple[int, int], empty: bool) -> None:
    page = dataclasses.replace(PAGE, values={}, load=None, checkpoint=None, warnings=(), step=0) if empty else PAGE
    lines_of(page, *size)


@pytest.mark.parametrize("size", [(80, 23), (200, 49)])
def test_a_usual_terminal_has_every_figure(size: tuple[int, int]) -> None:
    """One line of 24 is the cursor's."""
    text = "\n".join(lines_of(PAGE, *size))
    for shown in (
        "step 128/1000  13%",
        "elapsed 7:05:33",
        "left 48:11:09",
        "now rollout 31 s",
        "held-out accuracy (120)",
    ):
        assert shown in text
    for shown in ("0.438", "0.406", "0.512", "31.0%", "1834", "8192", "6.2%", "0.412", "3.1e-05", "0.0012", "0.0213"):
        assert shown in text
    for shown in ("0.1%", "0.3%", "not finite", "1.0e-06", "48211", "31.2%", "18.2 GiB", "71.3 GiB"):
        assert shown in text
    for shown in ("7 of 8", "2011 running, 310 waiting", "step 120, 0:22:11 ago", "critic update", "others"):
        assert shown in text
    assert text.count("alarm:") == (1 if size[1] < 30 else 4)
    assert "5" in text.splitlines()[-1] or "Warnings: 5" in text


def test_a_wide_terminal_has_four_columns_and_a_narrow_one_has_one() -> None:
    title = {width: next(line for line in lines_of(PAGE, width, 49) if "Reward" in line) for width in (50, 80, 200)}
    assert [title[width].count("Time of the step") for width in (50, 80, 200)] == [0, 1, 1]
    assert "Policy" in title[200]
    assert "Policy" not in title[80]


def test_the_console_shows_declared_metrics_only() -> None:
    for section in SECTIONS:
        for figure in section.figures:
            file = "eval.jsonl" if figure.metric.startswith("eval/") else "metrics.jsonl"
            assert DECLARATION.find(file, figure.metric.removeprefix("eval/")) is not None, figure.metric


def test_a_log_file_has_the_most_important_figures_on_one_line() -> None:
    words = "  ".join(plain(VALUES))
    assert words == (
        "reward 0.438  accuracy 0.406  held-out accuracy 0.512  entropy 0.412  KL 3.1e-05  clipped 0.3%  "
        "grad norm not finite  length 1834  truncated 6.2%  tokens/s 48211  MFU 31.2%"
    )
    assert "  ".join(plain({"loss": 1.5, "entropy/mean": 0.25})) == "loss 1.500  entropy 0.250"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.25, "0.250"), (0.0123, "0.0123"), (2091.4, "2091"), (3e-9, "3.0e-09"), (5e8, "5.0e+08")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
