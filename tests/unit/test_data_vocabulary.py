"""Token ids without an embedding in the model are refused when data is loaded, and the error names the record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import VOCAB_SIZE, make_tokenizer

from megatron_rl.data.prompts import Fields, load_sft_samples
from megatron_rl.data.records import DataError
from megatron_rl.data.vocabulary import unknown_token
from megatron_rl.rewards.checked_prompts import load_prompts

UNKNOWN = f"token {VOCAB_SIZE} \\('<tool>'\\) is not in the model's vocabulary of {VOCAB_SIZE}"


def test_the_first_unknown_token_is_reported():
    assert unknown_token([0, 4, 8], 9) is None
    assert unknown_token([], 9) is None
    assert unknown_token([0, 9, 12], 9) == "token 9 is not in the model's vocabulary of 9"
    assert unknown_token([0, -1], 9) == "token -1 is not in the model's vocabulary of 9"
    assert unknown_token([10**30], 9, text_of=lambda token: None) is not None
    assert unknown_token([9], 9, text_of=lambda token: f"<{token}>") == (
        "token 9 ('<9>') is not in the model's vocabulary of 9"
    )


@pytest.fixture
def tokenizer():
    """A tokenizer with one token more than the model has embedding rows."""
    extended = make_tokenizer()
    extended.add_tokens(["<tool>"])
    return extended


def write(path: Path, *records: dict[str, str]) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_the_error_names_the_record_of_a_prompt_with_an_unknown_token(tmp_path, tokenizer):
    fields = Fields("prompt", "answer", "arithmetic")
    known, unknown = ({"prompt": prompt, "answer": "2"} for prompt in ("1+1=", "1+1=<tool>"))
    path = write(tmp_path / "data.jsonl", known, unknown)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: prompt: {UNKNOWN}"):
        load_prompts(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE)
    assert len(load_prompts(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE + 1)) == 2


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_the_error_names_the_record_of_an_example_with_an_unknown_token(tmp_path, tokenizer, field):
    fields = Fields("prompt", "response")
    path = write(tmp_path / "data.jsonl", {"prompt": "1+1=", "response": "2", field: "2<tool>"})
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {field}: {UNKNOWN}"):
        load_sft_samples(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE)
    assert len(load_sft_samples(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE + 1)) == 1


def test_an_eos_token_that_the_model_lacks_is_refused(tmp_path, tokenizer):
    tokenizer.eos_token = "<tool>"
    path = write(tmp_path / "data.jsonl", {"prompt": "1+1=", "response": "2"})
    with pytest.raises(DataError, match=rf"end-of-sequence token \(eos_token\): token {VOCAB_SIZE} is not in"):
        load_sft_samples(path, Fields("prompt", "response"), tokenizer, 16, vocab_size=VOCAB_SIZE)
