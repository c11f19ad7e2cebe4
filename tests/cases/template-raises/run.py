"""Loads two records under a template that refuses the second, and under named templates without a default."""

from tiny_models import make_tokenizer

from megatron_rl.data.prompts import Fields
from megatron_rl.rewards.checked_prompts import load_prompts

ALTERNATE = """{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"""
NAMED = {"tool_use": "{{ messages[0]['content'] }}", "rag": "{{ messages[0]['content'] }}"}

tokenizer = make_tokenizer()
for template in (ALTERNATE, NAMED):
    tokenizer.chat_template = template
    try:
        print(len(load_prompts("data.jsonl", Fields("prompt", "answer", chat_template=True), tokenizer, 99)))
    except Exception as error:
        print(f"{type(error).__module__}.{type(error).__name__}: {error}")
