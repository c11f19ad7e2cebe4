"""Every block of the pages can be copied: commands exist, configurations load, Python compiles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from doc_blocks import PAGES, Block, all_blocks, commands, prose, read_blocks
from doc_commands import check_command, load_part
from paths import ROOT

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.launch.site import read_site
from megatron_rl.study.study_file import StudyArm, load_study

LANGUAGES = {"bash", "yaml", "python", "json", "text"}
INDENTED = re.compile(r"\n\n    (?! *[-|])\S.*")


def ids(block: Block) -> str:
    return block.place


def titles(page: Path) -> set[str]:
    return {block.title for block in read_blocks(page) if block.title}


def test_the_pages_have_blocks_of_every_language() -> None:
    assert {block.language for block in all_blocks(*LANGUAGES)} == LANGUAGES
    assert len(all_blocks("bash")) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_block_says_what_it_is(page: Path) -> None:
    assert [block.place for block in read_blocks(page) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_indented(page: Path) -> None:
    """Such a block has no language, so nothing would check it."""
    found = [text.strip() for text in INDENTED.findall(prose(page))]
    assert found == []


@pytest.mark.parametrize("block", all_blocks("bash", "text"), ids=ids)
def test_each_command_exists_with_its_options_and_files(block: Block) -> None:
    for command in commands(block):
        try:
            check_command(command, titles(block.page))
        except Exception as error:
            raise AssertionError(f"{block.place}: {command}: {error}") from error


@pytest.mark.parametrize(
    "command",
    [
        "megatron-rl trian run.yaml",
        "megatron-rl train run.yaml --dryrun",
        "megatron-rl train others.yaml",
        "megatron-rl train run.yaml optim.lrr=1",
        "megatron-rl train run.yaml 'lab.record_steps=[50]'",
        "megatron-rl check run.yaml 'rollout.servers.urls=[http://host:30000]'",
        "megatron-rl launch run.yaml parallel.tp=3 --nodes 2 --slurm",
        "megatron-rl train --dry-run",
        "megatron-rl plan run.yaml --gpus many",
        "megatron-rl parity --model m --tokens t --layout tp=1 --dtype fp16",
        "megatron-rl inspect runs/a",
        "megatron-rl --versions",
        "torchrun --nproc 2 -m megatron_rl train run.yaml",
        "torchrun --nproc-per-node 2 -m megatron_rl trian run.yaml",
        "python tools/no_such.py",
        "python -m megatron_rl.ranks.launch 2 -m megatron_rl sft sft.yaml stepz=1",
        "make demos",
        "make demo PRESETS=grpo",
        "pip install 'megatron_rl[wand]'",
        "megatronrl train run.yaml",
        "X=1 megatron-rl certify --models m > log",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises(Exception, match=r".") as found:
        check_command(command, set())
    assert type(found.value).__name__ in ("AssertionError", "ConfigError", "NoSuchOption", "BadParameter")


def test_loops_and_continued_lines_are_commands_too() -> None:
    lines = ("for N in 0 1; do", "  A=$N megatron-rl serve m \\", "  --port 3$N &", "done", "# a remark")
    text = "\n".join((*lines, "for X in a; do for N in 0; do echo $N; done; done > f", "wait"))
    found = commands(Block(PAGES[0], 1, "bash", "", text))
    assert [command.split() for command in found] == [
        ["A=$N", "megatron-rl", "serve", "m", "--port", "3$N", "&"],
        ["echo", "$N"],
        ["wait"],
    ]


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=ids)
def test_each_configuration_loads(block: Block, tmp_path: Path) -> None:
    name = Path(block.title).name
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if block.title == "arms of a study":
        assert [StudyArm.model_validate(arm) for arm in yaml.safe_load(block.text).values()]
        return
    if not name:
        load_part(block.text, tmp_path)
        return
    file = tmp_path / name
    file.write_text(block.text)
    if name == "study.yaml":
        study = load_study(file)
        assert study.base.name in titles(block.page) | {"base.yaml"}
    elif name == "site.yaml":
        read_site(file)
    elif name == "sft.yaml":
        load_config(SftConfig, file)
    else:
        load_config(Config, file)


@pytest.mark.parametrize("block", all_blocks("python"), ids=ids)
def test_each_python_block_compiles(block: Block) -> None:
    compile(block.text, block.place, "exec")


@pytest.mark.parametrize("block", all_blocks("json"), ids=ids)
def test_each_line_of_data_is_json(block: Block) -> None:
    assert [json.loads(line) for line in block.text.splitlines()]
