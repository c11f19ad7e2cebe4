"""Commands that only read files import neither torch nor transformers, so they start in a second and run anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from made_runs import write_run
from paths import ROOT
from study_files import write_study
from tiny_models import make_tiny_model

from megatron_rl.models.registry import MODULES

COMMAND = "from megatron_rl.cli import main; sys.argv[0] = 'megatron-rl'; main()"


def run(code: str, *arguments: str | Path) -> str:
    """Returns what a new process prints. It fails if it has imported torch or transformers."""
    check = f"import sys\ntry: {code}\nfinally: assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    command = [sys.executable, "-c", check, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "modules",
    [
        ("megatron_rl.config.load", "megatron_rl.config.show", "megatron_rl.data.sample", "megatron_rl.cli"),
        ("megatron_rl.launch.cluster_files", "megatron_rl.launch.cluster_job", "megatron_rl.launch.site"),
        ("megatron_rl.models.architecture", *MODULES.values()),
    ],
    ids=lambda modules: modules[0],
)
def test_a_module_imports_without_torch(modules: tuple[str, ...]) -> None:
    run(f"import {', '.join(modules)}")


def test_the_declaration_of_metrics_imports_without_numpy() -> None:
    run("import megatron_rl.lab.declared_all; assert 'numpy' not in sys.modules")


def test_report_writes_the_page_of_a_run(tmp_path: Path) -> None:
    made = write_run(tmp_path / "run", steps=2, names=["loss"])
    (made / "eval.jsonl").unlink()
    assert run(COMMAND, "report", made) == f"{made / 'report' / 'report.html'}\n"
    assert (made / "report" / "figures" / "run-loss.png").is_file()
    assert orjson.loads((made / "metrics.jsonl").read_bytes().splitlines()[0])["step"] == 1  # the run is as it was


def test_study_lists_its_runs(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", num_layers=1)
    base = tmp_path / "base.yaml"
    base.write_text(
        f"presets: [grpo]\nrun_dir: unset\nmodel: {{path: {tmp_path / 'model'}}}\n"
        "data: {train: 'arithmetic:terms=3', max_prompt_tokens: 16}\n"
        "rollout: {prompts_per_step: 8, max_response_tokens: 16}\ntrain: {steps: 3}\n"
    )
    arms = {"a": {}, "b": {"set": {"optim": {"lr": 1e-4}}}}
    file = write_study(tmp_path / "study.yaml", base, arms, seeds=[0, 1])
    printed = run(COMMAND, "study", file, "--dry-run")
    assert "Does it hold?" in printed
    for text in ("a-seed-0", "b-seed-1", "4 runs, 12 rollout steps in all"):
        assert text in printed
    assert not (tmp_path / "study").exists()
