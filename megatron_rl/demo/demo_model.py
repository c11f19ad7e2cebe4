"""Makes the demo's model: a Hugging Face-format Qwen3-MoE with random weights and a tokenizer of single characters.

python -m megatron_rl.demo.demo_model DIRECTORY
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_rl.data.arithmetic_task import ALPHABET


def make_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """A token is a character of the arithmetic task. Any other character is <pad>: SGLang's warm-up sends a sentence,
    and a token of its own for this would leave 17, which no tensor parallelism divides."""
    ids = {token: number for number, token in enumerate(("<pad>", "<eos>", *alphabet))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def make_demo_model(
    directory: Path,
    *,
    alphabet: str = ALPHABET,
    layers: int = 6,
    hidden: int = 128,
    experts: int = 16,
    top_k: int = 4,
    seed: int = 0,
) -> None:
    """Writes fp32 weights, the same for the same arguments: 2.7M parameters as it stands.

    Raises FileExistsError when there is something at `directory`, which appears whole or not at all.
    """
    if directory.exists():
        raise FileExistsError(f"{directory}: exists already; remove it or name another directory")
    tokenizer = make_tokenizer(alphabet)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,  # unused: every layer has experts
        moe_intermediate_size=hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        mlp_only_layers=[],
        max_position_embeddings=512,
        tie_word_embeddings=False,
        # transformers' 0.02 belongs to models twenty times as wide: here it makes each step of Adam a large change.
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        # Not the tokenizer's: transformers would set that row of the embedding to zero, where the first norm multiplies
        # gradients by 1000, and a single sampled <pad> would drown all others.
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config).float()
        model.get_input_embeddings().weight.data.normal_()
    model.generation_config = GenerationConfig(**ends)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


def main(
    directory: Path,
    alphabet: str = ALPHABET,
    layers: Annotated[int, typer.Option(min=1)] = 6,
    hidden: Annotated[int, typer.Option(min=8)] = 128,
    experts: Annotated[int, typer.Option(min=1)] = 16,
    top_k: Annotated[int, typer.Option(min=1)] = 4,
    seed: int = 0,
) -> None:
    """Makes a random Qwen3-MoE with a tokenizer of these characters, by default those of the arithmetic task, in
    DIRECTORY."""
    try:
        make_demo_model(
            directory, alphabet=alphabet, layers=layers, hidden=hidden, experts=experts, top_k=top_k, seed=seed
        )
    except FileExistsError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(f"wrote {directory}")


if __name__ == "__main__":
    typer.run(main)
