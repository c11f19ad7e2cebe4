"""What a study's results depend on: a change of any part is seen, and named."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from megatron_rl.config.schema import Config
from megatron_rl.study.fingerprint import Fingerprint, differences, take_fingerprint


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_tiny_model(tmp_path / "model", num_layers=1)
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    for name in ("train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "own_study_judge.py").write_text("def judge(prompt, response): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def taken(root: Path) -> Fingerprint:
    data = {name: str(root / f"{name}.jsonl") for name in ("train", "heldout")}
    config = Config.model_validate(
        {
            "run_dir": str(root / "run"),
            "model": {"path": str(root / "model")},
            "data": {**data, "verifier": "own_study_judge:judge"},
            "train": {"steps": 1},
        }
    )
    return take_fingerprint(
        root / "study.yaml", b"question", [root / "base.yaml"], {"a-seed-0": config}, root / "study"
    )


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("base.yaml", "base configuration"),
        ("model/config.json", "model"),
        ("model/model.safetensors", "model"),
        ("train.jsonl", "data"),
        ("heldout.jsonl", "data"),
        ("own_study_judge.py", "own code"),
    ],
)
def test_a_changed_file_is_named_with_its_part(root: Path, file: str, part: str) -> None:
    before = taken(root)
    assert differences(before, taken(root)) == []
    path = root / file
    path.write_bytes(path.read_bytes() + b"\n")
    name = "own_study_judge" if part == "own code" else str(path)
    assert differences(before, taken(root)) == [f"{part}: {name} has changed"]


def test_the_donor_of_a_graft_is_digested(root: Path) -> None:
    """A run that starts from another's model names a model inside of the study, but its routers come from elsewhere."""
    inside = Config.model_validate(
        {
            "run_dir": str(root / "run"),
            "model": {"path": str(root / "study" / "models" / "a-seed-0")},
            "data": {"train": "arithmetic:terms=3"},
            "train": {"steps": 1},
        }
    )

    def digests() -> Fingerprint:
        return take_fingerprint(root / "s.yaml", b"", [], {"a-seed-0": inside}, root / "study", [root / "model"])

    before, weights = digests(), root / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    assert differences(before, digests()) == [f"model: {weights} has changed"]


def test_another_version_of_a_library_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = taken(root)
    monkeypatch.setattr(
        "megatron_rl.study.fingerprint.versions", lambda: {**before["software"], "torch": "9", "cpu_count": 1}
    )
    assert differences(before, taken(root)) == ["software: torch has changed"]
