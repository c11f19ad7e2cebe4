"""Loading a configuration: the order of precedence, and one clear line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from config_files import RL, SFT, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_rl.config.load import ConfigError, dump_config, load_config
from megatron_rl.config.schema import Config, CriticConfig, RolloutConfig, SftConfig
from megatron_rl.config.sources import PRESETS, shown

BUILT_IN = ", ".join(sorted(file.stem for file in PRESETS.glob("*.yaml")))


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, path, overrides)
    return str(caught.value).splitlines()


# ---- precedence ------------------------------------------------------------------------------------------------


def test_defaults_apply_and_paths_are_relative_to_the_current_directory(tmp_path: Path) -> None:
    config = load_config(Config, write(tmp_path / "a.yaml", RL))
    assert config.run_dir == Path("runs/one")
    assert config.model.path == Path("model")
    assert config.rollout == RolloutConfig()


def test_an_sft_configuration_loads_and_rejects_rl_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", SFT)
    assert load_config(SftConfig, path, ["batch_size=8"]).batch_size == 8
    with pytest.raises(ConfigError, match=r"grpo\.yaml:\d+: objective: no such key"):
        load_config(SftConfig, path, ["presets=grpo"])


def test_overrides_win_over_the_file_which_wins_over_presets(tmp_path: Path) -> None:
    write(tmp_path / "inner.yaml", "seed: 1\noptim: {lr: 1, min_lr: 1, clip_grad: 1, eps: 1}\n")
    write(tmp_path / "outer.yaml", "presets: [inner.yaml]\noptim: {lr: 2, min_lr: 2, clip_grad: 2}\n")
    path = write(tmp_path / "a.yaml", RL + "presets: [outer.yaml]\noptim: {lr: 3, min_lr: 3}\n")
    config = load_config(Config, path, ["optim.lr=4"])
    optim = config.optim
    assert (config.seed, optim.eps, optim.clip_grad, optim.min_lr, optim.lr) == (1, 1, 2, 3, 4)


def test_the_later_preset_and_the_later_override_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", RL + "presets: [grpo, gspo]\n")
    config = load_config(Config, path, ["seed=1", "seed=2"])
    assert config.objective.ratio == "sequence"
    assert config.seed == 2


@pytest.mark.parametrize("presets", ["presets=[gspo]", "presets=gspo"])
def test_presets_named_by_an_override_replace_the_files(tmp_path: Path, presets: str) -> None:
    write(tmp_path / "base.yaml", "seed: 7\n")
    path = write(tmp_path / "a.yaml", RL + "presets: [base.yaml]\n")
    config = load_config(Config, path, [presets])
    assert (config.seed, config.objective.ratio) == (0, "sequence")


def test_a_preset_file_is_relative_to_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "sub" / "base.yaml", "presets: [../other/deep.yaml]\n")
    write(tmp_path / "other" / "deep.yaml", "seed: 5\n")
    path = write(tmp_path / "top" / "sub" / "a.yaml", RL + "presets: ../../sub/base.yaml\n")
    assert load_config(Config, path).seed == 5
    monkeypatch.chdir(tmp_path / "other")
    assert load_config(Config, path, ["presets=deep.yaml"]).seed == 5


def test_an_override_sets_a_whole_section_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", RL + "optim: {lr: 2, clip_grad: 3}\n")
    optim = load_config(Config, path, ["optim={lr: 1}"]).optim
    assert (optim.lr, optim.clip_grad) == (1, 3)


def test_an_override_does_not_reach_another_section_through_an_alias(tmp_path: Path) -> None:
    text = RL + "rollout: {servers: &shared {}, max_response_tokens: 5}\n"
    path = write(tmp_path / "a.yaml", text.replace("steps: 3", "<<: {steps: 3}") + "eval: &e {samples: 1}\n")
    assert load_config(Config, path, ["rollout.servers.launch=2"]).train.steps == 3
    write(tmp_path / "base.yaml", "engine: &x {}\nparallel: *x\n")
    path = write(tmp_path / "b.yaml", RL + "presets: base.yaml\n")
    config = load_config(Config, path, ["parallel.tp=2"])
    assert config.parallel.tp == 2


@pytest.mark.parametrize(
    ("written", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), (".5e-3", 5e-4), ("2", 2.0), ("1.5e1", 15.0)]
)
def test_numbers_are_read_in_every_common_notation(tmp_path: Path, written: str, value: float) -> None:
    path = write(tmp_path / "a.yaml", RL + f"optim: {{lr: {written}}}\n")
    assert load_config(Config, path).optim.lr == value
    assert load_config(Config, path, [f"optim.clip_grad={written}"]).optim.clip_grad == value


@pytest.mark.parametrize("text", ["2026-01-31", "2026-01-31 10:20:30Z"])
def test_a_date_is_read_as_text(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", RL.replace("runs/one", text))
    assert load_config(Config, path).run_dir == Path(text)


@pytest.mark.parametrize("key", ["run_dir", "model.path", "rollout.replay_from", "rollout.servers.urls_file"])
def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "a.yaml", RL)
    assert load_config(Config, path, [f"{key}=runs/{'a' * 255}/{'b' * 255}"])
    for long, expected in (
        ("runs/" + "é" * 128, "whose names have at most 255 bytes each"),
        ("a/" * 2048 + "a", "of at most"),
    ):
        (line,) = mistakes(path, f"{key}={long}")
        assert f"{key}: found {shown(long)}, expected a path {expected}" in line


@pytest.mark.parametrize("empty", ["null", ""])
def test_an_override_clears_an_optional_key(tmp_path: Path, empty: str) -> None:
    path = write(tmp_path / "a.yaml", RL.replace("prompts.jsonl", "prompts.jsonl, heldout: x.jsonl"))
    assert load_config(Config, path, [f"data.heldout={empty}"]).data.heldout is None


# ---- dump_config -----------------------------------------------------------------------------------------------


def test_a_dump_has_the_presets_merged_in(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 7\n")
    config = load_config(Config, write(tmp_path / "a.yaml", RL + "presets: [base.yaml, gspo]\n"))
    assert config.presets == ()
    assert load_config(Config, write(tmp_path / "elsewhere" / "b.yaml", dump_config(config))) == config


def test_the_names_of_merged_presets_are_kept(tmp_path: Path) -> None:
    deep = write(tmp_path / "deep.yaml", "seed: 1\n")
    base = write(tmp_path / "base.yaml", "presets: [deep.yaml, grpo]\nseed: 2\n")
    path = write(tmp_path / "a.yaml", RL + "presets: [base.yaml, gspo]\n")
    config = load_config(Config, path)
    assert config.merged_presets == (str(deep), "grpo", str(base), "gspo")
    assert load_config(Config, path, ["presets=dapo"]).merged_presets == ("dapo",)
    assert load_config(SftConfig, write(tmp_path / "sft.yaml", SFT), [f"presets={deep}"]).merged_presets == (str(deep),)

    # A dump names its presets but does not need them, as it contains their values.
    deep.unlink()
    dumped = write(tmp_path / "dump.yaml", dump_config(config).replace("seed: 2", "seed: 3"))
    again = load_config(Config, dumped)
    assert again == config.model_copy(update={"seed": 3})
    other = load_config(Config, write(tmp_path / "b.yaml", "presets: [dump.yaml, dapo]\n"))
    assert other.merged_presets == (*config.merged_presets, str(dumped), "dapo")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(st.text(), st.from_regex(r"[-+]?[0-9]*\.?[0-9]*([eE][-+]?[0-9]+)?", fullmatch=True)),
    number=st.floats(min_value=1e-300, max_value=1e12),
    flags=st.lists(st.text(max_size=8), max_size=3),
)
@example(text="1e-5", number=1e-5, flags=["\x85"])
@example(text="0o17", number=1e-5, flags=["010", "1_000", "yes", "0x1F", "~", "<<", "=", ".inf", "1:30"])
def test_a_dump_loads_back_to_the_same_object(tmp_path: Path, text: str, number: float, flags: list[str]) -> None:
    config = Config.model_validate(
        {
            "run_dir": "x/" + text.replace("\0", "0"),
            "model": {"path": "m"},
            "data": {"train": text.replace("\0", "0"), "heldout": "1e-5"},
            "train": {"steps": 1},
            "optim": {"clip_grad": number},
            "rollout": {"servers": {"extra_flags": [flag.replace("\0", "0") for flag in flags]}},
        }
    )
    assert load_config(Config, write(tmp_path / "a.yaml", dump_config(config))) == config


def test_a_partly_set_section_keeps_its_other_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", RL + "critic: {optim: {betas: [0.9, 0.99]}}\n")
    critic = load_config(Config, path).critic
    assert critic is not None
    assert critic.optim.lr == CriticConfig().optim.lr == 1e-5


# ---- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lrr: 1}", "{path}:5: optim.lrr: no such key; did you mean optim.lr?"),
        ("optm: {lr: 1}", "{path}:5: optm: no such key; did you mean optim?"),
        ("eval: {temperatur: 1}", "{path}:5: eval.temperatur: no such key; did you mean eval.temperature?"),
        ("critic: {warmup_step: 1}", "{path}:5: critic.warmup_step: no such key; did you mean critic.warmup_steps?"),
        ("learning: 1", "{path}:5: learning: no such key"),
        ("rollout:\n  urls: [x]", "{path}:6: rollout.urls: no such key; did you mean rollout.servers.urls?"),
        ("engine: {on: 1}", "{path}:5: engine.on: no such key"),
        ("optim: {lr: fast}", '{path}:5: optim.lr: found "fast", expected a valid number'),
        ("optim: {lr: -1}", "{path}:5: optim.lr: found -1, expected a value greater than 0"),
        ("optim: {lr: true}", "{path}:5: optim.lr: found true, expected a valid number"),
        ("optim: {lr: .inf}", "{path}:5: optim.lr: found Infinity, expected a finite number"),
        ("optim: {betas: 0.9}", "{path}:5: optim.betas: found 0.9, expected a list"),
        ("optim: {betas: [0.9, 1.5]}", "{path}:5: optim.betas.1: found 1.5, expected a value less than 1"),
        ("optim:", "{path}:5: optim: found null, expected a section of keys"),
        ("parallel: {tp: '2'}", '{path}:5: parallel.tp: found "2", expected a valid integer'),
        ("parallel: {tp: true}", "{path}:5: parallel.tp: found true, expected a valid integer"),
        ("parallel: {tp: 1.5}", "{path}:5: parallel.tp: found 1.5, expected a valid integer"),
        ("parallel: {tp: 0}", "{path}:5: parallel.tp: found 0, expected a value greater than or equal to 1"),
        ("seed: -1", "{path}:5: seed: found -1, expected a value greater than or equal to 0"),
        ("engine: {dtype: fp16}", "{path}:5: engine.dtype: found \"fp16\", expected 'fp32' or 'bf16'"),
        ("train: {recompute_old_logprobs: 1, steps: 1}", None),
        ("presets: 3", "{path}:5: presets: found 3, expected a list of names or files"),
        ("merged_presets: 3", "{path}:5: merged_presets: found 3, expected a list of names or files"),
        ("presets: [grppo]", "{path}:5: presets: found 'grppo', expected one of " + BUILT_IN + ", or a .yaml file"),
        ("presets: [b.yaml]", "{path}:5: presets: found 'b.yaml', expected an existing file"),
        ("seed: 1\nseed: 2", "{path}:6: seed: given twice, also at {path}:5; keep one"),
        ("optim:\n  lr: 1\n  lr: 1", "{path}:7: optim.lr: given twice, also at {path}:6; keep one"),
    ],
)
def test_a_mistake_in_a_file_gives_one_line(tmp_path: Path, text: str, line: str | None) -> None:
    path = write(tmp_path / "a.yaml", RL + text + "\n")
    if line is None:
        path = write(path, RL.replace("steps: 3", "steps: 3, recompute_old_logprobs: 1"))
        line = "{path}:4: train.recompute_old_logprobs: found 1, expected a valid boolean"
    assert mistakes(path) == [line.format(path=path)]


@pytest.mark.parametrize(
    ("override", "rest"),
    [
        ("optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr?"),
        ("optim.lr=fast", 'optim.lr: found "fast", expected a valid number'),
        ("rollout.servers.api_key_env=123", "rollout.servers.api_key_env: found 123, expected text; put it in quotes"),
        ("seed.x=1", 'seed: found {"x": 1}, expected a valid integer'),
        ("optim=3", "optim: found 3, expected a section of keys"),
        ("model.path=null", "model.path: found null, expected text"),
        ("optim={lr: 1, lr: 2}", "optim.lr"),
        ("optim.lr", "expected key=value, such as optim.lr=1e-5"),
        ("=1", "expected key=value, such as optim.lr=1e-5"),
        ("optim..lr=1", "expected key=value, such as optim.lr=1e-5"),
        ("optim.lr =1", "expected key=value, such as optim.lr=1e-5"),
        ("optim.betas=[1", "not YAML: expected ',' or ']', but got '<stream end>'"),
        ("presets=ppoo", "presets: found 'ppoo', expected one of " + BUILT_IN + ", or a .yaml file"),
    ],
)
def test_the_error_for_a_wrong_override_quotes_it(tmp_path: Path, override: str, rest: str) -> None:
    if override.startswith("optim={"):
        rest = f"lr: given twice, also at override {override!r}; keep one"
    found = mistakes(write(tmp_path / "a.yaml", RL), override)
    assert found == [f"override {override!r}: {rest}"]


def test_each_missing_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train: {mini_batches: 1}\n")
    rest = "not set, and it has no default"
    assert mistakes(path) == [
        f"{path}: run_dir: {rest}",
        f"{path}: model.path: {rest}",
        f"{path}: data.train: {rest}",
        f"{path}: train.steps: {rest}",
    ]


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "optim: {lr: x}\nseed: 1\nseed: 2\n")
    path = write(tmp_path / "a.yaml", RL + "presets: [base.yaml, nil]\nengin: {}\neval: {samples: 0}\n")
    found = mistakes(path, "weights.rout=disk", "oops")
    starts = ["override 'oops'", f"{base}:3", f"{path}:5", f"{base}:1", f"{path}:6", f"{path}:7", "override 'weights.r"]
    assert len(found) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in found) == 1, (start, found)


@pytest.mark.parametrize("name", ["a.yaml", "../cycle/a.yaml", "b.yaml", "../cycle/b.yaml"])
def test_a_cycle_of_presets_is_an_error(tmp_path: Path, name: str) -> None:
    write(tmp_path / "cycle" / "b.yaml", "presets: ../cycle/a.yaml\n")
    path = write(tmp_path / "cycle" / "a.yaml", RL + f"presets: {name}\n")
    (found,) = mistakes(path)
    assert re.search(r"presets: '.*a\.yaml' leads back to itself: .*a\.yaml -> .*a\.yaml$", found)


def test_a_preset_may_be_included_by_two_other_presets(tmp_path: Path) -> None:
    write(tmp_path / "top.yaml", "seed: 3\n")
    write(tmp_path / "left.yaml", "presets: top.yaml\n")
    write(tmp_path / "right.yaml", "presets: top.yaml\n")
    path = write(tmp_path / "a.yaml", RL + "presets: [left.yaml, right.yaml]\n")
    assert load_config(Config, path).seed == 3


@pytest.mark.parametrize(
    ("content", "rest"),
    [
        (b"a: [1\nb: 2\n", ":2: not YAML: expected ',' or ']'"),
        (b"- 1\n", ": found [1], expected keys and values"),
        (b"a: \xff\n", ": cannot be read as text:"),
        (b"a: &x {b: *x}\n", ":1: a.b: an alias to what it is in"),
        (b"? [1, 2]\n: 3\n", ":1: found a key that is a list or a section, expected text"),
        (b"a: 1\n---\nb: 2\n", ":2: not YAML: but found another document"),
        (
            b"a: !!python/object:os.system {}\n",
            ":1: a: found the tag !!python/object:os.system, expected a plain value",
        ),
    ],
)
def test_a_file_that_is_not_a_configuration_is_an_error(tmp_path: Path, content: bytes, rest: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    assert mistakes(path)[0].startswith(f"{path}{rest}")


def test_a_missing_configuration_file_is_an_error(tmp_path: Path) -> None:
    assert mistakes(tmp_path / "a.yaml") == [f"{tmp_path / 'a.yaml'}: no such file; expected a YAML configuration"]
    assert mistakes(tmp_path)[0].startswith(f"{tmp_path}: cannot be read as text: ")


def test_an_empty_file_lacks_every_required_key(tmp_path: Path) -> None:
    assert len(mistakes(write(tmp_path / "a.yaml", ""))) == 4
