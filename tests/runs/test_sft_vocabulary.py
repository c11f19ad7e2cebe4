"""A token id that the model has no embedding for ends fine-tuning before its first step."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from forks import Forks
from tiny_models import VOCAB_SIZE, make_tiny_model, make_tokenizer


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_unknown_token_id_ends_fine_tuning_before_its_first_step(forks: Forks, tmp_path: Path, ranks: int) -> None:
    """Without this check, tensor-parallel ranks would train on such an id, with an infinite loss."""
    model = make_tiny_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])  # one more than the model has rows
    tokenizer.save_pretrained(model)
    data, config = tmp_path / "data.jsonl", tmp_path / "sft.yaml"
    data.write_text(json.dumps({"prompt": "1+1=", "response": "2<tool>"}))
    config.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: {model}}}\nparallel: {{tp: {ranks}}}\n"
        f"engine: {{device: cpu, dtype: fp32}}\ndata: {{train: {data}, max_tokens: 64}}\nsteps: 2\nbatch_size: 4\n"
    )
    done = forks.run("-m", "megatron_rl", "sft", config, ranks=ranks)
    who = "" if ranks == 1 else f"rank 0 on host {socket.gethostname()}: "
    unknown = f"token {VOCAB_SIZE} ('<tool>') is not in the model's vocabulary of {VOCAB_SIZE}"
    assert f"error: {who}{data}:1: response: {unknown}" in done.stderr
    assert done.status == [2] * ranks
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_bytes()
