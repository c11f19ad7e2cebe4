"""Prompts and responses as token ids: chat templates and end-of-sequence tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_models import EOS, make_tokenizer
from tokenizers import processors

from megatron_rl.data.files import DataError
from megatron_rl.data.prompts import Fields, load_sft_samples
from megatron_rl.rewards.checked_prompts import load_prompts

RL, SFT = Fields("prompt", "answer"), Fields("prompt", "response")
CHAT = Fields("prompt", "answer", chat_template=True)
SFT_CHAT = Fields("prompt", "response", chat_template=True)
TURNS = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def write(tmp_path):
    def write_lines(*records: dict) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"answer": "2", "response": "2", **record}) + "\n" for record in records))
        return str(path)

    return write_lines


def tokenizer_that_appends(tokens: str):
    """Returns a tokenizer whose post-processor turns a text $A into `tokens`."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<pad>"
    special = [("<pad>", 0), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=tokens, special_tokens=special)
    return tokenizer


def with_template(template: object):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# ---- chat templates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TURNS, "roles must alternate"),
        ("{{ messages[0]['content'] + 3 if messages | length > 1 else 'x' }}", "can only concatenate str"),
        ("{{ messages[1].missing.name if messages | length > 1 else 'x' }}", "has no attribute 'missing'"),
    ],
)
@pytest.mark.parametrize(("load", "fields"), [(load_prompts, CHAT), (load_sft_samples, SFT_CHAT)])
def test_the_error_names_a_record_that_the_chat_template_refuses(write, load, fields, template, reason):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "2+2="}]
    source = write({"prompt": "1+1="}, {"prompt": messages})
    with pytest.raises(DataError, match=rf"data\.jsonl:2: prompt: the chat template refuses it: .*{reason}"):
        load(source, fields, with_template(template), 99)


def test_a_template_with_a_syntax_error_is_not_blamed_on_a_record(write):
    with pytest.raises(DataError, match=r"^the tokenizer's chat template is no template: line 2: "):
        load_prompts(write({"prompt": "1+1="}), CHAT, with_template("a\n{% for m in %}"), 99)


def test_the_default_of_several_chat_templates_is_used(write):
    content = "{{ messages[0]['content'] }}"
    source = write({"prompt": "1+1="})
    with pytest.raises(
        DataError, match=r"none of the tokenizer's chat templates \(rag, tool_use\) is called 'default'"
    ):
        load_prompts(source, CHAT, with_template({"tool_use": content, "rag": content}), 99)
    both = with_template({"tool_use": content, "default": content + "="})
    assert load_prompts(source, CHAT, both, 99)[0].text == "1+1=="


# ---- the end of a sequence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("appends", "first"), [("$A <eos>", ""), ("<pad> $A <eos>", "<pad>"), ("<pad> $A", "<pad>")])
def test_an_eos_token_that_the_tokenizer_appends_is_removed_from_prompts(write, appends, first):
    tokenizer = tokenizer_that_appends(appends)
    source = write({"prompt": "1+1="})
    assert tokenizer.decode(load_prompts(source, RL, tokenizer, 99)[0].token_ids) == f"{first}1+1="
    (sample,) = load_sft_samples(source, SFT, tokenizer, 99)
    assert tokenizer.decode(sample.token_ids) == f"{first}1+1=2<eos>"


def test_a_start_token_that_the_text_already_has_is_not_added_again(write):
    """The prompt was rendered by a chat template before it was saved."""
    tokenizer = tokenizer_that_appends("<pad> $A")
    for text in ("1+1=", "<pad>1+1="):
        assert tokenizer.decode(load_prompts(write({"prompt": text}), RL, tokenizer, 99)[0].token_ids) == "<pad>1+1="


def test_the_error_names_a_prompt_that_ends_with_the_eos_token(write):
    source = write({"prompt": "1"}, {"prompt": "1+1=<eos>"})
    for tokenizer in (make_tokenizer(), tokenizer_that_appends("$A <eos>")):
        with pytest.raises(DataError, match=r"data\.jsonl:2: prompt: the text ends it with the end-of-sequence token"):
            load_prompts(source, RL, tokenizer, 99)
        with pytest.raises(DataError, match=r"data\.jsonl:2: prompt: the text ends it"):
            load_sft_samples(source, SFT, tokenizer, 99)
    tokenizer = with_template("{{ messages[0]['content'] }}<eos>")
    with pytest.raises(DataError, match=r"data\.jsonl:1: prompt: the chat template ends it .*add_generation_prompt"):
        load_prompts(source, CHAT, tokenizer, 99)
    assert len(load_prompts(write({"prompt": "1<eos>2"}), RL, make_tokenizer(), 99)) == 1


def test_a_response_has_exactly_one_eos_token_at_its_end(write):
    for response in ("2", "2<eos>"):
        (sample,) = load_sft_samples(write({"prompt": "1+1=", "response": response}), SFT, make_tokenizer(), 99)
        assert make_tokenizer().decode(sample.response_ids) == "2<eos>"
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: response: has the end-of-sequence token, id 1, before its end"
    ):
        load_sft_samples(write({"prompt": "1+1=", "response": "2<eos>3"}), SFT, make_tokenizer(), 99)


# ---- nothing to train on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": " \n"}, "prompt: is empty"),
        ({"response": ""}, "response: is empty"),
        ({"response": "  "}, "response: is empty"),
        ({"response": "<eos>"}, "response: is empty"),
        ({"response": None}, "response: is null"),
        ({"response": ["2"]}, "response: expected text or a number, found a list"),
        ({"response": {"text": "2"}}, "response: expected text or a number, found an object"),
        ({"prompt": {"text": "2"}}, "prompt: expected text, found an object"),
    ],
)
@pytest.mark.parametrize("appends", ["$A", "<pad> $A <eos>"])
def test_the_error_names_an_example_without_prompt_or_response(write, record, message, appends):
    source = write({"prompt": "1+1="}, {"prompt": "1+1=", **record})
    with pytest.raises(DataError, match=rf"data\.jsonl:2: {message}"):
        load_sft_samples(source, SFT, tokenizer_that_appends(appends), 99)


def test_the_error_names_a_prompt_whose_last_message_is_empty(write):
    tokenizer = with_template("-{{ messages[-1]['content'] }}-")
    for messages in ("", [{"role": "user", "content": "1"}, {"role": "user", "content": " "}]):
        with pytest.raises(DataError, match=r"data\.jsonl:1: prompt: is empty"):
            load_prompts(write({"prompt": messages}), CHAT, tokenizer, 99)
    empty_system = [{"role": "system", "content": ""}, {"role": "user", "content": "1"}]
    assert load_prompts(write({"prompt": empty_system}), CHAT, tokenizer, 99)[0].text == "-1-"


def test_the_error_names_a_prompt_without_tokens(write):
    """The tokenizer adds a token to every text, so a check of the token count alone would pass."""
    tokenizer = tokenizer_that_appends("<pad> $A")
    tokenizer.chat_template = "<pad>"
    source = write({"prompt": "1"})
    with pytest.raises(DataError, match=r"data\.jsonl:1: prompt: the tokenizer makes no tokens of it"):
        load_prompts(source, CHAT, tokenizer, 99)


def test_the_error_names_a_record_that_cannot_be_encoded(write):
    class Refuses:
        bos_token_id = unk_token_id = chat_template = None
        eos_token_id = 1

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            if "x" in text:
                raise Exception("no such character")
            return [2]

    tokenizer: Any = Refuses()  # has only the used attributes
    with pytest.raises(DataError, match=r"data\.jsonl:1: prompt: the tokenizer refuses it: no such character"):
        load_prompts(write({"prompt": "x"}), RL, tokenizer, 99)
    with pytest.raises(DataError, match=r"data\.jsonl:1: response: the tokenizer refuses it"):
        load_sft_samples(write({"prompt": "1", "response": "x"}), SFT, tokenizer, 99)


# ---- references and verifiers ------------------------------------------------------------------------------------


def test_a_record_cannot_name_code_to_import(write, tmp_path, monkeypatch):
    """Otherwise the trainer and the verifier workers would import the named module."""
    (tmp_path / "evil_mod.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(prompt, response): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("evil_mod:f", "os:system", "maths", ""):
        source = write({"prompt": "q"}, {"prompt": "q", "verifier": name})
        with pytest.raises(DataError, match=r"data\.jsonl:2: verifier: a record may name arithmetic, math") as caught:
            load_prompts(source, RL, make_tokenizer(), 99)
        assert ("did you mean 'math'?" in str(caught.value)) == (name == "maths")
    assert not (tmp_path / "ran").exists()


def test_a_record_may_name_a_built_in_or_the_configured_verifier(write):
    own = "verifier_examples:shaped"
    source = write({"prompt": "q", "verifier": "math"}, {"prompt": "q", "verifier": own}, {"prompt": "q"})
    prompts = load_prompts(source, Fields("prompt", "answer", own), make_tokenizer(), 99)
    assert [prompts[i].verifier for i in range(3)] == ["math", own, own]
