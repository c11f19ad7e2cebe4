"""Contradictions between keys, the model and the world size: all are reported before anything starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from config_files import ARCHITECTURE, MODEL_FIELDS, RL, SFT, write, write_model

from megatron_rl.config.layout import Layout
from megatron_rl.config.load import ConfigError, check_companions, check_config, load_config
from megatron_rl.config.schema import Config, ParallelConfig, SftConfig
from megatron_rl.config.show import largest_step

MASK = "objective.clip.kind=mask objective.clip.low=.2 objective.clip.high=.2"
KL_IN_REWARD = "objective.kl.kind=k1 objective.kl.beta=1 objective.kl.place=reward"


def rl(tmp_path: Path, overrides: str) -> Config:
    return load_config(Config, write(tmp_path / "a.yaml", RL), overrides.split())


def found(config: Config | SftConfig, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_config(config, ARCHITECTURE, world_size)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ("", 1),
        ("presets=gspo", 8),
        ("parallel.tp=2 parallel.pp=2 parallel.vpp=2 parallel.ep=2", 16),
        ("optim.schedule=cosine optim.decay_steps=10 optim.warmup_steps=9 optim.min_lr=1e-7", 1),
        ("optim.warmup_steps=9", 1),
        ("train.recompute_old_logprobs=false train.mini_batches=1", 1),
        ("objective.denominator=rollout", 1),
        ("objective.aggregation=constant-length objective.constant_length=100", 1),
        ("objective.clip.kind=soft-gate objective.clip.tau_positive=1 objective.clip.tau_negative=1", 1),
        ("objective.clip.kind=weight", 1),
        ("objective.ratio=geometric objective.clip.low=0.4 objective.clip.high=0.4", 1),
        ("objective.clip.dual=3", 1),
        ("presets=ppo rollout.group_size=1", 1),
        ("objective.kl.kind=k3 objective.kl.beta=0.04 model.reference=other", 1),
        ("objective.kl.kind=k1 objective.kl.beta=0.04 objective.kl.place=reward", 1),
        ("objective.denominator=rollout train.recompute_old_logprobs=false", 1),
        ("objective.router_shift=0.8 objective.denominator=rollout routing.replay=r2", 1),
        ("objective.correction.kind=tis objective.correction.high=2 objective.correction.level=sequence", 1),
        ("objective.correction.kind=mis objective.correction.high=2 objective.correction.level=geometric", 1),
        ("objective.correction.kind=icepop objective.correction.low=.5 objective.correction.high=5", 1),
        ("objective.correction.kind=sequence-mask objective.correction.delta=.1", 1),
        ("rollout.group_size=1 objective.advantage.baseline=none objective.advantage.std=none", 1),
        ("rollout.replay_from=runs/zero", 1),
        ("rollout.servers.urls=[http://127.0.0.1:1,'http://[::1]:1',http://localhost:1]", 1),
        ("rollout.servers.urls=[http://localhost:1] rollout.servers.tp=3 rollout.servers.max_total_tokens=1", 1),
        ("eval.every=2 data.heldout=x.jsonl eval.samples=4 eval.temperature=1", 1),
        ("lab.record_steps=[1]", 1),
        ("weights.verify=1 rollout.servers.dtype=bf16", 1),
        ("weights.stress.kind=fp8 weights.stress.targets=[attention,expert,router,embedding,head]", 1),
        ("weights.stress.kind=noise weights.stress.size=.01 rollout.servers.dtype=bf16", 1),
        ("weights.verify=1 engine.dtype=fp32 rollout.servers.dtype=bf16", 1),
        ("data.max_prompt_tokens=1024 rollout.max_response_tokens=3072", 1),
        ("rollout.servers.urls=[http://a:1] rollout.servers.api_key_env=KEY", 1),
        ("routing.replay=r2 routing.observe_rollout=true routing.noise_floor=3", 1),
        ("routing.replay=r3 rollout.servers.extra_flags=[--ep-size=2]", 1),
        ("routing.replay=r3 train.recompute_old_logprobs=false train.mini_batches=1", 1),
        ("routing.replay=r3 rollout.replay_from=runs/zero", 1),
        ("routing.replay=r3 rollout.servers.urls=[http://localhost:1]", 1),
        ("routing.replay=r2 rollout.servers.extra_flags=[--enable-eplb]", 1),
        ("routing.replay=r3 rollout.servers.extra_flags=[--moe-runner-backend=flashinfer_cutlass]", 1),
        ("rollout.servers.extra_flags=[--moe-runner-backend=auto]", 1),
        ("weights.route=disk rollout.servers.launch=2 rollout.servers.extra_flags=[--base-gpu-id=0]", 1),
        ("engine.device=cpu rollout.servers.extra_flags=[--base-gpu-id=0]", 1),
        ("rollout.servers.extra_flags=[--base-gpu-id=1]", 1),
        ("reward.overlong_cache=1023 reward.overlong_filter=true", 1),
        ("reward.correct=0 reward.wrong=-1", 1),
        (f"presets=ppo {KL_IN_REWARD} reward.overlong_filter=true", 1),
        ("rollout.dynamic_sampling.oversample=1", 1),
    ],
)
def test_a_configuration_without_contradictions_is_accepted(tmp_path: Path, overrides: str, world_size: int) -> None:
    layout = check_config(rl(tmp_path, overrides), ARCHITECTURE, world_size)
    assert layout.world_size == world_size


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        ("parallel.tp=2", 1, "parallel: tp * cp * pp = 2 does not divide the world of 1 ranks"),
        ("parallel.ep=3 rollout.prompts_per_step=36", 3, "parallel.ep: 3 does not divide the 16 experts of the model"),
        ("optim.schedule=cosine", 1, "optim.decay_steps: 0, but optim.schedule cosine needs more than"),
        ("optim.schedule=linear optim.decay_steps=5 optim.warmup_steps=5", 1, "optim.decay_steps: 5, but"),
        ("optim.decay_steps=5", 1, "optim.decay_steps: 5 does nothing under optim.schedule constant"),
        ("optim.min_lr=1e-9", 1, "optim.min_lr: 1e-09 does nothing under optim.schedule constant"),
        ("optim.schedule=linear optim.decay_steps=5 optim.min_lr=1", 1, "optim.min_lr: 1.0 is above optim.lr 1e-06"),
        ("rollout.prompts_per_step=30", 1, "train.mini_batches: 4 does not divide rollout.prompts_per_step 30"),
        ("train.recompute_old_logprobs=false", 1, "train.recompute_old_logprobs: false needs train.mini_batches 1"),
        (
            "rollout.max_response_tokens=3073",
            1,
            "data.max_prompt_tokens + rollout.max_response_tokens: 4097 is more than the model's 4096 positions",
        ),
        (
            "rollout.servers.max_total_tokens=2047",
            1,
            "rollout.servers.max_total_tokens: 2047 is less than data.max_prompt_tokens + rollout.max_response_tokens",
        ),
        (
            f"train.recompute_old_logprobs=false objective.denominator=rollout {MASK}",
            1,
            "train.recompute_old_logprobs: false needs train.mini_batches 1, not 4, under objective.clip.kind mask",
        ),
        ("presets=ppo critic=null", 1, "critic: not set, needed by objective.advantage.estimator gae"),
        ("critic.epochs=2", 1, "critic: does nothing under objective.advantage.estimator group"),
        ("presets=ppo critic.optim.decay_steps=5", 1, "critic.optim.decay_steps: 5 does nothing under critic.optim."),
        ("model.reference=other", 1, "model.reference: other is not read under objective.kl.kind none"),
        ("objective.aggregation=constant-length", 1, "objective.constant_length: not set"),
        ("objective.constant_length=9", 1, "objective.constant_length: 9 does nothing under objective.aggregation"),
        ("objective.ratio=geometric objective.clip.dual=3", 1, "objective.clip.dual: 3.0 does nothing under objective"),
        (
            f"objective.ratio=geometric {MASK}",
            1,
            "objective.clip.kind: mask, but objective.ratio geom",
        ),
        (
            "objective.correction.kind=icepop objective.correction.low=5 objective.correction.high=2",
            1,
            "objective.correction.low: 5.0 is above objective.correction.high 2.0",
        ),
        (
            "objective.correction.kind=mis objective.correction.high=2 objective.denominator=rollout",
            1,
            "objective.correction.kind: mis takes tokens out of the denominators, for which rho must be known before",
        ),
        (
            "objective.correction.kind=mis objective.correction.high=2 train.recompute_old_logprobs=false "
            "train.mini_batches=1",
            1,
            "objective.correction.kind: mis takes tokens out of the denominators, for which rho must be known before",
        ),
        (
            "objective.router_shift=0.8 train.recompute_old_logprobs=false train.mini_batches=1",
            1,
            "objective.router_shift: 0.8, but train.recompute_old_logprobs is false: there is no old-log-prob pass",
        ),
        ("rollout.group_size=1", 1, "rollout.group_size: 1 makes every advantage 0"),
        ("rollout.group_size=1 objective.advantage.std=none", 1, "rollout.group_size: 1 makes every advantage 0"),
        (
            "reward.overlong_cache=1024",
            1,
            "reward.overlong_cache: 1024 is not less than rollout.max_response_tokens 1024: every response",
        ),
        (
            "rollout.dynamic_sampling.max_refills=8 rollout.replay_from=runs/zero",
            1,
            "rollout.dynamic_sampling: does nothing under rollout.replay_from, which trains on all groups",
        ),
        (
            "rollout.dynamic_sampling.max_refills=8 rollout.group_size=1 objective.advantage.baseline=none "
            "objective.advantage.std=none",
            1,
            "rollout.dynamic_sampling: a group of rollout.group_size 1 has no right and wrong answers",
        ),
        (
            "rollout.replay_from=r rollout.servers.urls=[http://a:1]",
            1,
            "rollout.servers.urls: ['http://a:1'] does nothing under rollout.replay_from, which uses no servers; drop",
        ),
        (
            "rollout.replay_from=r weights.verify=2",
            1,
            "weights.verify: 2 does nothing under rollout.replay_from, which",
        ),
        (
            "rollout.replay_from=r weights.stress.kind=fp8",
            1,
            "weights.stress: fp8 does nothing under rollout.replay_from, which uses no servers; the saved rollouts are "
            "as stressed as the run that made them; set weights.stress.kind to none",
        ),
        (
            "weights.stress.kind=int4 weights.stress.targets=[expert,mlp]",
            1,
            "weights.stress.targets: mlp, but the model has no such weights; it has attention, expert, router, "
            "embedding, head",
        ),
        (
            "rollout.replay_from=r data.heldout=x",
            1,
            "data.heldout: x does nothing under rollout.replay_from, which uses",
        ),
        (
            "rollout.servers.urls=[http://localhost:1] rollout.servers.launch=2",
            1,
            "rollout.servers: launch and extra_flags are for servers that",
        ),
        (
            "rollout.servers.urls=[http://localhost:1] rollout.servers.extra_flags=[x]",
            1,
            "rollout.servers: launch and extra_flags are for",
        ),
        ("rollout.servers.tp=3", 1, "rollout.servers.tp: 3 does not divide the 8 attention heads"),
        ("rollout.servers.api_key_env=KEY", 1, "rollout.servers.api_key_env: KEY, but neither urls nor urls_file"),
        *(
            (
                f"rollout.servers.urls=[{url}]",
                1,
                f"rollout.servers.api_key_env: not set, but other machines reach {url}, and without a key may",
            )
            for url in ("http://a:1", "http://10.0.0.5:30000", "https://0.0.0.0:1", "http://127.0.0.1.example:1")
        ),
        (
            "routing.replay=r2 train.recompute_old_logprobs=false train.mini_batches=1",
            1,
            "routing.replay: r2, but train.recompute_old_logprobs is false: there is no old-log-prob pass to record",
        ),
        (
            "routing.noise_floor=2 train.recompute_old_logprobs=false train.mini_batches=1",
            1,
            "routing.noise_floor: 2, but train.recompute_old_logprobs is false: there is no old-log-prob pass to run",
        ),
        (
            "routing.replay=r3 rollout.servers.extra_flags=[--enable-eplb]",
            1,
            "rollout.servers.extra_flags: with --enable-eplb SGLang's routes may be wrong",
        ),
        (
            "routing.observe_rollout=true rollout.servers.extra_flags=[--ep-num-redundant-experts=2]",
            1,
            "rollout.servers.extra_flags: with --ep-num-redundant-experts SGLang's routes may be wrong",
        ),
        (
            "routing.replay=r3 rollout.servers.extra_flags=[--enable-hierarchical-cache]",
            1,
            "rollout.servers.extra_flags: with --enable-hierarchical-cache SGLang's routes may be wrong",
        ),
        (
            "routing.replay=r3 rollout.servers.extra_flags=[--moe-runner-backend,flashinfer_trtllm]",
            1,
            "rollout.servers.extra_flags: with --moe-runner-backend flashinfer_trtllm SGLang may record no routes",
        ),
        (
            "routing.replay=r3 rollout.servers.extra_flags=[--moe_runner,auto]",
            1,
            "rollout.servers.extra_flags: with --moe-runner-backend auto SGLang may record no routes",
        ),
        (
            "weights.route=delta weights.stress.kind=fp8",
            1,
            "weights.route: delta sends what changed in each rank's shards, and weights.stress changes whole tensors",
        ),
        (
            'rollout.servers.extra_flags=[--base-gpu,"0"]',
            1,
            "weights.route: collective, but --base-gpu-id 0 in rollout.servers.extra_flags lets servers share a GPU ",
        ),
        (
            "rollout.servers.extra_flags=[--base-gpu-id=0,--mem-fraction-static=0.4]",
            1,
            "weights.route: collective, but --base-gpu-id 0 in rollout.servers.extra_flags lets servers share a GPU "
            "with the trainer's rank 0",
        ),
        (
            'rollout.servers.launch=2 rollout.servers.extra_flags=[--base-gpu-id,"4"]',
            1,
            "weights.route: collective, but --base-gpu-id 4 in rollout.servers.extra_flags lets servers share a GPU "
            "with one another",
        ),
        ("reward.correct=1 reward.wrong=1", 1, "reward.correct: 1.0 is not above reward.wrong 1.0"),
        (
            f"{KL_IN_REWARD} reward.overlong_filter=true",
            1,
            "reward.overlong_filter: true, but under objective.kl.place reward a filtered response has no tokens",
        ),
        ("eval.every=1", 1, "eval.every: 1 does nothing without data.heldout"),
        ("lab.record_steps=[1,900000]", 1, "lab.record_steps: 900000, but train.steps is "),
        ("eval.samples=4", 1, "eval.samples: 4 greedy responses to a prompt are all the same"),
    ],
)
def test_each_contradiction_gives_one_line(tmp_path: Path, overrides: str, world_size: int, message: str) -> None:
    config = rl(tmp_path, overrides)
    (line,) = found(config, world_size)
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        ("rollout.prompts_per_step=4", 8),
        ("rollout.prompts_per_step=3 train.mini_batches=3", 2),
        ("rollout.prompts_per_step=8 train.mini_batches=8 rollout.group_size=4", 8),
        ("rollout.prompts_per_step=4 rollout.group_size=3 parallel.pp=4 parallel.vpp=2", 4),
    ],
)
def test_samples_need_not_divide_among_replicas_and_stages(tmp_path: Path, overrides: str, world_size: int) -> None:
    """Some micro-batches are then empty. The dry run makes the same plan as the run."""
    config = rl(tmp_path, overrides)
    layout = check_config(config, ARCHITECTURE, world_size)
    micro_batches = largest_step(config, layout).micro_batches
    assert len(micro_batches) == layout.dp
    planned = [i for replica in micro_batches for part in replica for i in part]
    groups = config.rollout.prompts_per_step // config.train.mini_batches
    assert sorted(planned) == list(range(groups * config.rollout.group_size))


def test_all_contradictions_are_reported_at_once(tmp_path: Path) -> None:
    config = rl(tmp_path, "eval.every=1 parallel.vpp=2 rollout.prompts_per_step=30 optim.min_lr=1")
    assert [line.partition(":")[0] for line in found(config)] == [
        "parallel.vpp",
        "optim.min_lr",
        "eval.every",
        "train.mini_batches",
    ]


@pytest.mark.parametrize(
    ("override", "world_size", "message"),
    [
        ("data.max_tokens=4097", 1, "data.max_tokens: 4097 is more than the model's 4096 positions"),
        ("optim.schedule=cosine", 1, "optim.decay_steps: 0, but optim.schedule cosine needs more than"),
    ],
)
def test_contradictions_in_an_sft_configuration_are_reported(
    tmp_path: Path, override: str, world_size: int, message: str
) -> None:
    path = write(tmp_path / "a.yaml", SFT)
    assert check_config(load_config(SftConfig, path), ARCHITECTURE, world_size).dp == world_size
    (line,) = found(load_config(SftConfig, path, [override]), world_size)
    assert line.startswith(message)


def test_dense_layers_that_sglang_would_ignore_are_refused(tmp_path: Path) -> None:
    mixed = dataclasses.replace(ARCHITECTURE, dense_layers=(0,))
    with pytest.raises(ConfigError, match=r"model\.path: layers \[0\] are dense, but SGLang's"):
        check_config(rl(tmp_path, ""), mixed, 1)
    check_config(rl(tmp_path, "rollout.replay_from=runs/zero"), mixed, 1)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("routing.replay=r2", "routing.replay: r2"),
        ("routing.replay=r3", "routing.replay: r3"),
        ("routing.observe_rollout=true", "routing.observe_rollout: true"),
        ("routing.noise_floor=1", "routing.noise_floor: 1"),
        ("objective.router_shift=0.8", "objective.router_shift: 0.8"),
    ],
)
def test_routing_keys_are_refused_for_a_model_without_experts(tmp_path: Path, override: str, key: str) -> None:
    dense = dataclasses.replace(
        ARCHITECTURE, model_type="qwen3", num_experts=0, experts_per_token=0, expert_hidden_size=0
    )
    check_config(rl(tmp_path, ""), dense, 1)
    with pytest.raises(ConfigError) as caught:
        check_config(rl(tmp_path, override), dense, 1)
    assert str(caught.value) == f"{key}, but the model has no experts"


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [
        ("", False),
        ("routing.replay=r2 routing.noise_floor=1", False),
        ("routing.replay=r3", True),
        ("routing.observe_rollout=true", True),
    ],
)
def test_rollout_routes_are_requested_only_if_needed(tmp_path: Path, overrides: str, needed: bool) -> None:
    assert rl(tmp_path, overrides).routing.needs_rollout_routes is needed


def test_reference_and_critic_must_fit_the_policy(tmp_path: Path) -> None:
    its = {"vocab_size": 98, "num_hidden_layers": 1, "max_position_embeddings": 1024}
    for name, changes in (("other", {"hidden_size": 128}), ("critic", its)):
        write_model(tmp_path / name)
        write(tmp_path / name / "config.json", json.dumps(MODEL_FIELDS | changes))
    config = rl(
        tmp_path,
        f"presets=ppo objective.kl.kind=k3 objective.kl.beta=1 model.reference={tmp_path / 'other'} "
        f"critic.path={tmp_path / 'critic'} engine.aux_loss_coefficient=0.001",
    )
    layout = Layout.resolve(ParallelConfig(pp=2), 2)
    with pytest.raises(ConfigError) as caught:
        check_companions(config, ARCHITECTURE, layout)
    first, second, third, fourth, fifth = str(caught.value).splitlines()
    assert first.startswith(f"model.reference: {tmp_path / 'other'} is of another architecture than model.path: ")
    assert "hidden_size 128, not 64" in first
    assert second.startswith(f"critic.path: {tmp_path / 'critic'} has a vocabulary of 98 tokens, the policy one of 99")
    assert third.startswith(f"critic.path: {tmp_path / 'critic'}: parallel.pp * parallel.vpp: 2 stages")
    assert fourth.startswith(
        f"critic.path: {tmp_path / 'critic'}: data.max_prompt_tokens + rollout.max_response_tokens"
    )
    assert fifth.startswith("engine.aux_loss_coefficient: 0.001, but the critic has 1 layers and the policy ")
    check_companions(rl(tmp_path, "presets=ppo"), ARCHITECTURE, layout)
