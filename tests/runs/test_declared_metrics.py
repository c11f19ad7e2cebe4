"""Runs write the metrics that are declared, and no others. Test files of runs with servers check the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from declared_names import DYNAMIC, ELSEWHERE, LIVE, OVER_SAMPLED, UNFILLED, declared, written
from forks import Forks
from rl_runs import run_all, save_rollouts, write_config
from tiny_models import make_tiny_model

RUNS = (
    # Two passes of a critic over each rollout batch, R2, and two passes of pi_old.
    "presets=ppo critic.epochs=2 critic.optim.lr=1e-3 objective.kl.kind=k1 objective.kl.place=reward "
    "objective.kl.beta=0.05 model.reference=MODEL routing.replay=r2 routing.noise_floor=1 reward.overlong_cache=8",
    # R3, a router shift, a dual clip, a correction that masks, and filtered responses.
    "presets=grpo objective.router_shift=0.8 objective.clip.dual=3 objective.correction.kind=mis "
    "objective.correction.high=1.5 objective.correction.low=0.5 routing.replay=r3 reward.overlong_filter=true",
    "presets=grpo objective.correction.kind=tis objective.correction.high=2 routing.observe_rollout=true "
    "checkpoint.every=1",
    "presets=score_centering objective.centering.top_k=5",
)
ALARMS = ",".join(f'{{"metric":"ratio/max","above":1e9,"action":"{action}"}}' for action in ("warn", "skip", "stop"))
TWO_RANKS = f"presets=grpo parallel.ep=2 lab.alarms=[{ALARMS}]"


@pytest.fixture(scope="module")
def names(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """Names that runs with every feature wrote on saved rollouts, and that a fine-tuning wrote."""
    root = tmp_path_factory.mktemp("declared")
    model = make_tiny_model(root / "model", num_layers=2)
    save_rollouts(model, root / "saved", steps=1, traces=True, top_k=5)
    config = write_config(root / "config.yaml", model, root / "saved")
    directories = [root / str(number) for number in range(len(RUNS) + 1)]
    overrides = [keys.replace("MODEL", str(model)) for keys in (*RUNS, TWO_RANKS)]
    runs = [f"run_dir={d} train.steps=1 {keys}" for d, keys in zip(directories, overrides, strict=True)]
    run_all(forks, config, 1, runs[:-1])
    run_all(forks, config, 2, runs[-1:])
    return set().union(*map(written, [*directories, fine_tune(forks, root, model)]))


def fine_tune(forks: Forks, root: Path, model: Path) -> Path:
    directory = root / "sft"
    (root / "sft.yaml").write_text(
        f"run_dir: {directory}\nmodel: {{path: {model}}}\nengine: {{device: cpu, dtype: fp32}}\n"
        "optim: {lr: 1.0e-3}\ndata: {train: 'arithmetic:terms=3,split=train,count=8', max_tokens: 64}\n"
        "steps: 1\nbatch_size: 4\n"
    )
    done = forks.run("-m", "megatron_rl", "sft", root / "sft.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def test_runs_write_every_declared_metric_that_needs_no_server(names: set[tuple[str, str]]) -> None:
    missing = declared() - names - LIVE - ELSEWHERE - DYNAMIC - OVER_SAMPLED - UNFILLED
    assert missing == set(), "declared, but not written by these runs"


def test_runs_without_a_server_write_no_metric_of_live_runs(names: set[tuple[str, str]]) -> None:
    """Otherwise the lists of LIVE and the others would excuse what the runs above must write."""
    assert names & (LIVE | ELSEWHERE | DYNAMIC | OVER_SAMPLED | UNFILLED) == set()
