"""Loads prompts and checks their verifiers and reference answers."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence

from megatron_rl.data.chat import ChatFormat, Tokenizer
from megatron_rl.data.files import DataError, some
from megatron_rl.data.generated import default_verifier
from megatron_rl.data.prompts import Fields, PromptDataset, source_records
from megatron_rl.data.sample import Prompt
from megatron_rl.rewards.judges import Judges
from megatron_rl.rewards.references import check_references
from megatron_rl.rewards.verifiers import RECORD, VERIFIERS


def load_prompts(
    source: str,
    fields: Fields,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    vocab_size: int | None = None,
    judges: Callable[[], Judges] = Judges,
) -> PromptDataset:
    """Reads and checks the whole `source`: a path that find_files accepts, or a generated one.

    A record may name its own id and a built-in verifier; the id defaults to file name and line. `judges` makes the
    worker processes that try the references. If the verifier asks for the record, each prompt keeps all of its fields,
    and needs no reference answer.

    Raises DataError, which names file, line and field, if a record cannot be used, an id occurs twice, or a prompt is
    longer than `max_tokens`. Also if a verifier cannot read its reference, or if a token is outside the model's
    vocabulary of `vocab_size`; None disables that check.
    """
    with judges() as pool:
        return _load(source, fields, ChatFormat(tokenizer, fields.chat_template, vocab_size), max_tokens, pool)


def _load(source: str, fields: Fields, chat: ChatFormat, max_tokens: int, pool: Judges) -> PromptDataset:
    verifier = fields.verifier or default_verifier(source)
    allowed = {*VERIFIERS, verifier}
    keeps_records = verifier not in VERIFIERS and RECORD in pool.asked_by(verifier)
    optional = None if keeps_records else ("id", "verifier")
    prompts = []
    where: dict[str, str] = {}
    for record in source_records(source, fields, optional, answer_text=lambda terms: str(sum(terms))):
        text = chat.text(record, fields.prompt)
        ids = chat.prompt_ids(record, fields.prompt, text)
        if len(ids) > max_tokens:
            raise record.error(
                fields.prompt, f"prompt has {len(ids)} tokens, expected 1 to data.max_prompt_tokens = {max_tokens}"
            )
        prompt = Prompt(
            id=record.text("id", default=record.id),
            text=text,
            token_ids=(),
            answer=record.text(fields.answer, default="" if keeps_records else None),
            verifier=record.text("verifier", default=verifier),
            record=record.plain() if keeps_records else None,
        )
        if prompt.verifier not in allowed:
            raise record.error("verifier", _no_verifier(prompt.verifier))
        if prompt.id in where:
            raise record.error("id", f"{prompt.id!r} is also at {where[prompt.id]}; ids must differ")
        where[prompt.id] = record.where
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{source}: no prompts")
    _check_references(prompts, where, fields.answer, pool)
    return PromptDataset(prompts, chat.encode)


def _no_verifier(name: str) -> str:
    close = difflib.get_close_matches(name, VERIFIERS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"a record may name {', '.join(VERIFIERS)} or what data.verifier is, found {name[:100]!r}{hint}; "
        "only the configuration may choose code"
    )


def _check_references(prompts: Sequence[Prompt], where: Mapping[str, str], field: str, pool: Judges) -> None:
    """Raises DataError for the first reference answer that its verifier cannot read, and names the lines of others."""
    problems = check_references(prompts, pool)
    bad = [prompt for prompt in prompts if (prompt.verifier, prompt.answer) in problems]
    if bad:
        first = bad[0]
        more = f" (as at {some(where[prompt.id] for prompt in bad[1:])})" if bad[1:] else ""
        raise DataError(
            f"{where[first.id]}: {field}: verifier {first.verifier!r} cannot judge by this reference: "
            f"{problems[first.verifier, first.answer]}{more}"
        )
