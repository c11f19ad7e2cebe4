"""Encodes a prompt and its response with a tokenizer that ends every text with <eos> (id 1)."""

from pathlib import Path

from tiny_models import make_tokenizer
from tokenizers import processors

from megatron_rl.data.prompts import Fields, load_sft_samples
from megatron_rl.rewards.checked_prompts import load_prompts

tokenizer = make_tokenizer()
ends = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
tokenizer.backend_tokenizer.post_processor = ends
data = Path("data.jsonl")
print("prompt", load_prompts(str(data), Fields("prompt", "answer"), tokenizer, 99)[0].token_ids)
for response in ("2", "2<eos>"):
    data.write_text(f'{{"prompt": "1+1=", "response": "{response}"}}\n')
    print(response, load_sft_samples(str(data), Fields("prompt", "response"), tokenizer, 99)[0].token_ids.tolist())
