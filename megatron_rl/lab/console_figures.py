"""Which figures the console shows, under which words, and in which form. All are declared metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_rl.disk import size
from megatron_rl.lab.timer import PREFIX

Values = Mapping[str, float | None]
"""Metrics by name; those of an evaluation begin with eval/."""


def number(value: float) -> str:
    """Returns the number in at most eight characters: 0.250, 0.0012, 2091, 3.1e-05."""
    if value == 0 or 1e-3 <= abs(value) < 100:
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.1 else f"{value:.4f}"
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.1e}"


def percent(value: float) -> str:
    return f"{value:.1%}"


@dataclass(frozen=True)
class Figure:
    label: str
    metric: str
    form: Callable[[float], str] = number
    word: str = ""
    """Its name on the plain line of a log file; without one it is not there."""

    def text(self, value: float | None) -> str:
        return "not finite" if value is None else self.form(value)


@dataclass(frozen=True)
class Section:
    title: str
    figures: Sequence[Figure]


REWARD = Section(
    "Reward",
    (
        Figure("reward", "rollout/reward/mean", word="reward"),
        Figure("accuracy", "rollout/accuracy", word="accuracy"),
        Figure("held-out accuracy", "eval/avg_at_k", word="held-out accuracy"),
        Figure("dead groups", "rollout/group/dead", percent),
        Figure("nll", "nll/mean"),
    ),
)
POLICY = Section(
    "Policy",
    (
        Figure("entropy", "entropy/mean", word="entropy"),
        Figure("KL of the updates", "kl/old_policy/k3", word="KL"),
        Figure("KL of the engines", "kl/rollout_old/k3"),
        Figure("KL to reference", "kl/policy_reference/k3"),
        Figure("clipped low", "clip/low/active/token", percent),
        Figure("clipped high", "clip/high/active/token", percent, word="clipped"),
        Figure("gradient norm", "grad_norm", word="grad norm"),
        Figure("learning rate", "lr"),
        Figure("loss", "loss"),
    ),
)
LENGTH = Section(
    "Response length",
    (
        Figure("mean", "rollout/response_length/mean", word="length"),
        Figure("max", "rollout/response_length/max"),
        Figure("truncated", "rollout/truncated", percent, word="truncated"),
    ),
)
SPEED = Section(
    "Speed and memory",
    (
        Figure("tokens/s", "throughput/tokens_per_second", word="tokens/s"),
        Figure("MFU of the update", "throughput/mfu", percent, word="MFU"),
        Figure("memory, process", "memory/process", size),
        Figure("memory, GPU", "memory/gpu", size),
    ),
)
SECTIONS = (REWARD, POLICY, LENGTH, SPEED)


def rows(section: Section, values: Values) -> list[tuple[str, str]]:
    """Returns (label, text) of each figure that there is."""
    return [(each.label, each.text(values[each.metric])) for each in section.figures if each.metric in values]


def plain(values: Values) -> Iterator[str]:
    """Yields the figures of a plain line, without those of memory and the like."""
    if "rollout/reward/mean" not in values and "loss" in values:  # fine-tuning
        yield f"loss {number(values['loss'])}" if values["loss"] is not None else "loss not finite"
    for section in SECTIONS:
        for each in section.figures:
            if each.word and each.metric in values:
                yield f"{each.word} {each.text(values[each.metric])}"


def phases(values: Values) -> dict[str, float]:
    """Returns the seconds of each phase of the step."""
    return {
        name.removeprefix(PREFIX).replace("_", " "): seconds
        for name, seconds in values.items()
        if name.startswith(PREFIX) and seconds is not None
    }
