"""Whole RL runs on saved rollouts: PPO's critic, KL in loss and reward, mu in place of pi_old, and skipped steps.

Results do not depend on the layout.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Forks
from resume_runs import assert_exported
from rl_runs import GROUP, MINI_BATCHES, PROMPTS, run_all, save_rollouts, write_config
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from megatron_rl.data.sample import Sample, Verdict
from megatron_rl.data.store import read_groups, write_groups
from megatron_rl.lab.run import read_metrics

STEPS = 2
CRITIC = "presets=ppo critic.optim.lr=1e-3 critic.optim.eps=1e-4 critic.optim.clip_grad=0.5 critic.clip=0.05"
RUNS = {
    "ppo": CRITIC,
    "ppo-kl": f"{CRITIC} objective.kl.kind=k1 objective.kl.place=reward objective.kl.beta=0.05 model.reference=OTHER",
    "kl-in-loss": "presets=grpo objective.kl.kind=k3 objective.kl.beta=0.2 model.reference=OTHER",
    "kl-in-reward": "presets=grpo objective.kl.kind=k1 objective.kl.place=reward objective.kl.beta=0.02 "
    "model.reference=OTHER",
    "centred": "presets=score_centering objective.centering.top_k=5 objective.clip.high=null objective.clip.low=null "
    "objective.correction.kind=tis objective.correction.high=1.2 rollout.replay_from=TOP",
    "mimo": "presets=mimo",
    "mu-for-old": "presets=gspo objective.denominator=rollout train.recompute_old_logprobs=false",
}
# Each objective in layouts where ranks could disagree: replicas share the moments of advantages, and each stage has its
# own part of critic and reference. tests/ranks/test_objectives_layouts.py checks the arithmetic in every layout, and
# tests/ranks/test_engine_critic.py the critic.
LAYOUTS = {
    "ppo": ["", "parallel.pp=2 parallel.vpp=2"],
    "ppo-kl": ["parallel.ep=2"],
    "kl-in-loss": ["parallel.cp=2"],
    "kl-in-reward": [""],
    "centred": ["parallel.tp=2", "parallel.cp=2"],
    "mimo": [""],
    "mu-for-old": ["parallel.pp=2"],
}

TEN_LAYOUTS = {
    2: ["", "parallel.tp=2", "parallel.pp=2 parallel.vpp=2", "parallel.cp=2", "parallel.ep=2"],
    4: [
        "parallel.tp=2 parallel.pp=2",
        "parallel.cp=2 parallel.ep=2",
        "parallel.tp=2 parallel.cp=2",
        "parallel.tp=2 parallel.ep=2 parallel.etp=2 engine.recompute=full",
    ],
    8: ["parallel.tp=2 parallel.pp=2 parallel.ep=2"],
}
"""By number of ranks; the last has two replicas."""


def steps_of(name: str) -> int:
    """Returns the rollout steps of a run: a critic learns in the first and judges in the second."""
    return STEPS if name == "ppo" else 1


@pytest.fixture(scope="module")
def setting(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration; its folder has RUNS on one rank."""
    root = tmp_path_factory.mktemp("objectives")
    model = make_tiny_model(root / "model", num_layers=4, mlp_only_layers=(1,))
    make_tiny_model(root / "other", num_layers=4, mlp_only_layers=(1,), seed=1)
    save_rollouts(model, root / "saved", steps=STEPS)
    save_rollouts(model, root / "top", steps=1, top_k=5)
    config = write_config(root / "config.yaml", model, root / "saved")
    run_all(forks, config, 1, [overrides(config, name, root / name) for name in RUNS])
    return config


def overrides(config: Path, name: str, run_dir: Path, more: str = "") -> str:
    chosen = RUNS[name].replace("OTHER", str(config.parent / "other")).replace("TOP", str(config.parent / "top"))
    return f"run_dir={run_dir} train.steps={steps_of(name)} {chosen} {more}"


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(run_dir / "metrics.jsonl")


def assert_same(found: Path, expected: Path) -> None:
    assert len(lines(expected)) == steps_of(expected.name) * MINI_BATCHES
    for line, wanted in zip(lines(found), lines(expected), strict=True):
        assert {name for name in line if "/ep_peak/" not in name} == wanted.keys()
        for name in wanted:
            if (
                name not in ("time",)
                and not name.startswith(("time/", "memory/", "throughput/", "critic/explained"))
                and "chi2" not in name
            ):
                assert line[name] == pytest.approx(wanted[name], rel=5e-3, abs=2e-4), (found.name, name)
    for model in ("model", "critic"):
        if (expected / model).is_dir():
            trained = load_file(expected / model / "model.safetensors")
            for name, weight in load_file(found / model / "model.safetensors").items():
                assert (weight - trained[name]).abs().max() <= 2e-4 * trained[name].abs().max(), (found.name, name)


@pytest.mark.slow
@pytest.mark.distributed
def test_results_do_not_depend_on_the_layout(forks: Forks, setting: Path) -> None:
    directories, runs = [], []
    for name, layouts in LAYOUTS.items():
        for layout in layouts:
            directories.append((setting.parent / f"{name}-{layout}".replace(" ", "-"), setting.parent / name))
            runs.append(overrides(setting, name, directories[-1][0], layout))
    run_all(forks, setting, 2, runs)
    for found, expected in directories:
        assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("ranks", TEN_LAYOUTS)
def test_what_the_laboratory_adds_is_the_same_in_ten_layouts(forks: Forks, setting: Path, ranks: int) -> None:
    """Score centering, mimo's aggregation, and a frozen router."""
    frozen = setting.parent / "mimo-frozen"
    if not frozen.exists():
        run_all(forks, setting, 1, [overrides(setting, "mimo", frozen, "optim.freeze=[router]")])
    directories, runs = [], []
    for number, layout in enumerate(TEN_LAYOUTS[ranks]):
        for name, more in (("centred", ""), ("mimo", ""), ("mimo-frozen", "optim.freeze=[router]")):
            found = setting.parent / f"ten-{ranks}-{number}-{name}"
            directories.append((found, setting.parent / name))
            runs.append(overrides(setting, name.removesuffix("-frozen"), found, f"{layout} {more}"))
    run_all(forks, setting, ranks, runs)
    for found, expected in directories:
        assert_same(found, expected)
    assert lines(frozen)[0]["grad_norm"] != lines(setting.parent / "mimo")[0]["grad_norm"]


def test_the_critic_learns_and_logs_its_metrics(setting: Path) -> None:
    first, *_, last = lines(setting.parent / "ppo")
    assert first["critic/value/max"] == first["critic/value/min"] == 0  # the value head starts at zero
    assert first["critic/explained_variance"] == pytest.approx(0, abs=1e-9)
    assert last["critic/value/std"] > 0.01
    assert last["critic/value/mean"] > 0.05  # towards the rewards, which are 0 or 1
    for name in (
        "lr",
        "grad_norm",
        "grad_norm/router",
        "grad_norm/value_head",
        "clipped",
        "outcome/mean",
        "explained_variance/outcome",
    ):
        assert f"critic/{name}" in last
    before = load_file(setting.parent / "model" / "model.safetensors")
    after = load_file(setting.parent / "ppo" / "critic" / "model.safetensors")
    assert "lm_head.weight" not in after
    assert all((after[name] - before[name]).abs().max() > 1e-5 for name in after if name in before)
    assert after["score.weight"].abs().max() > 1e-4


def test_first_step_advantages_follow_from_zero_values(setting: Path) -> None:
    """With V = 0 and gamma = 1, A_t is the reward times lambda per remaining token; then A_t is normalised."""
    from megatron_rl.data.store import read_groups

    groups = read_groups(setting.parent / "saved" / "rollouts" / "step-000001-dp-0000.jsonl")
    tokens = []
    for group in groups:
        for sample in group.samples:
            n = int(sample.loss_mask.sum())
            assert sample.verdict is not None
            tokens.append(sample.verdict.reward * 0.95 ** np.arange(n - 1, -1, -1))
    everything = np.concatenate(tokens)
    normalised = [(each - everything.mean()) / everything.std(ddof=1) for each in tokens]
    means = np.array([each.mean() for each in normalised])
    first_step = [line for line in lines(setting.parent / "ppo") if line["step"] == 1]
    found = [line["advantage/mean"] for line in first_step]  # groups of four responses, mean over sequences
    np.testing.assert_allclose(found, means.reshape(MINI_BATCHES, -1).mean(1), rtol=1e-5)
    rewards = np.concatenate([np.full(len(each), each[-1]) for each in tokens])
    np.testing.assert_allclose(
        np.mean([line["critic/outcome/mean"] * line["tokens"] for line in first_step]) * MINI_BATCHES,
        rewards.sum(),
        rtol=1e-6,
    )


def test_a_kl_term_is_measured_and_changes_the_gradient(forks: Forks, setting: Path) -> None:
    plain = setting.parent / "plain"
    run_all(forks, setting, 1, [f"run_dir={plain} train.steps=1 presets=grpo"])
    first = lines(plain)[0]
    assert not any("reference" in name for name in first)
    for name in ("kl-in-loss", "kl-in-reward"):
        with_kl = lines(setting.parent / name)[0]
        assert with_kl["kl/policy_reference/k3"] > 0.1
        assert with_kl["ratio/min"] == with_kl["ratio/max"] == 1
        assert with_kl["grad_norm"] != pytest.approx(first["grad_norm"], rel=1e-4)
    assert lines(setting.parent / "kl-in-loss")[0]["loss"] == pytest.approx(
        first["loss"] + 0.2 * by_response(setting), rel=1e-4
    )


def by_response(setting: Path) -> float:
    """Returns transformers' k3 in the first mini-batch: averaged over the tokens of a response, then over responses."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_rl.data.store import read_groups

    groups = read_groups(setting.parent / "saved" / "rollouts" / "step-000001-dp-0000.jsonl")[: PROMPTS // MINI_BATCHES]
    models = [
        AutoModelForCausalLM.from_pretrained(setting.parent / name, dtype=torch.float32) for name in ("model", "other")
    ]
    means = []
    for sample in (sample for group in groups for sample in group.samples):
        ids = torch.tensor(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            policy, reference = (
                each(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0] for each in models
            )
        ratio = (reference - policy)[torch.tensor(sample.loss_mask[1:])].numpy()
        means.append((np.exp(ratio) - 1 - ratio).mean())
    return float(np.mean(means))


def test_rollout_log_probs_can_replace_old_log_probs(setting: Path) -> None:
    for line in lines(setting.parent / "mu-for-old"):
        assert not any(name.startswith(("rho", "kl/rollout_old", "abs_logprob_gap")) for name in line)
        assert line["ratio/mean"] == pytest.approx(line["omega/mean"])
        assert "time/old_log-probs" not in line or line["time/old_log-probs"] < 0.5
    # In the first step the saved mu equal the model's own log-probs up to rounding.
    first = lines(setting.parent / "mu-for-old")[0]
    assert first["sequence_ratio/min"] == pytest.approx(1, abs=1e-4)
    assert first["sequence_ratio/min"] != 1


def test_centering_takes_the_mean_over_the_sampler_off(setting: Path) -> None:
    """Compares loss and masses of the first mini-batch, before any update, with transformers."""
    from transformers import AutoModelForCausalLM

    groups = read_groups(setting.parent / "top" / "rollouts" / "step-000001-dp-0000.jsonl")[: PROMPTS // MINI_BATCHES]
    model = AutoModelForCausalLM.from_pretrained(setting.parent / "model", dtype=torch.float32)
    terms, masses = [], []
    for group in groups:
        rewards = np.array([sample.verdict.reward for sample in group.samples if sample.verdict])
        for sample, advantage in zip(group.samples, rewards - rewards.mean(), strict=True):
            n, top = len(group.prompt.token_ids), sample.top_tokens
            assert top is not None
            with torch.no_grad():
                logits = model(torch.tensor(sample.token_ids[None].astype(np.int64))).logits[0, n - 1 : -1].double()
            log_p = logits.log_softmax(-1).numpy()
            own = log_p[np.arange(len(log_p)), sample.response_ids]
            weight = np.minimum(np.exp(own - sample.rollout_logprobs[n:]), 1.2)
            head, q = np.take_along_axis(log_p, top.ids.astype(np.int64), 1), np.exp(top.logprobs.astype(np.float64))
            p = np.exp(head)
            alpha = ((1 - q.sum(1)) / (1 - p.sum(1)))[:, None]
            mean = ((q * np.minimum(p / q, 1.2) - alpha * np.minimum(1 / alpha, 1.2) * p) * head).sum(1)
            terms.append(advantage * (weight * own - mean))
            masses.append(p.sum(1))
    first = lines(setting.parent / "centred")[0]
    assert first["loss"] == pytest.approx(-np.concatenate(terms).mean(), rel=1e-3)
    assert first["centering/policy_mass/mean"] == pytest.approx(np.concatenate(masses).mean(), rel=1e-4)
    assert first["ratio/min"] == first["ratio/max"] == 1


@pytest.mark.distributed
def test_a_non_finite_gradient_skips_the_step_on_all_ranks(forks: Forks, setting: Path) -> None:
    directory = setting.parent / "skipped"
    faulty = "objective.custom=faulty_objectives:not_finite_in_the_second_mini_batch"
    custom = f"presets=grpo {faulty} engine.max_tokens_per_micro_batch=4096"
    run_all(forks, setting, 2, [f"run_dir={directory} train.steps=1 {custom}"])
    first, second, third, fourth = lines(directory)
    assert [line["skipped"] for line in (first, second, third, fourth)] == [0, 1, 0, 0]
    assert second["grad_norm"] is None  # JSON has no NaN
    # The skipped step changes no weights, so the third mini-batch still sees the update of the first.
    assert third["ratio/max"] > 1
    assert fourth["ratio/max"] > 1
    weights = load_file(directory / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_too_many_skipped_steps_end_the_run(forks: Forks, setting: Path) -> None:
    directory = setting.parent / "never"
    command = ["-m", "megatron_rl", "train", str(setting), f"run_dir={directory}", "presets=grpo"]
    command += [f"train.steps={STEPS}", "objective.custom=faulty_objectives:never_finite", "optim.max_skipped=1"]
    done = forks.run(*command)
    assert done.returncode == 2
    assert "optim.max_skipped: 2 optimizer steps of this run had a gradient that was not finite, and 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line["skipped"] for line in lines(directory)] == [1, 1]  # the last line is written too


def test_the_error_for_too_many_skipped_critic_steps_counts_every_epoch(forks: Forks, setting: Path) -> None:
    directory = setting.parent / "critic-skips"
    command = ["-m", "megatron_rl", "train", str(setting), f"run_dir={directory}", "presets=ppo"]
    # Returns exceed fp32; normalised advantages do not.
    beyond = setting.parent / "beyond"
    for step in range(1, STEPS + 1):
        name = f"rollouts/step-{step:06d}-dp-0000.jsonl"
        groups = [
            dataclasses.replace(group, samples=tuple(map(_rewarded_beyond_fp32, group.samples)))
            for group in read_groups(setting.parent / "saved" / name)
        ]
        write_groups(beyond / name, groups, weight_version=step - 1)
    command += [
        f"train.steps={STEPS}",
        f"rollout.replay_from={beyond}",
        "critic.epochs=2",
        "critic.optim.max_skipped=5",
    ]
    done = forks.run(*command)
    assert done.returncode == 2
    assert "critic.optim.max_skipped: 6 optimizer steps of this run had a gradient that was not finite" in done.stderr
    assert "Look at critic/loss and critic/grad_norm in the last lines" in done.stderr
    written = lines(directory)
    assert [(line["skipped"], line["critic/skipped"]) for line in written] == [(0, 1)] * MINI_BATCHES
    assert [line.get("critic/later/skipped") for line in written] == [None, None, None, 2]


def _rewarded_beyond_fp32(sample: Sample) -> Sample:
    assert sample.verdict is not None
    return dataclasses.replace(sample, verdict=Verdict(1e39 * sample.verdict.correct, sample.verdict.correct))


@pytest.mark.parametrize("name", ["ppo-kl", "kl-in-reward"])
def test_a_non_finite_kl_penalty_gives_one_error(forks: Forks, setting: Path, tmp_path: Path, name: str) -> None:
    reference = shutil.copytree(setting.parent / "other", tmp_path / "reference")
    broken = load_file(reference / "model.safetensors")
    broken["model.norm.weight"][:] = 3e38  # finite, so it loads; its logits are not
    save_file(broken, reference / "model.safetensors", metadata={"format": "pt"})
    command = ["-m", "megatron_rl", "train", str(setting)]
    command += [*overrides(setting, name, tmp_path / "run").split(), f"model.reference={reference}"]
    done = forks.run(*command)
    assert done.returncode == 2
    others = PROMPTS * GROUP - 1
    assert f"sample 0 of this step, and {others} more: the critic's value of a token, or the log-prob" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resumed_run_continues_with_its_critic(forks: Forks, setting: Path, tmp_path: Path) -> None:
    common = [a for a in overrides(setting, "ppo", tmp_path / "halted").split() if not a.startswith("train.steps")]

    def start(steps: int, *more: str) -> None:
        command = ["-m", "megatron_rl", "train", str(setting), *common, f"train.steps={steps}", *more]
        done = forks.run(*command)
        assert done.returncode == 0, done.stderr[-3000:]

    start(1)
    start(STEPS, "--resume")
    whole = setting.parent / "ppo"
    for model in ("model", "critic"):
        expected = load_file(whole / model / "model.safetensors")
        found = load_file(tmp_path / "halted" / model / "model.safetensors")
        assert all((found[name] == expected[name]).all() for name in expected)
    assert_exported(forks, tmp_path / "halted", tmp_path / "critic", "--critic", model="critic")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_bf16_critic_learns_like_an_fp32_critic(forks: Forks, setting: Path, tmp_path: Path) -> None:
    directory = setting.parent / "ppo-bf16"
    run_all(forks, setting, 2, [overrides(setting, "ppo", directory, "engine.dtype=bf16 parallel.tp=2")])
    for line, fp32 in zip(lines(directory), lines(setting.parent / "ppo"), strict=True):
        assert line["critic/loss"] == pytest.approx(fp32["critic/loss"], rel=0.03)
        assert line["critic/value/mean"] == pytest.approx(fp32["critic/value/mean"], abs=5e-3)
        assert line["critic/value/std"] == pytest.approx(fp32["critic/value/std"], rel=0.15)
        assert line["critic/grad_norm"] == pytest.approx(fp32["critic/grad_norm"], rel=0.2)
    for name, model, options in (("policy", "model", ()), ("critic", "critic", ("--critic",))):
        assert_exported(forks, directory, tmp_path / name, *options, model=model)
    exported = load_file(directory / "critic" / "model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
