"""The tokenizer in a model directory. Importing this module imports no torch, because reports import it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.models.fields import MissingModelError, ModelError


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a model directory. Raises ModelError when there is none, or its files are damaged."""
    from transformers import AutoTokenizer

    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise MissingModelError(
            f"{directory} holds neither tokenizer.json nor tokenizer_config.json; copy the model's tokenizer there"
        )
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = str(error).strip().partition("\n")[0][:300]
        raise ModelError(f"{directory}: its tokenizer cannot be loaded: {reason or type(error).__name__}") from None
