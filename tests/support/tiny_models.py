"""Tiny random models in Hugging Face form, with a tokenizer of one token per character.

Weights are large, norm weights are random, and experts differ. A layer that is skipped, connected wrongly or given the
weights of another layer then changes log-probs far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PAD, EOS = 0, 1
CHARACTERS = "0123456789+-=*,. abcdefghijklmnopqrstuvwxyz"
VOCAB_SIZE = 2 + len(CHARACTERS)  # <pad>, <eos> and the characters


def make_tokenizer() -> PreTrainedTokenizerFast:
    """<pad> is 0, <eos> is 1, then CHARACTERS in order. Any other character becomes <pad>."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_tiny_model(
    path: Path,
    *,
    family: Literal["qwen3_moe", "qwen3"] = "qwen3_moe",
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    ffn_hidden_size: int = 96,
    num_experts: int = 8,
    experts_per_token: int = 2,
    expert_hidden_size: int = 48,
    norm_topk_prob: bool = True,
    mlp_only_layers: Sequence[int] = (),
    tied: bool = False,
    vocab_size: int = VOCAB_SIZE,
    max_positions: int = 512,
    std: float = 0.15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes config.json, safetensors and the tokenizer into `path`, and returns it.

    The same arguments give the same weights. `std` is the standard deviation of matrices; norms are 1 + U(-.5, .5).
    """
    config = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn_hidden_size,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tied,
        "initializer_range": std,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "architectures": ["Qwen3MoeForCausalLM" if family == "qwen3_moe" else "Qwen3ForCausalLM"],
    }
    if family == "qwen3_moe":
        config |= {
            "num_experts": num_experts,
            "num_experts_per_tok": experts_per_token,
            "moe_intermediate_size": expert_hidden_size,
            "norm_topk_prob": norm_topk_prob,
            "mlp_only_layers": list(mlp_only_layers),
        }
    model = _random_model(family, config, std, seed)
    model.to(dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def _random_model(family: str, config: dict[str, Any], std: float, seed: int) -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    if family == "qwen3_moe":
        model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**config))
    fill(model, std, torch.Generator().manual_seed(seed))
    return model


def fill(model: torch.nn.Module, std: float, generator: torch.Generator) -> None:
    """Draws all parameters: matrices are normal with `std`; what has one dimension, as norms, is 0.5 + U(0, 1), or 1
    less for norms that multiply by 1 + weight. The biases of routers, which are buffers, are 0.3 * U(0, 1)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                is_zero_centred = "norm" in name and not parameter.any()
                low = -0.5 if is_zero_centred else -2.5 if name.endswith("A_log") else 0.5  # a state that lasts
                parameter.copy_(low + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.3 * torch.rand(buffer.shape, generator=generator))


def reference_logprobs(path: Path, token_ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Returns transformers' log-probs [n - 1] of all tokens but the first, in fp32 with eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([list(token_ids)])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
