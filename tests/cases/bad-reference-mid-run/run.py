"""Loads the file whole, then line by line: each reference that cannot be read is named before the first rollout."""

from pathlib import Path

from tiny_models import make_tokenizer

from megatron_rl.data.prompts import Fields
from megatron_rl.errors import UserError
from megatron_rl.rewards.checked_prompts import load_prompts

for number, line in enumerate(Path("data.jsonl").read_text().splitlines(), start=1):
    Path("one.jsonl").write_text(line + "\n")
    try:
        print(
            number, "loads", repr(load_prompts("one.jsonl", Fields("prompt", "answer"), make_tokenizer(), 99)[0].answer)
        )
    except UserError as error:
        print(number, f"{type(error).__name__}: {error}")
try:
    load_prompts("data.jsonl", Fields("prompt", "answer"), make_tokenizer(), 99)
except UserError as error:
    print("whole", f"{type(error).__name__}: {error}")
