"""Random configurations: each is refused by one ConfigError, or read with the meaning of YAML 1.2."""

from __future__ import annotations

import collections
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from config_files import ARCHITECTURE, RL, write
from fuzzing import drawing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_rl.config.load import ConfigError, check_config, dump_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.sections import sections_of_kinds
from megatron_rl.config.sources import PRESETS
from megatron_rl.errors import UserError

# Scalars and their meaning in YAML 1.2, from the specification's examples.
SCALARS: list[tuple[str, Any]] = [
    *[("0", 0), ("1", 1), ("2", 2), ("8", 8), ("010", 10), ("0o10", 8), ("0x10", 16), ("+3", 3), ("-1", -1)],
    *[("1:30", "1:30"), ("1_000", "1_000"), ("0b11", "0b11"), ("yes", "yes"), ("off", "off"), ("2026-01-31",) * 2],
    *[("true", True), ("FALSE", False), ("tRUE", "tRUE"), ("~", None), ("null", None), ("", None), ("nil", "nil")],
    *[("1e-5", 1e-5), (".5", 0.5), ("1.", 1.0), ("0.2", 0.2), ("1e15", 1e15), ("1e-320", 1e-320), ("9e9", 9e9)],
    *[("'010'", "010"), ('"true"', "true"), ("!!str 7", "7"), ('"\\u00e9"', "é"), ("x y", "x y"), ("1e", "1e")],
    *[("none", "none"), ("grpo", "grpo"), ("auto", "auto"), ("min", "min"), ("token", "token"), ("[1, 010]", [1, 10])],
    *[("[]", []), ("[http://h:1]", ["http://h:1"]), ("[0.9, 0.95]", [0.9, 0.95])],
]
ODD = [
    *[
        ".inf",
        "-.INF",
        ".nan",
        "9" * 20,
        "9" * 5000,
        "0x" + "f" * 40,
        "1e999",
        "-0.0",
        "-",
        "?",
        ":",
        "{",
        "}",
        "[",
        "]",
    ],
    *["!!int ''", "!!float :1", "!!bool ", "!!timestamp x", "!!binary x", "!!python/name:os.system", "!x y", "!", "&a"],
    *["&a [*a]", "*a", "{<<: *a}", "&a {<<: *a}", "<<", "{<<: {a: 1}}", "{a: 1, a: 2}", "[[[[1]]]]", "[" * 3000],
    *["{a: " * 200, '"\\ud800"', '"\\0"', '"\\UFFFFFFFF"', "\0", "\ufeff", "\u2028", "\t", "- 1", "a: b", "| x", ">"],
    *["---", "...", "%YAML 1.1", "# x", "\r", "\x85", "a" * 3000, "a" * 300 + ".yaml", "/dev/zero", "../x.yaml", "'"],
]
BASE = RL + (
    "parallel: {tp: 2, ep: 4}\nengine: {device: cpu, dtype: fp32, max_tokens_per_micro_batch: 96}\n"
    "optim: {lr: 1.0e-3, betas: [0.9, 0.95], schedule: linear, decay_steps: 10}\n"
    "rollout: &r\n  prompts_per_step: 8\n  servers: {urls: ['http://h:1'], extra_flags: []}\n"
    "objective:\n  clip: {low: 0.2, high: 0.28}\npresets: [grpo]\n"
)


def keys(cls: Any, prefix: str = "") -> list[str]:
    found = []
    for name, info in cls.model_fields.items():
        found.append(prefix + name)
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and hasattr(kind, "model_fields"):
                found += keys(kind, f"{prefix}{name}.")
    return found


KEYS = sorted(set(keys(Config)))
KINDS = sections_of_kinds(Config)
PRESET_NAMES = sorted(file.stem for file in PRESETS.glob("*.yaml"))
VALUES: dict[str, list[Any]] = {
    "low": [0.1, 0.3, None],
    "high": [0.5, 2, None],
    "negative_low": [0.1, 0.3, None],
    "negative_high": [0.5, 2, None],
    "targets": [["expert"], ["attention", "mlp"], None],
    "scale": ["block", "tensor"],
    "size": [0.01, 1],
    "dual": [3, None],
    "level": ["token", "sequence", "geometric"],
    "place": ["loss", "reward"],
    "baseline": ["mean", "leave-one-out", "none"],
    "std": ["sample", "none"],
    "gamma": [1, 0.9],
    "gae_lambda": [0, 1],
    **{key: [0.1, 1] for key in ("tau_positive", "tau_negative", "delta", "beta")},
}
"""For each key of a kind, values that at least one kind accepts."""
scalars = st.sampled_from(SCALARS)
texts = st.one_of(scalars.map(lambda pair: pair[0]), st.sampled_from(ODD), st.text(max_size=20))
names = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda key: key + "x"), st.text(max_size=8))
SENSIBLE = [
    *["seed=010", "train.steps=0o10", "rollout.group_size=0x10", "optim.lr=.5", "optim.eps=1e-5", "optim.lr=1."],
    *["data.train=1:30", "data.verifier=yes", "data.prompt_field=1_000", "data.verifier='010'", "data.heldout=~"],
    *["data.train=2026-01-31", "engine.recompute=none", "objective.custom=1e", "data.chat_template=true"],
    *["rollout.servers.extra_flags=[]", "optim.betas=[0.9, 0.95]", "model.path=!!str 7", "data.verifier="],
    *["objective.clip.low=0.2", "parallel.tp=+3", "objective.ratio=token", "eval.samples=8", "run_dir=x y"],
]
overrides = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), scalars.map(lambda pair: pair[0])),
        st.tuples(names, texts),
    ).map("=".join),
    max_size=3,
)


@st.composite
def kinds(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Draws a section with kinds: mostly complete, sometimes without its kind or with a key of another kind."""
    section = draw(st.sampled_from(sorted(KINDS)))
    its = KINDS[section]
    kind = draw(st.sampled_from(sorted(its.members)))
    names = [name for name in its.members[kind].model_fields if name != its.name]
    others = sorted({name for member in its.members.values() for name in member.model_fields} - {*names, its.name})
    if others and draw(st.integers(0, 5)) == 0:
        names.append(draw(st.sampled_from(others)))
    values = {name: draw(st.sampled_from(VALUES[name])) for name in names if draw(st.integers(0, 9))}
    return section, ({its.name: kind} if draw(st.integers(0, 5)) else {}) | values


@st.composite
def layers_of_kinds(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draws presets, and sections with kinds over them in the file and in the overrides."""
    presets = draw(st.lists(st.sampled_from(PRESET_NAMES), max_size=2))
    in_file = dict(draw(st.lists(kinds(), max_size=3)))
    inner = {section.partition(".")[2]: values for section, values in in_file.items()}
    text = RL + f"presets: {json.dumps(presets)}\nobjective: {json.dumps(inner)}\n"
    overrides = []
    for section, values in draw(st.lists(kinds(), max_size=2)):
        if draw(st.booleans()):
            overrides.append(f"{section}={json.dumps(values)}")
        else:
            overrides += [f"{section}.{name}={json.dumps(value)}" for name, value in values.items()]
    return text, overrides


trees = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.integers(0, 9), st.floats(), st.text(max_size=8)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([k.rpartition(".")[2] for k in KEYS]), inner)
    ),
    max_leaves=8,
)


@st.composite
def edited(draw: st.DrawFn) -> str:
    """Draws the base text with a few pieces removed, added or moved."""
    text = BASE
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        piece = draw(st.one_of(st.just(""), texts, st.just(text[start:end] * 2)))
        text = text[:start] + piece + text[end:]
    return text


@st.composite
def overlaid(draw: st.DrawFn) -> str:
    """Draws the base with one more section of any values, in JSON."""
    key = draw(st.sampled_from([k for k in KEYS if "." not in k and f"\n{k}:" not in f"\n{BASE}"]))
    return BASE + f"{key}: {json.dumps(draw(trees), ensure_ascii=draw(st.booleans()))}\n"


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Draws (file, overrides).

    A third is mostly valid, to test accepted ones too. In a third only the file or only the overrides are random.
    Some are layers of sections with kinds.
    """
    whole = st.sampled_from([BASE, RL])
    sensible = st.lists(st.sampled_from(SENSIBLE), max_size=4)
    anything = st.one_of(edited(), overlaid(), texts)
    kind = draw(st.sampled_from("sseabokk"))
    if kind == "k":
        return draw(layers_of_kinds())
    return draw(anything if kind in "eb" else whole), draw(overrides if kind in "ob" else sensible)


def check(directory: Path, text: str, given_overrides: list[str]) -> str:
    """Loads a configuration; returns `accepted`, `contradicts` (check_config refuses it) or `refused`."""
    path = write(directory / "a.yaml", "")
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.process_time()
    try:
        config = load_config(Config, path, given_overrides)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines, "an error without a message"
        assert all(line.startswith((str(path), "override ", "and more than", str(PRESETS))) for line in lines), lines
        assert max(map(len, lines)) < 1000
        return "refused"
    finally:
        assert time.process_time() - started < 5.0
    dumped = write(directory / "b.yaml", dump_config(config))
    assert load_config(Config, dumped) == config
    _check_kinds(config)
    _check_overrides(config, given_overrides)
    try:
        check_config(config, ARCHITECTURE, 8)
    except UserError:
        return "contradicts"
    return "accepted"


def _check_kinds(config: Config) -> None:
    """Checks that a section with kinds has exactly the keys of its own kind."""
    values = config.model_dump(mode="json")
    for section, its in KINDS.items():
        found = functools.reduce(lambda node, key: node[key], section.split("."), values)
        assert found.keys() == its.members[found[its.name]].model_fields.keys()


def _check_overrides(config: Config, given_overrides: list[str]) -> None:
    """Checks the last override of each key or of a section around it, if SCALARS has its meaning."""
    meaning = dict(SCALARS)
    values = config.model_dump(mode="json")
    for number, override in enumerate(given_overrides):
        key, _, written = override.partition("=")
        later = [o.partition("=")[0] for o in given_overrides[number + 1 :]]
        related = any(other == key or other.startswith(f"{key}.") or key.startswith(f"{other}.") for other in later)
        if written not in meaning or related or key in ("presets", "merged_presets"):
            continue
        found: Any = values
        for part in key.split("."):
            found = found[part]
        expected = meaning[written]
        if isinstance(found, Mapping):
            continue  # a section cannot be a scalar: the key was refused, or null stands for an absent section
        same_type = isinstance(found, bool) == isinstance(expected, bool)
        assert found == expected, f"{override!r} became {found!r}"
        assert same_type, f"{override!r} became {found!r}"


def run(directory: Path, examples: int) -> collections.Counter[str]:
    outcomes: collections.Counter[str] = collections.Counter()

    @settings(drawing(examples), phases=(Phase.generate,))
    @given(cases())
    def each(case: tuple[str, list[str]]) -> None:
        outcomes[check(directory, *case)] += 1

    each()
    return outcomes


def test_random_configurations_are_refused_or_read_correctly(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 200)
    assert outcomes["refused"] > 50
    assert outcomes["accepted"] + outcomes["contradicts"] > 30


@pytest.mark.slow
def test_many_random_configurations_are_refused_or_read_correctly(tmp_path: Path) -> None:
    outcomes = run(tmp_path, 10_000)
    print(dict(outcomes))
    assert sum(outcomes.values()) >= 9_000
    assert outcomes["accepted"] + outcomes["contradicts"] > 1_000
