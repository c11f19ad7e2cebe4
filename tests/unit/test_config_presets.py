"""Built-in presets: each sets all keys of its objective to the paper's values, and nothing else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from config_files import ARCHITECTURE, RL, write
from paths import ROOT

from megatron_rl.config.dynamic_sampling import DynamicSamplingConfig
from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config, CriticConfig, RewardConfig, SftConfig
from megatron_rl.config.sources import PRESETS
from megatron_rl.config.switches import (
    KL,
    Centering,
    Gae,
    GroupAdvantage,
    IcePop,
    KLConfig,
    MaskClip,
    MinClip,
    ObjectiveConfig,
    SoftGate,
    TaperedClip,
    Tis,
    WeightClip,
)
from megatron_rl.demo.first_run import CONFIGS

FILES = sorted(PRESETS.glob("*.yaml"))
# The papers' values, written a second time, because a mistake in a preset affects every run that uses it.
PAPERS = {
    "cispo": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=WeightClip(low=None, high=4.0),
        aggregation="token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "dapo": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=MinClip(low=0.2, high=0.28),
        aggregation="token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "dr_grpo": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=MinClip(low=0.2, high=0.2),
        aggregation="constant-length",
        constant_length=3000,
        advantage=GroupAdvantage(baseline="mean", std="none"),
    ),
    "gmpo": ObjectiveConfig(
        ratio="geometric",
        denominator="old",
        clip=MinClip(low=0.4, high=0.4),
        aggregation="seq-mean-token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "grpo": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=MinClip(low=0.2, high=0.2),
        aggregation="seq-mean-token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "gspo": ObjectiveConfig(
        ratio="sequence",
        denominator="old",
        clip=MinClip(low=3e-4, high=4e-4),
        aggregation="seq-mean-token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "gspo_token": ObjectiveConfig(
        ratio="sequence-token",
        denominator="old",
        clip=MinClip(low=3e-4, high=4e-4),
        aggregation="seq-mean-token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "icepop": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=MinClip(low=0.2, high=0.2),
        aggregation="seq-mean-token-mean",
        correction=IcePop(low=0.5, high=5.0),
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "mimo": ObjectiveConfig(
        ratio="token",
        denominator="rollout",
        clip=WeightClip(low=None, high=None),
        aggregation="prompt-mean",
        correction=IcePop(low=0.2, high=5.0, negative_low=0.2, negative_high=5.0),
        advantage=GroupAdvantage(baseline="mean", std="none"),
    ),
    "minirl": ObjectiveConfig(
        ratio="token",
        denominator="rollout",
        clip=MaskClip(low=0.2, high=0.27),
        aggregation="seq-mean-token-sum",
        correction=Tis(high=5.0),
        advantage=GroupAdvantage(baseline="mean", std="none"),
    ),
    "ppo": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=MinClip(low=0.2, high=0.2),
        aggregation="token-mean",
        advantage=Gae(baseline="mean", std="sample", gamma=1.0, gae_lambda=0.95),
    ),
    "rloo": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=WeightClip(low=None, high=None),
        aggregation="seq-mean-token-sum",
        advantage=GroupAdvantage(baseline="leave-one-out", std="none"),
    ),
    "rspo": ObjectiveConfig(
        ratio="geometric",
        denominator="old",
        clip=MinClip(low=0.4, high=0.4),
        aggregation="seq-mean-token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
        router_shift=0.8,
    ),
    "sapo": ObjectiveConfig(
        ratio="token",
        denominator="old",
        clip=SoftGate(tau_positive=1.0, tau_negative=1.05),
        aggregation="seq-mean-token-mean",
        advantage=GroupAdvantage(baseline="mean", std="sample"),
    ),
    "score_centering": ObjectiveConfig(
        ratio="token",
        denominator="rollout",
        clip=WeightClip(low=0.0, high=0.0),
        aggregation="token-mean",
        advantage=GroupAdvantage(baseline="mean", std="none"),
        centering=Centering(top_k=128),
    ),
    "topr": ObjectiveConfig(
        ratio="sequence-product",
        denominator="rollout",
        clip=TaperedClip(low=None, high=0.0),
        aggregation="seq-mean-token-sum",
        advantage=GroupAdvantage(baseline="none", std="none"),
    ),
}
REWARDS = {
    "dapo": RewardConfig(correct=1.0, wrong=-1.0, overlong_cache=4096),
    "topr": RewardConfig(correct=1.0, wrong=-1.0),
}
DYNAMIC_SAMPLING = {"dapo": DynamicSamplingConfig(oversample=1.5, max_refills=8)}
CRITICS = {"ppo": CriticConfig(clip=0.2)}
# Overrides of keys outside a preset that its paper's values require.
NEEDS = {"dapo": ["rollout.max_response_tokens=20480"]}


def test_every_preset_has_expected_values_from_its_paper() -> None:
    assert {file.stem for file in FILES} == set(PAPERS)


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_preset_sets_its_papers_objective_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.yaml", RL)
    plain, preset = load_config(Config, path), load_config(Config, path, [f"presets={name}"])
    assert preset.objective == PAPERS[name]
    expected = {
        "objective": PAPERS[name],
        "reward": REWARDS.get(name, RewardConfig()),
        "rollout": plain.rollout.model_copy(update={"dynamic_sampling": DYNAMIC_SAMPLING.get(name)}),
        "critic": CRITICS.get(name),
        "merged_presets": (name,),
    }
    assert preset == plain.model_copy(update=expected)


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_preset_has_no_contradictions(tmp_path: Path, name: str) -> None:
    overrides = [f"presets={name}", *NEEDS.get(name, [])]
    roomy = dataclasses.replace(ARCHITECTURE, max_position_embeddings=32768)
    check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides), roomy, 1)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_preset_file_is_short_and_names_its_objective_without_nulls(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 8
    assert "null" not in "".join(lines)
    values = yaml.safe_load(file.read_text())
    assert values["objective"].keys() >= {"ratio", "clip", "aggregation", "advantage"}
    assert "kind" in values["objective"]["clip"]
    assert "estimator" in values["objective"]["advantage"]
    assert values.keys() <= {"objective", "reward", "rollout", "critic"}
    # Settings of verifiers and servers do not belong to an objective.
    assert values.get("reward", {}).keys() <= {"correct", "wrong", "overlong_cache", "overlong_filter"}
    assert values.get("rollout", {}).keys() <= {"dynamic_sampling"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """The configuration of each preset."""
    path = write(tmp_path_factory.mktemp("alone") / "a.yaml", RL)
    return {name: load_config(Config, path, [f"presets={name}"]) for name in PAPERS}


@pytest.mark.parametrize("first", sorted(PAPERS))
def test_a_second_preset_removes_every_setting_of_the_first(
    alone: dict[str, Config], tmp_path: Path, first: str
) -> None:
    path = write(tmp_path / "a.yaml", RL)
    for name in sorted(PAPERS):
        notes: list[str] = []
        over = load_config(Config, path, [f"presets=[{first}, {name}]"], notes)
        assert over == alone[name].model_copy(update={"merged_presets": (first, name)})
        dropped = first == "ppo" and name != "ppo"
        assert len(notes) == dropped, notes
        assert all(note.startswith("critic: does nothing under objective.advantage.estimator group;") for note in notes)


@pytest.mark.parametrize(
    ("name", "kl"),
    [
        ("grpo", KL(kind="k3", place="loss", beta=0.04)),
        ("rloo", KL(kind="k1", place="reward", beta=0.03)),
    ],
)
def test_the_kl_setting_in_a_presets_comment_loads(tmp_path: Path, name: str, kl: KLConfig) -> None:
    comment = (PRESETS / f"{name}.yaml").read_text()
    found = re.search(r"objective\.kl (\{.*\})", comment)
    assert found
    path = write(tmp_path / "a.yaml", RL + f"presets: [{name}]\nobjective: {{kl: {found[1]}}}\n")
    config = load_config(Config, path)
    assert config.objective == PAPERS[name].model_copy(update={"kl": kl})
    check_config(config, ARCHITECTURE, 1)


def test_the_readme_lists_the_presets_and_each_has_a_demo() -> None:
    text = (ROOT / "README.md").read_text().split("Built-in presets are ")[1].split(". Keys in your file")[0]
    assert sorted(re.split(r",\s+|\s+and\s+", text)) == sorted(PAPERS)
    assert {file.stem for file in CONFIGS.glob("*.yaml")} >= set(PAPERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_preset_names_its_source(file: Path) -> None:
    assert re.match(r"# .*\[\d{4}\.\d{5}", file.read_text())


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_preset_overrides_every_objective_key_of_earlier_presets(tmp_path: Path, name: str) -> None:
    write(
        tmp_path / "other.yaml",
        "objective: {ratio: sequence-token, denominator: rollout, clip: {kind: tapered, low: 0.9, high: 9}, "
        "aggregation: constant-length, constant_length: 9, advantage: {baseline: none, std: none}, "
        "correction: {kind: mis, level: sequence, low: 9, high: 9}, kl: {kind: k1, beta: 9}, "
        "router_shift: 0.9, centering: {top_k: 9}, custom: a:b}\n",
    )
    path = write(tmp_path / "a.yaml", RL + f"presets: [other.yaml, {name}]\n")
    assert load_config(Config, path).objective == PAPERS[name]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_examples_load_without_contradictions_and_run_on_cpus(file: Path) -> None:
    """`make install` has SGLang without its GPU kernels, and the machine may have a GPU."""
    if file.stem == "base":
        with pytest.raises(ConfigError, match=r"base\.yaml: run_dir: not set, and it has no default$"):
            load_config(Config, file)
    else:
        config = load_config(SftConfig, file) if file.stem == "sft" else load_config(Config, file)
        check_config(config, ARCHITECTURE, 2)
        assert config.engine.device == "cpu"
