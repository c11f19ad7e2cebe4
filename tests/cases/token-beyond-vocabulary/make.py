"""Writes the tiny model with a tokenizer of one token more (id 45) than the model has rows."""

import sys
from pathlib import Path

from tiny_models import make_tiny_model, make_tokenizer

out = make_tiny_model(Path(sys.argv[1]))
tokenizer = make_tokenizer()
tokenizer.add_tokens(["<tool>"])
tokenizer.save_pretrained(out)
