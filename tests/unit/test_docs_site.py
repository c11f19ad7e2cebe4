"""The pages hang together: links lead somewhere, the site has every page, and what users type is explained."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from doc_blocks import DOCS, PAGES, Block, all_blocks, anchors, commands, links, read_blocks
from paths import ROOT
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.sources import PRESETS
from megatron_rl.lab.declared_all import DECLARATION

SETTINGS: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def in_nav(entries: list[Any]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        (value,) = entry.values()
        found += [value] if isinstance(value, str) else in_nav(value)
    return found


def test_the_site_has_each_page_once() -> None:
    assert sorted(in_nav(SETTINGS["nav"])) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


def test_the_site_loads_nothing_from_elsewhere() -> None:
    """Material takes fonts from Google unless told otherwise; its offline plugin takes a script from a CDN."""
    assert SETTINGS["theme"]["font"] is False
    assert SETTINGS["plugins"] == ["search"]
    assert not {"extra_javascript", "extra", "repo_url"} & SETTINGS.keys()
    assert all((ROOT / "docs" / name).is_file() for name in SETTINGS["extra_css"])


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra [docs]")
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    pages = "".join(page.read_text() for page in (tmp_path / "site").rglob("*.html"))
    assert re.findall(r'src="https?:[^"]*"', pages) == []


def broken_links(page: Path) -> list[str]:
    found = []
    for target in links(page):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
        elif ROOT / "docs" in page.parents and ROOT / "docs" not in file.parents:
            found.append(f"{target} leaves the site")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# A b\n[one](b.md) [two](#a-b) [three](a.md#c) `[four](d.md)`\n```text\n[five](e.md)\n```\n")
    assert broken_links(page) == ["b.md", "a.md#c"]


def test_the_pages_have_links() -> None:
    assert sum(len(list(links(page))) for page in PAGES) > 100


# ---- what users type -----------------------------------------------------------------------------------------------


def test_each_command_has_its_row() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    page = (ROOT / "docs" / "commands.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == commands
    table = (ROOT / "README.md").read_text().split("## Commands")[1].split("## Objectives")[0]
    assert {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in row.strip("`").split("`, `")
    } == (commands)


def test_each_preset_has_its_row() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text().split("### Presets")[1].split("### ")[0]
    presets = {file.stem for file in PRESETS.glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+)` \[", page, re.MULTILINE)) == presets


@pytest.mark.parametrize("name", ["routing-replay", "troubleshooting"])
def test_metrics_that_a_page_names_are_declared(name: str) -> None:
    page = (ROOT / "docs" / f"{name}.md").read_text()
    named = re.findall(r"`((?:routing|rollout|kl|ratio|rho|clip|weights)/[\w/.]+|\w+_\w+/\w+/\w+/\w+)`", page)
    named += re.findall(r"`((?:expert_change|live_overlap|fallback)/[\w/]+)`", page)
    whole = [metric for metric in named if not metric.endswith("...")]
    for metric in whole:
        names = (metric, f"routing/{metric}")
        assert any(DECLARATION.find("metrics.jsonl", each) for each in names), metric
    assert len(whole) >= 3


# ---- troubleshooting -----------------------------------------------------------------------------------------------

OF_OTHERS = ("CUDA out of memory",)
"""Messages of torch."""


def said(page: str) -> list[str]:
    """The messages in the first column, outside of the tables about learning."""
    return [
        message
        for row in re.findall(r"^\| (`.*?) \|", page.split("## It runs, but")[0], re.MULTILINE)
        for message in re.findall(r"`([^`]*)`", row)
        if " " in message and message not in OF_OTHERS
    ]


def source() -> str:
    """All that the package and the Makefile say, with strings joined as Python joins them."""
    files = [ROOT / "Makefile", *(ROOT / "megatron_rl").rglob("*.py")]
    return "".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in files)


def test_messages_in_troubleshooting_are_the_programs_own() -> None:
    text = source()
    messages = said((ROOT / "docs" / "troubleshooting.md").read_text())
    assert len(messages) > 30
    parts = {part.strip() for message in messages for part in message.split("…") if len(part.strip()) > 3}
    assert sorted(part for part in parts if part not in text) == []


# ---- the cluster ---------------------------------------------------------------------------------------------------


def shown(title: str) -> Block:
    (block,) = (block for block in all_blocks("yaml") if block.title == title)
    return block


def test_the_walk_through_shows_the_file_of_the_cluster() -> None:
    name = "examples/clusters/qwen3-30b-a3b.yaml"
    assert shown(name).text == (ROOT / name).read_text()


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the current directory one of the walk-through, with nothing but what its reader has so far."""
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    model = Path("models") / "Qwen3-30B-A3B"
    model.mkdir(parents=True)
    published = ROOT / "tests" / "families" / "published" / "Qwen--Qwen3-30B-A3B.json"
    (model / "config.json").write_text(published.read_text())


@pytest.mark.usefixtures("cluster")
def test_the_cluster_fits_as_the_walk_through_says() -> None:
    from megatron_rl.config.schema import Config
    from megatron_rl.planner.forecast import find_gpu, read_job
    from megatron_rl.planner.memory import GIB, largest_rank
    from megatron_rl.planner.roofline import step_time

    job = read_job(Config, Path("examples/clusters/qwen3-30b-a3b.yaml"), ["engine.layers=te"], 64)
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert f"needs {largest_rank(job).total / GIB:.1f} GiB of 80" in " ".join(page.split())
    assert f"about {step_time(job, find_gpu('h100')).total:.0f} s a step" in " ".join(page.split())


@pytest.mark.usefixtures("cluster")
def test_what_the_walk_through_runs_without_gpus_runs() -> None:
    page = ROOT / "docs" / "cluster.md"
    printed = [shlex.split(text) for block in read_blocks(page) for text in commands(block) if block.language == "bash"]
    runs = [words[1:] for words in printed if words[:2] in (["megatron-rl", "launch"], ["megatron-rl", "plan"])]
    runs += [words[1:] for words in printed if "--dry-run" in words]
    assert len(runs) == 3
    for words in runs:
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    script = Path("launch/megatron-rl.sbatch").read_text()
    assert "--nodes=8 --ntasks-per-node=4 " in script
    assert " --tp 2 " in script
    assert "--nnodes 8 --nproc-per-node 8 " in script
