from pathlib import Path

from megatron_rl.data.prompts import Prompt
from megatron_rl.data.records import read_records
from megatron_rl.rewards.math import verify_math

right = ["10^{-5}", r"6.02 \times 10^{23}", "18446744073709551616", "10^{16}"]
for record, good in zip(read_records(Path(__file__).with_name("data.jsonl")), right, strict=False):
    prompt = Prompt("p", "", (), record.text("answer"), "math")
    print(
        repr(prompt.answer),
        "right",
        verify_math(prompt, rf"\boxed{{{good}}}").correct,
        "e-reading",
        verify_math(prompt, r"\boxed{e-5}").correct,
    )
