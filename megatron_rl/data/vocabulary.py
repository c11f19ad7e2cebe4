"""Whether token ids are the model's: asked once of each, where it enters the program."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def unknown_token(
    token_ids: Iterable[int], vocab_size: int, text_of: Callable[[int], object] | None = None
) -> str | None:
    """What is wrong with the first id that has no row in the model's embedding; None if all have one.

    text_of: the token's text, for the message. Under tensor parallelism an id too large is no error of PyTorch's: it
    reads another token's logit and the loss is infinite.
    """
    token = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if token is None:
        return None
    text = "" if text_of is None else f" ({text_of(token)!r})"
    return f"token {token}{text} is not in the model's vocabulary of {vocab_size}"
