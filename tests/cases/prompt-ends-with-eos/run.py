from pathlib import Path

from tiny_models import make_tokenizer
from tokenizers import processors

from megatron_rl.data.prompts import Fields, load_prompts, load_sft_samples

t = make_tokenizer()
t.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
here = Path(__file__).with_name("data.jsonl")
here.write_text('{"prompt": "1+1=", "answer": "2", "response": "2"}\n')
print(load_prompts(str(here), Fields("prompt", "answer"), t, 99)[0].token_ids)
print(load_sft_samples(str(here), Fields("prompt", "response"), t, 99)[0].token_ids.tolist())
