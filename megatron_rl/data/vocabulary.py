"""Checks each token id once, where it enters the program: the model's embedding must have a row for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def unknown_token(
    token_ids: Iterable[int], vocab_size: int, text_of: Callable[[int], object] | None = None
) -> str | None:
    """A message about the first id without a row in the model's embedding; None if all ids have a row.

    `text_of` gives the token's text for the message. Under tensor parallelism PyTorch does not notice an id that is too
    large: it reads another token's logit, and the loss is infinite.
    """
    token = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if token is None:
        return None
    text = "" if text_of is None else f" ({text_of(token)!r})"
    return f"token {token}{text} is not in the model's vocabulary of {vocab_size}"
