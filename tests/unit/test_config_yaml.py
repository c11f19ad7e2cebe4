"""Values in files and overrides follow YAML 1.2's core schema, with limits."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import RL, write

from megatron_rl.config.load import ConfigError, load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.sources import MAX_PRESETS
from megatron_rl.config.yaml12 import MAX_BYTES, MAX_DEPTH, YamlError, read_yaml, resolve_scalar, write_yaml


def read(text: str) -> Any:
    problems: list[str] = []
    value, _ = read_yaml(text, lambda line: f"f:{line}", problems)
    assert problems == []
    return value


def refused(text: str) -> str:
    with pytest.raises(YamlError) as caught:
        read(text)
    return str(caught.value)


# The examples of https://yaml.org/spec/1.2.2/#103-core-schema, and values that version 1.1 reads differently.
@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[(text, None) for text in ("", "~", "null", "Null", "NULL")],
        *[(text, True) for text in ("true", "True", "TRUE")],
        *[(text, False) for text in ("false", "False", "FALSE")],
        *[(text, text) for text in ("yes", "no", "on", "off", "y", "n", "Yes", "OFF", "nUll", "tRUE")],
        *[("0", 0), ("-19", -19), ("+12", 12), ("010", 10), ("-007", -7), ("0o7", 7), ("0o10", 8), ("0x3A", 58)],
        *[(text, text) for text in ("1:30", "1:30:00", "190:20:30.15", "1_000", "0b1010", "0o8", "0x", "-0x1", "١٢")],
        *[("0.", 0.0), ("-0.0", -0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -2e5), ("1e-5", 1e-5)],
        *[(text, math.inf) for text in (".inf", ".Inf", "+.INF")],
        *[("-.inf", -math.inf), ("inf", "inf"), ("nan", "nan"), ("1e", "1e"), (".", "."), ("1.5.2", "1.5.2")],
        *[(text, text) for text in ("2026-01-31", "2026-01-31 10:20:30Z", "=", "a<<")],
        *[("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63))],
    ],
)
def test_scalars_follow_the_yaml_core_schema(written: str, value: Any) -> None:
    found = read(written)
    assert (type(found), found) == (type(value), value)
    assert math.copysign(1, found) == math.copysign(1, value) if isinstance(value, float) else True
    if written and written not in ("=",):
        assert read(f"[{written}]") == [value]
    assert read(f'"{written}"') == read(f"'{written}'") == read(f"!!str {written}") == written


@pytest.mark.parametrize("written", [".nan", ".NaN", ".NAN"])
def test_nan_is_read_as_not_a_number(written: str) -> None:
    assert math.isnan(read(written))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 9223372036854775808", "f:1: a: found an integer of 19 digits, expected at most 64 bits"),
        ("a: " + "9" * 5000, "f:1: a: found an integer of 5000 digits"),
        ("a: 0x" + "f" * 17, "f:1: a: found an integer of 19 digits"),
        ("a:\n- 0o" + "7" * 5000, "f:2: a.0: found an integer of 5002 digits"),
        ("a: !!int ''", "f:1: a: found the tag !!int, expected a plain value"),
        ("a: !!float x", "f:1: a: found the tag !!float"),
        ("a: !!bool ", "f:1: a: found the tag !!bool"),
        ("a: !!timestamp x", "f:1: a: found the tag !!timestamp"),
        ("a: !!binary R0lG", "f:1: a: found the tag !!binary"),
        ("a: !!set {b}", "f:1: a: found the tag !!set"),
        ("a: !!python/object/apply:os.system [ls]", "f:1: a: found the tag !!python/object/apply:os.system"),
        ("a: !mine 1", "f:1: a: found the tag !mine"),
        ("!!int a: 1", "f:1: found the tag !!int"),
        ("a: b\0c", "f:1: not YAML: the character '\\x00' may not be in it"),
        ("a: 1\nb: \x07", "f:2: not YAML: the character '\\x07' may not be in it"),
        ('a: "b\\0c"', "f:1: a: found text with '\\x00' in it"),
        ('a: "\\ud800"', "f:1: a: found text with '\\ud800' in it"),
        ('a: "\\UFFFFFFFF"', "f:1: not YAML: "),
        ("a: &x [*x]", "f:1: a.0: an alias to what it is in"),
        ("a: &x {b: {c: *x}}", "f:1: a.b.c: an alias to what it is in"),
        ("a: &x {<<: *x}", "f:1: a: an alias to what it is in"),
        ("a: *b", "f:1: not YAML: found undefined alias 'b'"),
        ("a: {<<: 3}", "f:1: a: << merges sections of keys, and found something else"),
        ("a: " + "[" * 3000 + "]" * 3000, f"f:1: not YAML: nested more than {MAX_DEPTH} deep"),
        ("a: " + "{a: " * 3000, f"f:1: not YAML: nested more than {MAX_DEPTH} deep"),
        ("- " * 3000, f"f:1: not YAML: nested more than {MAX_DEPTH} deep"),
        ("a: 1\n--- \nb: 2", "f:2: not YAML: but found another document"),
        ("a:\tb:\n\t- 1", "f:1: not YAML: "),
        ("%YAML 9.9\n--- 1", "f:1: not YAML: found incompatible YAML document"),
        ("%YAML " + "9" * 5000 + ".1\n---\na: 1", "f:1: not YAML: "),
        ("[1]: 2", "f:1: found a key that is a list or a section, expected text"),
        ("{a: 1}: 2", "f:1: found a key that is a list or a section, expected text"),
        ("'': 2", "f:1: found the key '', which no key is called"),
        ("optim.lr: 1", "f:1: found the key 'optim.lr', which no key is called; in a file write the sections"),
        ('"a\\nb": 1', "f:1: found the key 'a\\nb'"),
        ("x" * (MAX_BYTES + 1), "f:1: more than 1048576 characters"),
    ],
)
def test_text_that_is_not_a_configuration_gives_one_error(text: str, told: str) -> None:
    found = refused(text)
    assert found.startswith(told)
    assert len(found) < 300


def test_nested_aliases_are_counted_before_they_are_expanded() -> None:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    for level in range(1, 12):
        keys = ", ".join(f"k{i}: *a{level - 1}" for i in range(9))
        lines.append(f"a{level}: &a{level} {{{keys}}}")
    started = time.process_time()
    assert "more than 10000 values, with aliases written out" in refused("\n".join(lines))
    assert time.process_time() - started < 2.0
    for empty in ("[]", "{}"):
        lists = [f"a0: &a0 {empty}", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 7))]
        assert "more than 10000 values, with aliases written out" in refused("\n".join(lists))
    merges = ["a0: &a0 {x: 1}"]
    merges += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9)]
    assert "more than 10000 values, with aliases written out" in refused("\n".join(merges))


def test_a_sections_own_keys_win_over_merged_keys() -> None:
    text = "base: &base {a: 1, b: 2}\nmore: &more {b: 3, c: 4}\nall: {c: 5, <<: [*base, *more]}\none: {<<: *more}\n"
    found = read(text)
    assert found["all"] == {"a": 1, "b": 2, "c": 5}
    assert found["one"] == {"b": 3, "c": 4}
    assert found["all"] == yaml.safe_load(text)["all"]


def test_a_key_keeps_its_line_through_a_merge() -> None:
    _, places = read_yaml("x: &x\n  a: 1\n  b: 2\ny:\n  b: 3\n  <<: *x\n", lambda line: f"f:{line}", [])
    assert places == {"x": "f:1", "x.a": "f:2", "x.b": "f:3", "y": "f:4", "y.a": "f:2", "y.b": "f:5"}


def test_a_key_that_is_given_twice_is_a_mistake() -> None:
    problems: list[str] = []
    read_yaml("a: {b: 1, b: 2}\n'a': 3\n", lambda line: f"f:{line}", problems)
    assert problems == ["f:1: a.b: given twice, also at f:1; keep one", "f:2: a: given twice, also at f:1; keep one"]


def test_keys_that_look_like_other_types_are_text() -> None:
    assert read("{on: 1, 1: 2, ~: 3, true: 4}") == {"on": 1, "1": 2, "~": 3, "true": 4}


@pytest.mark.parametrize("text", ["", "# nothing", "---", "--- \n...", "\ufeff# nothing"])
def test_an_empty_document_is_read_as_none(text: str) -> None:
    assert read(text) is None


def test_yaml_1_1_and_1_2_read_the_written_file_the_same() -> None:
    values = {"a": ["010", "1:30", "0o17", "1_000", "yes", "~", "1e5", "", "<<", "0x1F", "2026-01-31", "=", "1.5"]}
    assert yaml.safe_load(write_yaml(values)) == read(write_yaml(values)) == values
    numbers = {"a": [10, -3, 1e-5, 1.5, 1e300, 5e-324, True, None]}
    assert read(write_yaml(numbers)) == numbers


def test_scalars_resolve_without_a_document() -> None:
    assert resolve_scalar("010") == 10
    with pytest.raises(OverflowError):
        resolve_scalar("9" * 20)


# ---- in configurations -------------------------------------------------------------------------------------------


def mistakes(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, path, overrides)
    return str(caught.value)


def test_numbers_in_a_configuration_follow_yaml_1_2(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", RL + "seed: 010\nparallel: {tp: 0o10}\n")
    config = load_config(Config, path, ["rollout.group_size=020"])
    assert (config.seed, config.parallel.tp, config.rollout.group_size) == (10, 8, 20)
    assert mistakes(path, "rollout.deadline=1:30").endswith('rollout.deadline: found "1:30", expected a valid number')
    assert mistakes(path, "reward.overlong_filter=yes").endswith('found "yes", expected a valid boolean')
    assert mistakes(path, "train.steps=1_000").endswith('train.steps: found "1_000", expected a valid integer')


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("presets=0", "presets: found 0, expected a list of names or files"),
        ("presets=false", "presets: found false, expected a list"),
        ("presets=''", "presets: found '', expected one of "),
        ("presets={}", "presets: found {}, expected a list"),
        ("presets=[[grpo]]", 'presets: found [["grpo"]], expected a list'),
        ("presets=../presets/grpo", "presets: found '../presets/grpo', expected one of "),
        ("presets=" + "a" * 3000, "presets: found 'aaaa"),
        ("presets=" + "a" * 3000 + ".yaml", "presets: found 'aaaa"),
        ("presets=/dev/zero.yaml", "presets: found '/dev/zero.yaml', expected an existing file"),
        ("weights.timeout=1e15", "weights.timeout: found 1000000000000000.0, expected a value less than or equal to"),
        ("rollout.deadline=1e15", "rollout.deadline: found 1000000000000000.0, expected a value less than"),
        ("train.steps=9999999999", "train.steps: found 9999999999, expected a value less than or equal to 2147483647"),
        ("seed=4294967296", "seed: found 4294967296, expected a value less than or equal to 2147483647"),
        ("optim.lr=1e300", "optim.lr: found 1e+300, expected a value less than or equal to 100"),
        ("rollout.temperature=1e-9", "rollout.temperature: found 1e-09, expected a value greater than or equal to"),
        ("reward.wrong=-1e39", "reward.wrong: found -1e+39, expected a value greater than or equal to -1000000"),
        ("optim.lr=1e999", "optim.lr: found Infinity, expected a"),
        ("optim.lr=.nan", "optim.lr: found NaN, expected a"),
        ("rollout.servers.urls=[x]", 'rollout.servers.urls: found ["x"], expected a URL such as http://host:30000'),
        ("rollout.servers.urls=[http://h:99999]", "rollout.servers.urls: found"),
        ("rollout.servers.urls=[http://h:x]", "rollout.servers.urls: found"),
        ("rollout.servers.urls=['http://h:1/?a=b']", "rollout.servers.urls: found"),
        ("rollout.servers.urls=['http://h h:1']", "rollout.servers.urls: found"),
        ("rollout.servers.urls=['http://:1']", "rollout.servers.urls: found"),
        ("rollout.servers.urls=['http://[::1:1']", "rollout.servers.urls: found"),
        ("rollout.servers.urls=['ftp://h:1']", "rollout.servers.urls: found"),
        ("rollout.servers.urls=[http://h:1, HTTP://H:1/]", "expected each server once"),
        ("rollout.servers.urls=[http://h, http://h:80]", "expected each server once"),
        (".".join("abcdefghijklmnopqrstuvwxyz") + "=1", "expected key=value, such as optim.lr=1e-5"),
        ("a\nb=1", "expected key=value, such as optim.lr=1e-5"),
        ("model.path=\ud800", "not YAML: the character '\\ud800' may not be in it"),
    ],
)
def test_the_error_for_a_senseless_value_names_its_key(tmp_path: Path, override: str, told: str) -> None:
    found = mistakes(write(tmp_path / "a.yaml", RL), override)
    assert told in found
    assert "\n" not in found
    assert len(found) < 700


@pytest.mark.parametrize(
    "url",
    [
        "http://h:1",
        "https://a.b-c:443/sglang/0",
        "http://[::1]:30000",
        "http://10.0.0.1",
        "http://h_1:8/",
        "HTTP://H:1",
    ],
)
def test_valid_server_urls_are_accepted(tmp_path: Path, url: str) -> None:
    config = load_config(Config, write(tmp_path / "a.yaml", RL), [f"rollout.servers.urls=['{url}']"])
    assert config.rollout.servers.urls == (url,)


@pytest.mark.parametrize(
    "override",
    ["rollout.servers.urls=['http://me:SECRET@h:1']", "rollout.servers.api_key_env=sk-SECRET"],
)
def test_errors_do_not_show_a_secret_in_the_wrong_place(tmp_path: Path, override: str) -> None:
    path = write(
        tmp_path / "a.yaml", RL + f"rollout: {{servers: {{{override.rpartition('.')[2].replace('=', ': ')}}}}}"
    )
    found = mistakes(path)
    assert found.startswith(f"{path}:5: rollout.servers.")
    assert "SECRET" not in found


def test_too_many_merged_presets_are_refused_quickly(tmp_path: Path) -> None:
    """Each of 39 files names the previous one twice, so merging all would take 2**39 steps."""
    write(tmp_path / "p0.yaml", "seed: 1\n")
    for n in range(1, 40):
        write(tmp_path / f"p{n}.yaml", f"presets: [p{n - 1}.yaml, p{n - 1}.yaml]\n")
    found = mistakes(write(tmp_path / "a.yaml", RL + "presets: [p39.yaml]\n"))
    assert f"merges more than {MAX_PRESETS} presets; name fewer" in found


def test_an_endless_device_file_is_refused() -> None:
    assert mistakes(Path("/dev/zero")).startswith("/dev/zero:1: ")


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + RL.encode())
    assert load_config(Config, path).train.steps == 3


def test_a_file_with_many_mistakes_lists_only_the_first_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "".join(f"key{n}: 1\n" for n in range(5000)))
    lines = mistakes(path).splitlines()
    assert len(lines) == 51
    assert lines[-1] == "and more than 50 mistakes in all; fix these first"
