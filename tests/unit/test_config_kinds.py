"""Sections with kinds: replacing a kind, the keys of each kind, and preset keys that become useless."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, SFT, write

from megatron_rl.config.load import ConfigError, check_config, dump_config, load_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.config.sections import sections_of_kinds
from megatron_rl.config.switches import (
    KL,
    Gae,
    GroupAdvantage,
    MaskClip,
    MinClip,
    NoKL,
    SoftGate,
    Tis,
    UnbiasedKL,
    WeightClip,
)

KINDS = sections_of_kinds(Config)
BASE = """\
optim: {lr: 1e-4, schedule: cosine, decay_steps: 240, min_lr: 1e-5}
data: {heldout: x.jsonl}
eval: {every: 2}
weights: {verify: 20}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> tuple[Config, list[str]]:
    notes: list[str] = []
    return load_config(Config, write(tmp_path / "a.yaml", RL + text), overrides, notes), notes


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


# ---- replacing a kind ------------------------------------------------------------------------------------------


def test_five_sections_have_kinds() -> None:
    assert {section: (its.name, its.default) for section, its in KINDS.items()} == {
        "objective.clip": ("kind", "min"),
        "objective.advantage": ("estimator", "group"),
        "objective.correction": ("kind", "none"),
        "objective.kl": ("kind", "none"),
        "weights.stress": ("kind", "none"),
    }
    assert not sections_of_kinds(SftConfig)


def test_the_default_kind_stays_if_a_later_layer_names_it(tmp_path: Path) -> None:
    write(tmp_path / "own.yaml", "objective: {clip: {low: 0.1, high: 0.3}}\n")
    config, notes = load(tmp_path, "presets: [own.yaml]\nobjective: {clip: {kind: min, low: 0.2}}\n")
    assert config.objective.clip == MinClip(low=0.2, high=0.3)
    assert notes == []


def test_another_kind_does_not_take_over_keys_with_the_same_name(tmp_path: Path) -> None:
    config, _ = load(tmp_path, "presets: [dapo]\nobjective: {clip: {kind: weight, high: 4}}\n")
    assert config.objective.clip == WeightClip(high=4)


def test_a_section_that_is_an_alias_of_another_is_set_alone(tmp_path: Path) -> None:
    config, _ = load(tmp_path, "presets: [ppo]\noptim: &shared {lr: 1e-4}\ncritic: {optim: *shared}\n", "optim.lr=2e-4")
    assert config.critic is not None
    assert (config.optim.lr, config.critic.optim.lr) == (2e-4, 1e-4)


def test_keys_are_set_one_by_one_if_the_kind_stays_the_same(tmp_path: Path) -> None:
    config, notes = load(tmp_path, "presets: [dapo]\nobjective: {clip: {low: 0.1}}\n", "objective.clip.kind=min")
    assert config.objective.clip == MinClip(low=0.1, high=0.28)
    assert not notes


def test_another_kind_replaces_the_section_with_a_note(tmp_path: Path) -> None:
    text = "presets: [dapo]\nobjective: {clip: {low: 0.1}}\n"
    config, notes = load(tmp_path, text, "objective.clip.kind=mask", "objective.clip={low: 0.3, high: null}")
    assert config.objective.clip == MaskClip(low=0.3, high=None)
    assert notes == [
        "objective.clip: kind mask (override 'objective.clip.kind=mask') replaces min, with its "
        f"low 0.1 ({tmp_path / 'a.yaml'}:6), high 0.28 (preset dapo)"
    ]


def test_a_kind_does_not_depend_on_the_order_of_overrides(tmp_path: Path) -> None:
    overrides = ["objective.clip.tau_positive=1", "objective.clip.kind=soft-gate", "objective.clip.tau_negative=2"]
    for order in (overrides, overrides[::-1]):
        assert load(tmp_path, "", *order)[0].objective.clip == SoftGate(tau_positive=1, tau_negative=2)


def test_files_and_later_presets_replace_the_kinds_of_earlier_presets(tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml", "presets: [sapo]\nobjective: {correction: {kind: tis, high: 2}}\n")
    config, notes = load(tmp_path, "presets: [cispo, mine.yaml]\nobjective: {kl: {kind: k3, beta: 0.04}}\n")
    assert config.objective.clip == SoftGate(tau_positive=1.0, tau_negative=1.05)
    assert config.objective.correction == Tis(high=2)
    assert config.objective.kl == KL(kind="k3", beta=0.04)
    assert not notes
    config, _ = load(tmp_path, "presets: [mine.yaml]\nobjective: {clip: {kind: weight, high: 9}}\n")
    assert config.objective.clip == WeightClip(high=9)
    assert config.objective.correction == Tis(high=2)


def test_another_kind_of_the_same_class_also_replaces_the_section(tmp_path: Path) -> None:
    text = "objective: {kl: {kind: k3, place: reward, beta: 0.04}}\n"
    assert load(tmp_path, text, "objective.kl.beta=1")[0].objective.kl == KL(kind="k3", place="reward", beta=1)
    assert mistakes(tmp_path, text, "objective.kl.kind=k1") == [
        "override 'objective.kl.kind=k1': objective.kl.beta: not set, needed by objective.kl.kind k1"
    ]


def test_a_built_in_preset_resets_its_sections_to_the_defaults(tmp_path: Path) -> None:
    write(tmp_path / "first.yaml", "presets: dapo\nreward: {timeout: 3}\nrollout: {group_size: 4}\n")
    write(tmp_path / "second.yaml", "presets: grpo\n")
    config, _ = load(tmp_path, "presets: [first.yaml, second.yaml]\n")
    assert config.rollout.dynamic_sampling is config.reward.overlong_cache is config.reward.correct is None
    assert (config.reward.timeout, config.rollout.group_size) == (3, 4)


def test_a_dump_has_only_the_keys_of_each_kind_and_can_be_loaded(tmp_path: Path) -> None:
    for preset in ("sapo", "ppo", "minirl", "cispo"):
        config, _ = load(tmp_path, f"presets: [{preset}]\n")
        dumped = config.model_dump(mode="json")
        for section, its in KINDS.items():
            room, _, name = section.partition(".")
            values = dumped[room][name]
            assert list(values) == list(its.members[values[its.name]].model_fields)
            assert next(iter(values)) == its.name
        assert load_config(Config, write(tmp_path / "b.yaml", dump_config(config))) == config


# ---- keys of each kind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "objective.clip.tau_positive=1",
            "objective.clip.tau_positive: found 1; the key belongs to objective.clip.kind soft-gate, but that is min. "
            "Drop the key, or change the kind",
        ),
        (
            "objective.kl.beta=1",
            "objective.kl.beta: found 1; the key belongs to objective.kl.kind k1 or k2 or k3 or unbiased, but that is "
            "none. Drop the key, or change the kind",
        ),
        (
            "objective.advantage.gae_lambda=1",
            "objective.advantage.gae_lambda: found 1; the key belongs to objective.advantage.estimator gae, but that "
            "is group. Drop the key, or change the estimator",
        ),
        (
            "objective.correction={kind: icepop, low: 1, high: 2, level: token}",
            'objective.correction.level: found "token"; the key belongs to objective.correction.kind tis or mis, but '
            "that is icepop. Drop the key, or change the kind",
        ),
        ("objective.clip.hihg=1", "objective.clip.hihg: no such key; did you mean objective.clip.high?"),
        (
            "objective.clip={kind: soft-gate, tau_postive: 1, tau_negative: 1, tau_positive: 1}",
            "objective.clip.tau_postive: no such key; did you mean objective.clip.tau_positive?",
        ),
        (
            "objective.clip.kind=soft_gate",
            'objective.clip.kind: found "soft_gate", expected one of min, mask, weight, tapered, soft-gate; did you '
            "mean soft-gate?",
        ),
        ("objective.kl.kind=4", "objective.kl.kind: found 4, expected one of none, k1, k2, k3, unbiased"),
        ("objective.kl.kind=null", "objective.kl.kind: found null, expected one of none, k1, k2, k3, unbiased"),
        ("objective.clip=3", "objective.clip: found 3, expected a section of keys"),
        ("objective.kl.kind=k3", "objective.kl.beta: not set, needed by objective.kl.kind k3"),
        (
            "objective.correction={kind: icepop, high: 5}",
            "objective.correction.low: not set, needed by objective.correction.kind icepop",
        ),
        (
            "objective.correction.kind=sequence-mask",
            "objective.correction.delta: not set, needed by objective.correction.kind sequence-mask",
        ),
        (
            "objective.correction={kind: tis, high: 2, level: geometric}",
            "objective.correction.level: found \"geometric\", expected 'token' or 'sequence' under "
            "objective.correction.kind tis",
        ),
        (
            "objective.kl={kind: unbiased, beta: 1, place: reward}",
            "objective.kl.place: found \"reward\", expected 'loss' under objective.kl.kind unbiased",
        ),
        (
            "weights.stress={kind: int4, size: 1}",
            "weights.stress.size: found 1; the key belongs to weights.stress.kind noise, but that is int4. Drop the "
            "key, or change the kind",
        ),
        ("weights.stress.kind=noise", "weights.stress.size: not set, needed by weights.stress.kind noise"),
        (
            "weights.stress.kind=int2",
            'weights.stress.kind: found "int2", expected one of none, fp8, int8, int4, noise; did you mean int8?',
        ),
        (
            "weights.stress={kind: fp8, targets: [expert, expert]}",
            'weights.stress.targets: found ["expert", "expert"], expected one kind of weights or more, each once',
        ),
        (
            "weights.stress={kind: fp8, targets: []}",
            "weights.stress.targets: found [], expected one kind of weights or more, each once",
        ),
        ("objective.clip.low=-1", "objective.clip.low: found -1, expected a value greater than or equal to 0"),
        ("objective.kl={kind: k1, beta: null}", "objective.kl.beta: found null, expected a valid number"),
    ],
)
def test_a_mistake_in_a_kind_gives_one_line(tmp_path: Path, override: str, line: str) -> None:
    assert mistakes(tmp_path, "", override) == [f"override {override!r}: {line}"]


def test_gae_refuses_leave_one_out_and_requires_gamma_and_lambda(tmp_path: Path) -> None:
    text = "objective:\n  advantage: {estimator: gae, baseline: leave-one-out}\n"
    assert mistakes(tmp_path, text) == [
        "a.yaml:6: objective.advantage.baseline: found \"leave-one-out\", expected 'mean' or 'none' under "
        "objective.advantage.estimator gae",
        "a.yaml:6: objective.advantage.gamma: not set, needed by objective.advantage.estimator gae",
        "a.yaml:6: objective.advantage.gae_lambda: not set, needed by objective.advantage.estimator gae",
    ]


def test_mistakes_in_several_kinds_are_reported_at_once(tmp_path: Path) -> None:
    text = "objective:\n  clip: {kind: weight, dual: 3}\n  correction: {delta: 1}\n  kl: {kind: k4}\nsed: 1\n"
    starts = [line.split(": ")[:2] for line in mistakes(tmp_path, text)]
    assert starts == [
        ["a.yaml:6", "objective.clip.dual"],
        ["a.yaml:7", "objective.correction.delta"],
        ["a.yaml:8", "objective.kl.kind"],
        ["a.yaml:9", "sed"],
    ]


# ---- useless preset keys --------------------------------------------------------------------------------------


def test_a_preset_key_that_an_override_makes_useless_is_dropped_with_a_note(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", BASE)
    overrides = ["optim.schedule=constant", "rollout.replay_from=runs/zero"]
    config, notes = load(tmp_path, "presets: [base.yaml, dapo]\nreward: {overlong_cache: 9}\n", *overrides)
    constant, replay = (f"because of override {each!r}" for each in overrides)
    servers = "does nothing under rollout.replay_from, which uses no servers"
    mine = f"dropped from preset {base}"
    assert notes == [
        f"optim.decay_steps: 240 does nothing under optim.schedule constant; {mine}, {constant}",
        f"optim.min_lr: 1e-05 does nothing under optim.schedule constant; {mine}, {constant}",
        f"weights.verify: 20 {servers}; {mine}, {replay}",
        f"data.heldout: x.jsonl {servers} to evaluate with; {mine}, {replay}",
        "rollout.dynamic_sampling: does nothing under rollout.replay_from, which trains on all groups that were saved; "
        f"dropped from preset dapo, {replay}",
        f"eval.every: 2 does nothing without data.heldout: there is nothing to evaluate on; {mine}, {replay}",
    ]
    assert (config.optim.decay_steps, config.optim.min_lr, config.optim.lr) == (0, 0.0, 1e-4)
    assert config.data.heldout is config.rollout.dynamic_sampling is None
    check_config(config, ARCHITECTURE, 1)


@pytest.mark.parametrize(
    ("preset", "override", "key"),
    [
        ("dr_grpo", "objective.aggregation=token-mean", "objective.constant_length: 3000"),
        ("ppo", "objective.advantage={estimator: group}", "critic:"),
    ],
)
def test_changing_a_setting_drops_the_preset_keys_that_depended_on_it(
    tmp_path: Path, preset: str, override: str, key: str
) -> None:
    config, notes = load(tmp_path, f"presets: [{preset}]\n", override)
    assert notes[-1].startswith(f"{key} does nothing under objective.")
    assert notes[-1].endswith(f"; dropped from preset {preset}, because of override {override!r}")
    check_config(config, ARCHITECTURE, 1)


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        ("optim: {schedule: linear, decay_steps: 9}\n", ["optim.schedule=constant"], "optim.decay_steps: 9 does"),
        ("presets: [base.yaml]\noptim: {decay_steps: 9, min_lr: 0}\n", ["optim.schedule=constant"], "optim.decay_st"),
        ("presets: [own.yaml]\n", [], "optim.decay_steps: 5 does nothing under optim.schedule constant"),
        ("presets: [both.yaml]\n", [], "optim.decay_steps: 5 does nothing under optim.schedule constant"),
        ("presets: [ppo, group.yaml]\ncritic: {epochs: 2}\n", [], "critic: does nothing under"),
        ("presets: [ppo]\n", ["objective.advantage.estimator=group", "critic.epochs=2"], "critic: does nothing under"),
        ("presets: [grpo]\n", ["objective.constant_length=9"], "objective.constant_length: 9 does nothing under"),
    ],
)
def test_a_useless_key_set_by_the_user_is_an_error(tmp_path: Path, text: str, overrides: list[str], line: str) -> None:
    """A preset key is also an error if the preset itself makes it useless."""
    write(tmp_path / "base.yaml", BASE.replace("eval: {every: 2}\n", ""))
    write(tmp_path / "own.yaml", "optim: {decay_steps: 5}\n")
    write(tmp_path / "both.yaml", "optim: {schedule: constant, decay_steps: 5}\n")
    write(tmp_path / "group.yaml", "objective: {advantage: {estimator: group}}\n")
    config, _ = load(tmp_path, text, *overrides)
    with pytest.raises(ConfigError) as caught:
        check_config(config, ARCHITECTURE, 1)
    (found,) = str(caught.value).splitlines()
    assert found.startswith(line)


def test_sft_also_drops_useless_schedule_keys_of_a_preset(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "optim: {schedule: linear, decay_steps: 9}\n")
    notes: list[str] = []
    path = write(tmp_path / "a.yaml", SFT + "presets: base.yaml\noptim: {schedule: constant}\n")
    assert load_config(SftConfig, path, (), notes).optim.decay_steps == 0
    assert [note.split(":")[0] for note in notes] == ["optim.decay_steps"]


def test_estimators_and_kl_terms_load_as_their_classes(tmp_path: Path) -> None:
    assert load(tmp_path, "presets: ppo\n")[0].objective.advantage == Gae(gamma=1.0, gae_lambda=0.95)
    config, _ = load(tmp_path, "")
    assert (config.objective.advantage, config.objective.kl) == (GroupAdvantage(), NoKL())
    kl = "objective.kl={kind: unbiased, beta: 1}"
    assert load(tmp_path, "", kl)[0].objective.kl == UnbiasedKL(beta=1)
