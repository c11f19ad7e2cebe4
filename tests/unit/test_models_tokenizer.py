"""Tokenizers of model directories: code that a publisher put there is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published_models import PUBLISHED
from tiny_models import make_tokenizer

from megatron_rl.models.fields import ModelError
from megatron_rl.models.tokenizer import load_tokenizer


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A tokenizer beside code of its own, with a config.json that transformers does not know."""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((PUBLISHED / "moonshotai--Kimi-K2-Instruct.json").read_text())
    (tmp_path / "its_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: ...\n")
    edit(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["its_code.Own", None]})
    return tmp_path


def test_a_tokenizer_is_loaded_without_the_code_beside_it(with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a user was asked whether to run code"))
    assert load_tokenizer(with_code)("12+3").input_ids == make_tokenizer()("12+3").input_ids
    assert not (with_code / "ran").exists()


def test_a_tokenizer_that_is_code_is_refused(with_code: Path) -> None:
    (with_code / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="its tokenizer is code of the model's publisher, which is not run; convert"):
        load_tokenizer(with_code)
    assert not (with_code / "ran").exists()


def test_a_damaged_tokenizer_is_an_error(with_code: Path) -> None:
    (with_code / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded: "):
        load_tokenizer(with_code)
