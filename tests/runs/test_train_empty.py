"""Mini-batches with fewer samples than micro-batches: some micro-batches are empty, and results do not change.

Each of three samples fills a micro-batch. Two replicas have two micro-batches each, so one is empty. Four replicas, or
a pipeline with two virtual stages, also have one too many.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from rl_runs import run_all, save_rollouts, weights, write_config
from tiny_models import make_tiny_model

from megatron_rl import parity
from megatron_rl.config.layout import Layout
from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.show import largest_step
from megatron_rl.lab.run import read_metrics

PROMPTS, GROUP, MINI_BATCHES, STEPS = 2, 3, 2, 1
SIZES = (
    f"rollout.prompts_per_step={PROMPTS} rollout.group_size={GROUP} train.mini_batches={MINI_BATCHES} "
    f"train.steps={STEPS} engine.max_tokens_per_micro_batch=8"
)
RUNS = {
    "r3": "routing.replay=r3 engine.recompute=full",
    "rspo": "presets=rspo routing.replay=r2 routing.noise_floor=1",
    "custom": "presets=grpo objective.custom=faulty_objectives:refuses_an_empty_micro_batch",
    "balanced": "engine.recompute=full engine.aux_loss_coefficient=1.0",
    "ppo-kl": "presets=ppo critic.optim.lr=1e-3 critic.optim.eps=1e-4 critic.optim.clip_grad=0.5 critic.epochs=2 "
    "objective.kl.kind=k1 objective.kl.place=reward objective.kl.beta=0.05",
    "kl-in-reward": "presets=grpo objective.kl.kind=k1 objective.kl.place=reward objective.kl.beta=0.02 "
    "objective.correction.kind=mis objective.correction.low=0.8 objective.correction.high=1.25",
}
TWO_RANKS = [("r3", "pp=2 vpp=2"), ("rspo", "ep=2"), ("balanced", "ep=2"), ("ppo-kl", ""), ("custom", "")]
FOUR_RANKS = [("r3", "tp=2 pp=2 vpp=2"), ("balanced", "pp=2 ep=2"), ("kl-in-reward", "ep=4")]
MORE = [("r3", "cp=2 ep=2"), ("rspo", ""), ("rspo", "tp=2 ep=4"), ("ppo-kl", "pp=2 vpp=2"), ("kl-in-reward", "tp=2")]


@pytest.fixture(scope="module")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration; its folder has RUNS on one rank, in which no micro-batch is empty."""
    root = tmp_path_factory.mktemp("empty")
    model = make_tiny_model(root / "model", num_layers=4, mlp_only_layers=(1,))
    save_rollouts(model, root / "saved", steps=STEPS, prompts=PROMPTS, group=GROUP, traces=True)
    config = write_config(root / "config.yaml", model, root / "saved")
    run_all(forks, config, 1, [f"run_dir={root / name} {SIZES} {keys}" for name, keys in RUNS.items()])
    return config


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_metrics(run_dir / "metrics.jsonl"))


def assert_same(found: Path, expected: Path) -> None:
    assert len(lines(expected)) == STEPS * MINI_BATCHES
    for line, wanted in zip(lines(found), lines(expected), strict=True):
        assert {name for name in line if "/ep_peak/" not in name} == wanted.keys(), found.name
        for name in wanted:
            if not name.startswith(("time", "trace/", "memory/", "throughput/")):
                assert line[name] == pytest.approx(wanted[name], rel=2e-3, abs=2e-4), (found.name, name)
    trained = weights(expected)
    for name, weight in weights(found).items():
        assert (weight - trained[name]).abs().max() <= 2e-4 * trained[name].abs().max(), (found.name, name)


def has_empty(config: Path, ranks: int, overrides: str) -> bool:
    loaded = load_config(Config, config, overrides.split())
    step = largest_step(loaded, Layout.resolve(loaded.parallel, ranks))
    return any(not part for replica in step.micro_batches for part in replica)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, TWO_RANKS),
        pytest.param(4, FOUR_RANKS, marks=pytest.mark.slow),
        pytest.param(4, MORE, marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "4 ranks", "more layouts"],
)
def test_an_empty_micro_batch_does_not_change_results(
    forks: Forks, setting: Path, ranks: int, layouts: list[tuple[str, str]]
) -> None:
    directories, runs = [], []
    for name, layout in layouts:
        directory = setting.parent / f"{name} {ranks} ranks {layout}".replace(" ", "-")
        degrees = " ".join(f"parallel.{degree}" for degree in layout.split())
        run = f"run_dir={directory} {SIZES} {RUNS[name]} {degrees}"
        assert has_empty(setting, ranks, run)
        directories.append((directory, setting.parent / name))
        runs.append(run)
    run_all(forks, setting, ranks, runs)
    for found, expected in directories:
        assert_same(found, expected)


def test_the_runs_learn_something(setting: Path) -> None:
    """Otherwise a trainer that does nothing would pass the tests above."""
    from safetensors.torch import load_file

    before = load_file(setting.parent / "model" / "model.safetensors")
    plain, balanced = (weights(setting.parent / name) for name in ("r3", "balanced"))
    assert all((plain[name] - before[name]).abs().max() > 1e-5 for name in before)
    router = next(name for name in before if name.endswith("mlp.gate.weight"))
    assert (balanced[router] - plain[router]).abs().max() > 1e-4  # the load-balancing loss has an effect


@pytest.mark.distributed
def test_sft_results_do_not_change_if_samples_do_not_divide_evenly(forks: Forks, setting: Path, tmp_path: Path) -> None:
    """Five samples of 60 tokens on two replicas, with at most 100 tokens in a micro-batch."""
    data, config = tmp_path / "data.jsonl", tmp_path / "sft.yaml"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}+", "response": "1" * 57}) for i in range(5)))
    config.write_text(
        f"run_dir: {tmp_path / 'unset'}\nmodel: {{path: {setting.parent / 'model'}}}\n"
        "engine: {device: cpu, dtype: fp32, max_tokens_per_micro_batch: 100}\noptim: {lr: 1.0e-3, eps: 1.0e-4}\n"
        f"data: {{train: {data}, max_tokens: 60}}\nsteps: 1\nbatch_size: 5\n"
    )
    for ranks in (1, 2):
        command = ("-m", "megatron_rl", "sft", str(config), f"run_dir={tmp_path / str(ranks)}")
        done = forks.run(*command, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    (alone,), (together,) = (lines(tmp_path / str(ranks)) for ranks in (1, 2))
    assert alone.keys() == together.keys()
    for name in ("loss", "tokens", "nll/mean", "nll/max", "entropy/mean", "grad_norm"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4), name
    trained = weights(tmp_path / "1")
    for name, weight in weights(tmp_path / "2").items():
        assert (weight - trained[name]).abs().max() <= 1e-4 * trained[name].abs().max(), name


@pytest.mark.distributed
@pytest.mark.usefixtures("forked_ranks")
def test_parity_passes_if_sequences_do_not_divide_evenly(
    setting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "three.jsonl"
    tokens.write_text("[5,6,7,8,9,10]\n" * 3)
    status = parity.run(setting.parent / "model", tokens, ["dp=2", "pp=2,vpp=2"], device="cpu", as_json=True)
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [result["passed"] for result in results] == [True, True]
    assert status == 0
