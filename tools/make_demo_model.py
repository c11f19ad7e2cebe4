"""Makes the demo's model: a Hugging Face-format Qwen3-MoE with random weights and a tokenizer of single characters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from megatron_rl.data.arithmetic import ALPHABET

VOCABULARY = ["<pad>", "<eos>", *ALPHABET]


def make_tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_model(directory: Path, *, layers: int, hidden: int, experts: int, top_k: int, seed: int) -> None:
    """About 2.7M parameters with 6 layers, hidden 128, 16 experts and top-4; fp32, from the seed alone."""
    tokenizer = make_tokenizer()
    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main(
    directory: Path,
    layers: Annotated[int, typer.Option()] = 6,
    hidden: Annotated[int, typer.Option()] = 128,
    experts: Annotated[int, typer.Option()] = 16,
    top_k: Annotated[int, typer.Option()] = 4,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    make_model(directory, layers=layers, hidden=hidden, experts=experts, top_k=top_k, seed=seed)
    print(f"wrote {directory}")


if __name__ == "__main__":
    typer.run(main)
