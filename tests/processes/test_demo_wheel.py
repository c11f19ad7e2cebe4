"""The wheel has all that the package reads, so that an installed package runs its demo outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

import megatron_rl

BUILT = ("megatron_rl", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
VERSION: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def tracked(*paths: str) -> set[str]:
    """Files of the checkout, new ones included. A copy of it without git has no others."""
    if not (ROOT / ".git").exists():
        roots = [ROOT / path for path in paths]
        files = [file for root in roots for file in (root.rglob("*") if root.is_dir() else [root])]
        return {str(file.relative_to(ROOT)) for file in files if file.is_file() and "__pycache__" not in file.parts}
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *paths]
    listed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name for name in filter(None, listed.split("\0")) if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as setuptools writes into the tree that it builds."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked(*BUILT):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=tree, check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def run_from(directory: Path, code: str, cwd: Path, *arguments: str) -> str:
    """Runs code that finds the package in `directory` alone, and returns what it prints."""
    start = f"import sys; sys.path.insert(0, {str(directory)!r}); {code}"
    command = [sys.executable, "-I", "-c", start, *arguments]
    return subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_wheel_has_each_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == tracked("megatron_rl")
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".html", ".css", ".typed", ".sbatch"}


def test_the_version_is_written_alike_everywhere(wheel: Path) -> None:
    assert megatron_rl.__version__ == VERSION
    assert wheel.name.startswith(f"megatron_rl-{VERSION}-")
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_finds_its_files_where_it_is(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import megatron_rl; from megatron_rl.demo.first_run import preset_names; "
        "from megatron_rl.config.sources import PRESETS; "
        "print(megatron_rl.__file__, len(preset_names()), len(list(PRESETS.glob('*.yaml'))))"
    )
    file, demos, presets = run_from(unpacked, code, tmp_path).split()
    assert Path(file).is_relative_to(unpacked)
    assert demos == presets
    assert int(presets) >= 16


def test_a_dry_run_of_the_demo_works_in_an_empty_directory(unpacked: Path, tmp_path: Path) -> None:
    from config_files import write_model

    write_model(tmp_path / ".demo" / "cold-start")
    config = unpacked / "megatron_rl" / "demo" / "gspo.yaml"
    code = "from megatron_rl.cli import main; main()"
    shown = run_from(unpacked, code, tmp_path, "train", str(config), "--dry-run", "--world-size", "2")
    assert "2 ranks: tp=1" in shown
    assert "merged_presets:" in shown


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_an_installed_wheel_runs_the_demo_outside_of_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The environment is fresh but for its dependencies, which it takes from this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    work = tmp_path / "work"
    work.mkdir()
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [str(python.with_name("megatron-rl")), *arguments],
            cwd=work,
            env=ours,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert command("--version").splitlines()[0] == f"megatron_rl {VERSION}"
    make = [str(python), "-m", "megatron_rl.demo.demo_model", ".demo/cold-start", "--layers", "2", "--experts", "4"]
    (work / ".demo").mkdir()
    subprocess.run(make, cwd=work, env=ours, check=True)
    config = str(site / "megatron_rl" / "demo" / "gspo.yaml")
    assert "fits: rank 0" in command("plan", config, "--gpus", "2")
    sizes = ("rollout.prompts_per_step=4", "rollout.group_size=2", "eval.prompts=4")
    told = command("demo", "train.steps=1", *sizes)
    assert "held-out accuracy: " in told
    assert "next: megatron-rl report .demo/runs/gspo" in told
