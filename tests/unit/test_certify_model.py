"""The model that a certificate is made with: a model's own, with a larger vocabulary."""

from __future__ import annotations

from pathlib import Path

import torch
from model_directories import edit, files_of, make

from megatron_rl.certify import VOCABULARY, _with_vocabulary
from megatron_rl.models.check import check_weights


def test_an_output_layer_beside_tied_embeddings_grows_with_them(tmp_path: Path) -> None:
    directory, _ = make(tmp_path / "model", "qwen3")
    edit(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    wide = _with_vocabulary(directory, tmp_path / "wide")
    check_weights(wide)
    tensors = files_of(wide)
    assert tensors["model.embed_tokens.weight"].shape[0] == VOCABULARY
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
