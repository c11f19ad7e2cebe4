"""Token ids that the model has no embedding for: refused where they enter, with their record."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
from rl_runs import environment, torchrun
from tiny_models import VOCAB_SIZE, make_tiny_model, make_tokenizer

from megatron_rl.data.prompts import Fields, load_sft_samples
from megatron_rl.data.records import DataError
from megatron_rl.data.vocabulary import unknown_token
from megatron_rl.rewards.checked_prompts import load_prompts

UNKNOWN = f"token {VOCAB_SIZE} \\('<tool>'\\) is not in the model's vocabulary of {VOCAB_SIZE}"


def test_the_first_unknown_token_is_named():
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
    """With one token more than the model has rows."""
    extended = make_tokenizer()
    extended.add_tokens(["<tool>"])
    return extended


def write(path: Path, *records: dict[str, str]) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_a_prompt_with_an_unknown_token_is_refused_with_its_record(tmp_path, tokenizer):
    fields = Fields("prompt", "answer", "arithmetic")
    known, unknown = ({"prompt": prompt, "answer": "2"} for prompt in ("1+1=", "1+1=<tool>"))
    path = write(tmp_path / "data.jsonl", known, unknown)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: prompt: {UNKNOWN}"):
        load_prompts(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE)
    assert len(load_prompts(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE + 1)) == 2


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_an_example_with_an_unknown_token_is_refused_with_its_record(tmp_path, tokenizer, field):
    fields = Fields("prompt", "response")
    path = write(tmp_path / "data.jsonl", {"prompt": "1+1=", "response": "2", field: "2<tool>"})
    with pytest.raises(DataError, match=rf"data\.jsonl:1: {field}: {UNKNOWN}"):
        load_sft_samples(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE)
    assert len(load_sft_samples(path, fields, tokenizer, 16, vocab_size=VOCAB_SIZE + 1)) == 1


def test_an_end_token_that_the_model_lacks_is_refused(tmp_path, tokenizer):
    tokenizer.eos_token = "<tool>"
    path = write(tmp_path / "data.jsonl", {"prompt": "1+1=", "response": "2"})
    with pytest.raises(DataError, match=rf"end-of-sequence token \(eos_token\): token {VOCAB_SIZE} is not in"):
        load_sft_samples(path, Fields("prompt", "response"), tokenizer, 16, vocab_size=VOCAB_SIZE)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_fine_tuning_ends_before_its_first_step(tmp_path, tokenizer, ranks):
    """Under tensor parallelism such an id was trained on, with an infinite loss."""
    model = make_tiny_model(tmp_path / "model")
    tokenizer.save_pretrained(model)
    data = write(tmp_path / "data.jsonl", {"prompt": "1+1=", "response": "2<tool>"})
    config = tmp_path / "sft.yaml"
    config.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: {model}}}\nparallel: {{tp: {ranks}}}\n"
        f"engine: {{device: cpu, dtype: fp32}}\ndata: {{train: {data}, max_tokens: 64}}\nsteps: 2\nbatch_size: 4\n"
    )
    command = torchrun(ranks, "-m", "megatron_rl", "sft", str(config))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    unknown = UNKNOWN.replace("\\", "")
    who = "" if ranks == 1 else f"rank 0 on host {socket.gethostname()}: "
    assert f"error: {who}{data}:1: response: {unknown}" in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_bytes()
