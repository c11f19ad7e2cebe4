"""The tokenizer in a model directory. Importing this module imports no torch, because reports import it too."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from megatron_rl.models.fields import MissingModelError, ModelError, read_json_object

LIBRARY_FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a model directory. Code in the directory is never run.

    Raises ModelError when there is none, when it needs such code, or when its files are damaged.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((directory / name).is_file() for name in (LIBRARY_FILE, SETTINGS)):
        raise MissingModelError(
            f"{directory} holds neither {LIBRARY_FILE} nor {SETTINGS}; copy the model's tokenizer there"
        )
    if not (directory / LIBRARY_FILE).is_file() and "auto_map" in read_json_object(directory / SETTINGS):
        raise ModelError(
            f"{directory}: its tokenizer is code of the model's publisher, which is not run; convert it to a "
            f"{LIBRARY_FILE}"
        )
    try:
        # Unless told, transformers asks on the terminal whether to run code.
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        if (directory / LIBRARY_FILE).is_file():
            # It is all that is needed, but AutoTokenizer also reads config.json, and fails on YaRN in a model_type that
            # transformers does not know.
            with contextlib.suppress(Exception):
                return PreTrainedTokenizerFast.from_pretrained(directory)
        reason = str(error).strip().partition("\n")[0][:300]
        raise ModelError(f"{directory}: its tokenizer cannot be loaded: {reason or type(error).__name__}") from None
