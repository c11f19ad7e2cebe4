"""The line of a rollout step from those of its optimizer steps, and where it is drawn."""

from __future__ import annotations

import time
from pathlib import Path

from lab_runs import start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rl.lab.run import read_metrics
from megatron_rl.lab.step_summary import summarise


def curve(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(name)]


def test_a_step_has_means_smallest_minima_and_largest_maxima() -> None:
    lines = (
        {"rollout/reward/mean": 0.5, "ratio/mean": 1.0, "ratio/min": 1.0, "ratio/max": 1.0, "lr": 0.25},
        {"ratio/mean": 1.5, "ratio/min": 0.5, "ratio/max": 3.0, "lr": 0.25, "time/update": 7.0},
    )
    assert summarise(lines) == {
        "rollout/reward/mean": 0.5,
        "ratio/mean": 1.25,
        "ratio/min": 0.5,
        "ratio/max": 3.0,
        "lr": 0.25,
        "time/update": 7.0,
    }


def test_a_step_has_no_number_for_what_was_not_finite_once() -> None:
    assert summarise(({"loss": None}, {"loss": 1.0})) == {"loss": None}


def test_tensorboard_has_both_axes_and_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    def one_step(step: int, losses: tuple[float, float]) -> None:
        for mini_batch, loss in enumerate(losses):
            made.journal.log_update(step, mini_batch, step - 1, {"loss": loss})
        made.journal.end_step({"time/update": 2.0})
        made.journal.log_evaluation(step, step, {"avg_at_k": 0.5})

    made = start(tmp_path)
    one_step(1, (1.0, 3.0))
    one_step(2, (5.0, 9.0))
    made.close()
    time.sleep(1)  # files are read in the order of their names, which have the second and then a counter
    made = start(tmp_path, resume=True, last_step=1)
    one_step(2, (2.0, 4.0))
    one_step(3, (6.0, 8.0))
    made.close()
    assert curve(tmp_path / "tensorboard", "loss") == list(enumerate((1.0, 3.0, 2.0, 4.0, 6.0, 8.0), start=1))
    by_step = tmp_path / "tensorboard" / "rollout_steps"
    assert curve(by_step, "loss") == [(1, 2.0), (2, 3.0), (3, 7.0)]
    assert curve(by_step, "eval/avg_at_k") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert not (tmp_path / "steps.jsonl").exists()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 3.0, 2.0, 4.0, 6.0, 8.0]
