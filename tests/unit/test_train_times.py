"""The time of each phase is logged with its step, evaluation or checkpoint.

The loop and its parts are real, but slow operations only advance a clock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rl import train as train_module
from megatron_rl.config.schema import Config, DataConfig, EvalConfig, ModelConfig, TrainConfig
from megatron_rl.data.prompts import PromptCursor
from megatron_rl.data.versions import Versions
from megatron_rl.lab.console import Console
from megatron_rl.lab.journal import Journal
from megatron_rl.lab.run import RunDir, read_metrics
from megatron_rl.loop import evaluator as evaluator_module
from megatron_rl.loop.evaluator import Evaluator
from megatron_rl.loop.gpu_turns import GpuTurns
from megatron_rl.loop.parts import Parts
from megatron_rl.loop.progress import Progress
from megatron_rl.loop.publisher import Publisher
from megatron_rl.loop.rollouts import RolloutBatch
from megatron_rl.loop.trainer import Trainer
from megatron_rl.loop.watch import Watch
from megatron_rl.stop import Clock

ROLLOUT, SYNC, UPDATE, EVALUATION = 1.0, 2.0, 4.0, 8.0


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, answer: Any = None) -> Callable[..., Any]:
        def spend(*_: object, **__: object) -> Any:
            self.now += seconds
            return answer

        return spend


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run of three steps, with evaluations and checkpoints after the second and the last."""
    clock = HandClock()
    config = Config(
        run_dir=tmp_path / "run",
        model=ModelConfig(path=tmp_path),
        data=DataConfig(train="", heldout=""),
        train=TrainConfig(steps=3, mini_batches=1),
        eval=EvalConfig(every=2),
    )
    place = SimpleNamespace(rank=0, control=None)
    policy = SimpleNamespace(arch=SimpleNamespace(vocab_size=9), check_skipped=lambda: None)
    networks: Any = SimpleNamespace(policy=policy, critic=None, reference=None, trained={"policy": policy})
    run = RunDir.open(config.run_dir, "", resume=False)
    console = Console(3, shows=False, clock=clock)
    journal = Journal(console, clock)
    journal.open(run.begin(), 0)
    layout: Any = SimpleNamespace()
    watch = object.__new__(Watch)
    watch.__dict__.update(stopping="", checkpoint_due=False, _clock=Clock(None, None), _signals=SimpleNamespace())
    trainer = Trainer(
        config,
        layout,
        place,  # type: ignore[arg-type]
        networks,
        run,
        journal,
        console,
        watch,
        steps=3,
        resumes=False,
    )
    turns = GpuTurns(None, None, journal, shares=False)  # type: ignore[arg-type]
    sync: Any = SimpleNamespace(push=clock.takes(SYNC, {}), verify_if_due=lambda _: {})
    members: Any = SimpleNamespace(choose=lambda _: None, admit=lambda *_, **__: None)
    publisher = Publisher(Versions(0), sync, members, turns, leader=None, tells=True, phase=journal.phase)
    environment: Any = SimpleNamespace(evaluate=clock.takes(EVALUATION))
    figures = {"rollout/reward/mean": 0.0, "rollout/accuracy": 0.0, "rollout/tokens": 70.0}

    def update(*_: object) -> dict[str, float]:
        with journal.phase("update"):
            clock.now += UPDATE
        return {"loss": 0.0}

    def rollout(_: Progress) -> RolloutBatch:
        with journal.phase("rollout"):
            clock.now += ROLLOUT
        return RolloutBatch([], figures)

    @contextlib.contextmanager
    def open_parts(*_: object) -> Iterator[Parts]:
        yield Parts(
            config=config,
            trainer=trainer,
            progress=Progress(0, 3, PromptCursor(0)),
            rollouts=SimpleNamespace(next=rollout),  # type: ignore[arg-type]
            publisher=publisher,
            evaluator=Evaluator(config.eval, trainer, environment, [None]),  # type: ignore[arg-type]
            gpu_turns=turns,
            routes=None,
            tops=None,
        )

    monkeypatch.setattr(trainer, "update", update)
    monkeypatch.setattr(trainer, "export", lambda *_: None)
    monkeypatch.setattr(watch, "agree", lambda *_: None)  # there are no other ranks
    monkeypatch.setattr(trainer, "writing", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(Evaluator, "check_made", lambda *_: None)
    monkeypatch.setattr(trainer, "checkpoint", lambda _: None)
    monkeypatch.setattr(evaluator_module, "evaluation", lambda _: {"avg_at_k": 0.5})
    monkeypatch.setattr(train_module, "open_parts", open_parts)
    monkeypatch.setattr(train_module, "with_advantages", lambda *_: [])
    monkeypatch.setattr(train_module, "schedule", lambda *_: [SimpleNamespace(index=0)])
    updates = [SimpleNamespace(mini_batch=SimpleNamespace(index=0), loss=None, routing=None, value_loss=None)]
    monkeypatch.setattr(train_module, "prepare", lambda *_, **__: updates)
    monkeypatch.setattr(train_module, "measure_router_shift", lambda *_: None)
    train_module.train(config)
    return config.run_dir


def times(file: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], {k: v for k, v in line.items() if k.startswith("time/")}) for line in read_metrics(file)]


def test_a_steps_line_has_only_the_times_of_its_own_phases(run_dir: Path) -> None:
    """Times of earlier evaluations are excluded, and of the first weight sync too."""
    step = {"time/rollout": ROLLOUT, "time/update": UPDATE, "time/weight sync": SYNC}
    assert times(run_dir / "metrics.jsonl") == [(1, step), (2, step), (3, step)]


def test_evaluations_log_their_own_times(run_dir: Path) -> None:
    evaluation = {"time/evaluation": EVALUATION}
    assert times(run_dir / "eval.jsonl") == [(0, evaluation), (2, evaluation), (3, evaluation)]
