"""Parses a command of the pages without running it. Says what is wrong with it, or nothing."""

from __future__ import annotations

import functools
import json
import re
import shlex
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import typer
import yaml
from config_files import RL, SFT, write_model
from doc_blocks import read_blocks
from paths import ROOT

from megatron_rl.cli import app
from megatron_rl.commands.options import RunCommand, joined_resume
from megatron_rl.config.load import load_config
from megatron_rl.config.resolve import resolve
from megatron_rl.config.schema import Config, SftConfig

READERS_FILES = {"run.yaml", "other.yaml", "sft.yaml", "study.yaml"}
"""Files that the pages ask the reader to write."""
SHELL = {
    "cd",
    "curl",
    "export",
    "kill",
    "kubectl",
    "openssl",
    "sbatch",
    "tensorboard",
    "sleep",
    "tail",
    "umask",
    "until",
    "wait",
    "echo",
    ".",
}
CONFIGURED = {
    "train": Config,
    "sft": SftConfig,
    "check": Config,
    "plan": Config,
    "launch": Config,
    "attribute": Config,
    "replay-study": Config,
}
TORCHRUN = {"--nnodes", "--node-rank", "--master-addr", "--master-port", "--nproc-per-node"}
VARIABLE = re.compile(r"^\w+=\S*$")


def check_command(text: str, written: set[str]) -> None:
    """Raises AssertionError that says what does not exist. `written` are the files that the page has so far."""
    words = shlex.split(text, comments=True)
    while words and VARIABLE.match(words[0]):
        words.pop(0)
    for ending in ("&", ">", "|", "2>&1"):
        words = words[: words.index(ending)] if ending in words else words
    if not words:
        return
    name, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    if name == "megatron-rl":
        _check_ours(arguments, written)
    elif name == "torchrun":
        while arguments and arguments[0].startswith("--"):
            assert arguments[0] in TORCHRUN, f"torchrun has no {arguments[0]}"
            arguments = arguments[2:]
        _check_python(arguments, written)
    elif name == "python":
        _check_python(arguments, written)
    elif name == "srun":
        assert arguments[0] == "megatron-rl", arguments
        _check_ours(arguments[1:], written)
    elif name == "make":
        _check_make(arguments)
    elif name == "pip":
        _check_pip(arguments)
    elif name == ".ci/run":
        assert (ROOT / name).is_file()
    else:
        assert name in SHELL, f"{name}: a command that the tests do not know"


def _check_python(arguments: list[str], written: set[str]) -> None:
    if arguments[0] != "-m":
        script = arguments[0]
        assert script in written or (ROOT / script).is_file(), f"{script}: no such file"
        return
    module, rest = arguments[1], arguments[2:]
    if module == "megatron_rl":
        _check_ours(rest, written)
    elif module == "megatron_rl.ranks.launch":
        assert rest[0].isdigit(), rest
        _check_python(rest[1:], written)
    elif module == "pip":
        _check_pip(rest)
    else:
        assert module in ("build", "pre_commit", "venv"), f"python -m {module}: not known"


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets
    for word in arguments:
        name, equals, _ = word.partition("=")
        known = re.search(rf"^{name} [?:]?=", makefile, re.MULTILINE) or f"ifndef {name}" in makefile
        assert known if equals else name in targets[1].split(), f"make has no {word}"


def _check_pip(arguments: list[str]) -> None:
    if arguments[0] == "wheel":
        assert arguments[1:] == ["--no-deps", "--wheel-dir", "dist", "."], arguments
        return
    assert arguments[0] == "install", arguments
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments[1:]:
        found = re.search(r"\bmegatron_rl.*\[(\w+)\]$", word)
        assert found is None or found[1] in extras, f"no extra {word}"


@functools.cache
def _group() -> Any:
    return typer.main.get_command(app)


def _check_ours(arguments: list[str], written: set[str]) -> None:
    group = _group()
    if arguments[0].startswith("-"):
        known = {option for parameter in group.params for option in parameter.opts}
        assert arguments[0] in known, f"megatron-rl has no {arguments[0]}"
        return
    name, rest = arguments[0], arguments[1:]
    assert name in group.commands, f"megatron-rl has no command {name}"
    if "--help" in rest:
        return
    command = group.commands[name]
    context = command.context_class(command, info_name=name, **command.context_settings)
    rest = joined_resume(rest) if isinstance(command, RunCommand) else rest
    options, left, _ = command.make_parser(context).parse_args(args=list(rest))  # raises for what is unknown
    assert not left or context.allow_extra_args, f"{name}: too many arguments: {left}"
    for parameter in command.params:
        value = options.get(parameter.name)
        assert value or not parameter.required, f"{name}: {parameter.name} is missing"
        if value and "$" not in str(value):
            _check_value(parameter, context, value)
    for key in ("config", "file"):
        if file := options.get(key):
            assert file in READERS_FILES | written or (ROOT / file).is_file(), f"{file}: no such file"
    if name in CONFIGURED:
        cls = SftConfig if options.get("sft") else CONFIGURED[name]
        check_overrides(cls, Path(options["config"]), options.get("overrides") or (), ranks_of(options))


def _check_value(parameter: Any, context: Any, value: Any) -> None:
    """The reader's own models and runs need not exist here."""
    try:
        parameter.process_value(context, value)
    except Exception as error:
        if "does not exist" not in str(error):
            raise


def ranks_of(options: dict[str, Any]) -> int | None:
    """The ranks that a command names, if it does."""
    if options.get("nodes"):
        return int(options["nodes"]) * int(options.get("gpus_per_node") or 8)
    named = options.get("world_size") or options.get("gpus")
    return int(named) if named else None


def check_overrides(cls: Any, file: Path, overrides: tuple[str, ...], ranks: int | None = None) -> None:
    """Raises ConfigError if the file, or the one of that name that the reader has, does not take them."""
    known = [text for text in overrides if "=$" not in text]
    with tempfile.TemporaryDirectory() as scratch:
        if not (file := ROOT / file).is_file():
            file = Path(scratch) / "readers.yaml"
            file.write_text(first_run() if cls is Config else SFT)
        (named,) = [text for text in known if text.startswith("model.path=")] or [""]
        saved = ["rollout.replay_from=runs/a"] if "rollout.replay_from" in str(overrides) else []
        model = write_model(Path(scratch) / "model", published(named or file.read_text()))
        resolve(cls, file, [*saved, *known, f"model.path={model}"], ranks or 1)


def published(text: str) -> dict[str, Any] | None:
    """Returns the published config.json of the model that the text names, if it names one."""
    for file in (ROOT / "tests" / "families" / "published").glob("*.json"):
        if re.search(rf"path[:=] *\S*\b{file.stem.split('--')[1]}\b", text):
            fields: dict[str, Any] = json.loads(file.read_text())
            return fields
    return None


@functools.cache
def first_run() -> str:
    (block,) = [block for block in read_blocks(ROOT / "docs" / "first-run.md") if block.title == "run.yaml"]
    return block.text


def load_part(text: str, directory: Path) -> None:
    """Loads a part of a run's configuration over one that has all that is required. Raises ConfigError."""
    part = yaml.safe_load(text)
    (directory / "whole.yaml").write_text(RL)
    part["presets"] = ["whole.yaml", *part.get("presets", [])]
    (directory / "part.yaml").write_text(yaml.safe_dump(part))
    load_config(Config, directory / "part.yaml")
