"""Prompts and SFT examples from files, and the order in which they are taken."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tokenizer

from megatron_rl.config.schema import Config
from megatron_rl.data.arithmetic_task import ArithmeticTask, response_text
from megatron_rl.data.prompts import Fields, PromptCursor, load_sft_samples, take_indexes
from megatron_rl.data.records import DataError
from megatron_rl.demo.demo_model import make_tokenizer as make_demo_tokenizer
from megatron_rl.loop.run_prompts import RunPrompts
from megatron_rl.rewards.checked_prompts import load_prompts

FIELDS = Fields("prompt", "answer", "math")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes records, or raw lines, as JSON lines."""

    def write_lines(*records: object) -> str:
        path = tmp_path / "data.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write_lines


def question(**changes: object) -> dict[str, object]:
    return {"prompt": "1+1=", "answer": "2", **changes}


def test_a_record_becomes_a_prompt(write, tokenizer):
    source = write(question(), "", question(id="mine", answer=3, verifier="arithmetic", prompt="4="))
    prompts = load_prompts(source, FIELDS, tokenizer, 16)
    assert len(prompts) == 2
    first, second = prompts[0], prompts[1]
    assert (first.id, first.text, first.answer, first.verifier) == ("data.jsonl:1", "1+1=", "2", "math")
    assert tokenizer.decode(first.token_ids) == "1+1="
    assert (second.id, second.text, second.answer, second.verifier) == ("mine", "4=", "3", "arithmetic")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"promt": "1", "answer": "1"}, "no field 'prompt'; did you mean 'promt'?"),
        ({"question": "1", "answer": "1"}, "no field 'prompt'; it has answer, question"),
        (question(answer=None), "answer: is null"),
        (question(answer=["2"]), "answer: expected text or a number, found a list"),
        (question(answer=True), "answer: expected text or a number, found true or false"),
        (question(prompt=7), "prompt: expected text, found a number"),
        (question(prompt=[{"role": "user", "content": "1"}]), "messages need data.chat_template: true"),
        (question(prompt=""), "prompt: is empty; expected a prompt"),
        (question(prompt="1" * 17), "prompt has 17 tokens, expected 1 to data.max_prompt_tokens = 16"),
        (question(id=["x"]), "id: expected text or a number"),
        (question(id="first"), "'first' is also at "),
        ("{'prompt': 1}", "not JSON"),
        ("[1]", "expected an object with fields, found list"),
    ],
)
def test_the_error_names_file_and_line_of_an_unusable_record(write, tokenizer, record, message):
    source = write(question(id="first"), record)
    with pytest.raises(DataError) as caught:
        load_prompts(source, FIELDS, tokenizer, 16)
    assert str(caught.value).startswith(f"{source}:2: ")
    assert message in str(caught.value)


def test_the_error_names_a_missing_or_empty_source(write, tokenizer, tmp_path):
    for source, message in [(str(tmp_path / "none"), "no such file"), (write(""), "no prompts")]:
        with pytest.raises(DataError, match=message):
            load_prompts(source, FIELDS, tokenizer, 16)


def test_the_error_names_a_record_with_unknown_characters(write):
    source = write(question(), question(prompt="2 times 3"))
    with pytest.raises(DataError, match=r"data\.jsonl:2: prompt: has characters that .* tokenizer does not know"):
        load_prompts(source, FIELDS, make_demo_tokenizer(), 16)
    source = write({"prompt": "2=", "response": "two"})
    with pytest.raises(DataError, match=r"data\.jsonl:1: response: has characters"):
        load_sft_samples(source, Fields("prompt", "response"), make_demo_tokenizer(), 16)


def test_an_unknown_token_equal_to_the_eos_token_is_not_reported(write):
    """GPT-2's tokenizer is such a case, and it knows every character."""
    tokenizer = make_demo_tokenizer()
    tokenizer.eos_token = "<pad>"
    assert len(load_prompts(write(question(prompt="2 times 3")), FIELDS, tokenizer, 16)) == 1


def test_chat_prompts_are_rendered_by_the_template(write):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<", "(").replace(">", ")").replace("(a)", "-")
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1"}]
    source = write(question(), question(prompt=messages))
    fields = Fields("prompt", "answer", "math", chat_template=True)
    prompts = load_prompts(source, fields, tokenizer, 64)
    assert prompts[0].text == "(user)1+1=-"
    assert prompts[1].text == "(system)add(user)1+1-"
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompts[1].token_ids) == expected
    with pytest.raises(DataError, match=r"data\.jsonl:1: prompt: expected text or a list of messages"):
        load_prompts(write(question(prompt=[{"content": "1"}])), fields, tokenizer, 64)
    with pytest.raises(DataError, match="the model's tokenizer has no chat template"):
        load_prompts(source, fields, make_tokenizer(), 64)


def table() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": ["1+1=", "2+2="], "answer": ["2", "4"]})


def saved_directory(path: Path) -> Path:
    table().save_to_disk(str(path))
    return path


def parquet_directory(path: Path) -> Path:
    path.mkdir()
    table().to_parquet(str(path / "train-00000-of-00002.parquet"))
    table().to_parquet(str(path / "train-00001-of-00002.parquet"))
    return path


def parquet_file(path: Path) -> Path:
    table().to_parquet(str(path.with_suffix(".parquet")))
    return path.with_suffix(".parquet")


@pytest.mark.parametrize(("make", "repeats"), [(saved_directory, 1), (parquet_directory, 2), (parquet_file, 1)])
def test_data_sets_on_disk_are_read(tmp_path, tokenizer, make, repeats):
    prompts = load_prompts(str(make(tmp_path / "qa")), FIELDS, tokenizer, 16)
    assert [(prompts[i].text, prompts[i].answer) for i in range(len(prompts))] == [
        ("1+1=", "2"),
        ("2+2=", "4"),
    ] * repeats
    assert len({prompts[i].id for i in range(len(prompts))}) == 2 * repeats


def test_the_error_names_a_bad_row(tmp_path, tokenizer):
    path = saved_directory(tmp_path / "qa")
    with pytest.raises(DataError, match=r"qa: row 0: no field 'anwser'; did you mean 'answer'\?"):
        load_prompts(str(path), Fields("prompt", "anwser", "math"), tokenizer, 16)


def test_several_splits_are_not_mixed(tmp_path, tokenizer):
    splits = datasets.DatasetDict({"train": table(), "test": table()})
    splits.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"several splits; name one of .*saved/test, .*saved/train"):
        load_prompts(str(tmp_path / "saved"), FIELDS, tokenizer, 16)
    assert len(load_prompts(str(tmp_path / "saved" / "test"), FIELDS, tokenizer, 16)) == 2

    directory = parquet_directory(tmp_path / "files")
    table().to_parquet(str(directory / "test-00000-of-00001.parquet"))
    with pytest.raises(DataError, match="files of several splits"):
        load_prompts(str(directory), FIELDS, tokenizer, 16)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no Parquet or Arrow or JSONL files"):
        load_prompts(str(tmp_path / "empty"), FIELDS, tokenizer, 16)


def test_arithmetic_prompts_are_generated(tokenizer):
    prompts = load_prompts("arithmetic:terms=3,count=5", Fields("question", "solution"), tokenizer, 16)
    terms = ArithmeticTask(terms=3, count=5).problems()
    for i, expected in enumerate(terms):
        assert prompts[i].text == "+".join(map(str, expected)) + "="
        assert prompts[i].answer == str(sum(expected))


@pytest.mark.parametrize(
    ("source", "named", "verifier"),
    [
        ("file", None, "math"),
        ("file", "verifier_examples:shaped", "verifier_examples:shaped"),
        ("arithmetic:count=1", None, "arithmetic"),
        ("arithmetic:count=1", "verifier_examples:shaped", "verifier_examples:shaped"),
    ],
)
def test_the_verifier_is_the_configured_one_or_the_default_of_the_source(tokenizer, write, source, named, verifier):
    source = write(question()) if source == "file" else source
    fields = Fields("prompt", "answer", named)
    assert load_prompts(str(source), fields, tokenizer, 64)[0].verifier == verifier


def test_a_users_verifier_is_not_imported_in_the_trainer(tiny_model_dir, write, tmp_path, monkeypatch):
    (tmp_path / "verifier_of_a_user.py").write_text("def judge(prompt, response): return True\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"model": {"path": str(tiny_model_dir)}, "train": {"steps": 1}, "run_dir": str(tmp_path / "run")}
    data = {"train": str(write(question())), "verifier": "verifier_of_a_user:judge"}
    place: Any = SimpleNamespace(leads_replica=True, rank=0)
    loaded = RunPrompts.load(Config.model_validate({**settings, "data": data}), place, vocab_size=None)  # type: ignore[arg-type]
    assert loaded.train is not None
    assert loaded.train[0].verifier == "verifier_of_a_user:judge"
    assert "verifier_of_a_user" not in sys.modules


# ---- order -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.lists(st.integers(0, 25), max_size=8), st.integers(0, 3))
def test_each_epoch_has_every_prompt_once_for_any_step_sizes(size, counts, seed):
    cursor, taken = PromptCursor(seed), []
    for count in counts:
        part, cursor = take_indexes(size, PromptCursor(**json.loads(json.dumps(cursor.as_json()))), count)
        assert len(part) == count
        taken += part
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))
    assert max(Counter(taken[len(taken) // size * size :]).values(), default=1) == 1
    assert taken == take_indexes(size, PromptCursor(seed), len(taken))[0]
    assert cursor.epoch * size + cursor.position == len(taken)


def test_order_differs_between_epochs_and_seeds():
    first, cursor = take_indexes(50, PromptCursor(0), 50)
    second, _ = take_indexes(50, cursor, 50)
    other, _ = take_indexes(50, PromptCursor(1), 50)
    assert first != list(range(50))
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_prompts_are_taken_in_the_order_of_the_cursor(tokenizer):
    prompts = load_prompts("arithmetic:terms=3,count=5", FIELDS, tokenizer, 16)
    taken, cursor = prompts.take(PromptCursor(7), 3)
    assert [p.id for p in taken] == [prompts[i].id for i in take_indexes(5, PromptCursor(7), 3)[0]]
    assert cursor == PromptCursor(7, 0, 3)


def test_a_cursor_of_a_larger_data_set_is_refused():
    with pytest.raises(DataError, match="taken 9 prompts of this epoch, but the data set has 5"):
        take_indexes(5, PromptCursor(0, 1, 9), 1)


# ---- supervised examples -----------------------------------------------------------------------------------------


def test_an_sft_sample_trains_on_the_response_and_its_eos_token(write, tokenizer):
    source = write({"prompt": "1+1=", "response": "2."})
    (sample,) = load_sft_samples(source, Fields("prompt", "response"), tokenizer, 16)
    assert tokenizer.decode(sample.token_ids) == "1+1=2.<eos>"
    assert sample.loss_mask.tolist() == [False] * 4 + [True] * 3
    assert sample.response_ids.tolist()[-1] == tokenizer.eos_token_id
    assert sample.prompt.id == "data.jsonl:1"


def test_arithmetic_examples_have_the_reference_response():
    tokenizer = make_demo_tokenizer()
    samples = load_sft_samples("arithmetic:terms=4,count=3", Fields("prompt", "response"), tokenizer, 64)
    expected = [response_text(terms) + "<eos>" for terms in ArithmeticTask(terms=4, count=3).problems()]
    assert [tokenizer.decode(sample.response_ids) for sample in samples] == expected


def test_the_error_names_an_sft_example_that_is_too_long(write, tokenizer):
    source = write({"prompt": "1+1=", "response": "2" * 12})
    with pytest.raises(DataError, match=r"data\.jsonl:1: prompt, response: 4 \+ 13 tokens, .* data.max_tokens = 16"):
        load_sft_samples(source, Fields("prompt", "response"), tokenizer, 16)
