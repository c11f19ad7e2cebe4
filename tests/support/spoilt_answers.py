"""Randomly damaged answers of SGLang, and an independent reader.

`read_strictly` is that reader, written from the conventions in megatron_rl/rollout/answers.py, not from its code.
"""

from __future__ import annotations

import base64
import copy
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st

from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.rollout.answers import Completion
from megatron_rl.rollout.turns import append_completion
from megatron_rl.routing.wire import RouteSpec

PROMPT, LONGEST, VOCAB, VERSIONS = (4, 5, 6), 6, 9, {6, 7}
SPEC = RouteSpec(num_layers=2, moe_layers=(1,), top_k=2, num_experts=4)


def routes(rows: int) -> str:
    return base64.b64encode(np.tile(np.array([[0, 0], [3, 1]], "<i4"), (rows, 1, 1)).tobytes()).decode()


def answer(tokens: int, reason: str) -> dict[str, Any]:
    """Returns a correct answer of SGLang."""
    ids = [2 + n for n in range(tokens)]
    finish: dict[str, Any] = {"type": reason}
    if reason == "stop":
        finish["matched"] = ids[-1]
    return {
        "text": "abc",
        "output_ids": ids,
        "meta_info": {
            "id": "r",
            "finish_reason": finish,
            "prompt_tokens": len(PROMPT),
            "completion_tokens": tokens,
            "cached_tokens": 0,
            "weight_version": "7",
            "weight_versions": [{"version": "6", "start": 0, "end": 2}, {"version": "7", "start": 2, "end": tokens}],
            "num_retractions": 0,
            "output_token_logprobs": [[-0.5 - n, token, None] for n, token in enumerate(ids)],
            "routed_experts": routes(len(PROMPT) + tokens - 1),
        },
    }


GOOD = [answer(LONGEST, "length"), answer(4, "stop"), answer(3, "abort")]

# ---- damage

NUMBERS = [0, -1, 1, 2, 5, 6, 7, 8, 9, 1e-7, 0.01, 1.5, -1e-40, -3.4e38, -3.5e38, -1e308, 2**31, 2**63, 10**30]
TEXTS = ["", "6", "06", " 6", "+6", "٦", "8", "9" * 5000, "stop", "length", "abort", "NaN", "A" * 8, "é", "\x00"]
LEAVES = st.one_of(
    st.sampled_from([None, True, False, math.nan, math.inf, -math.inf, *NUMBERS, *TEXTS]),
    st.integers(-3, 12),
    st.floats(-20, 1),
    st.text(max_size=4),
)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=4
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields (container, key) of every value."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


@st.composite
def spoilt(draw: st.DrawFn) -> Any:
    given = copy.deepcopy(draw(st.sampled_from(GOOD)))
    for _ in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(list(places({"": given}))))
        if container.keys() == {""} if isinstance(container, dict) else False:
            return draw(VALUES)
        kind = draw(st.sampled_from(["replace", "replace", "delete", "double", "nudge", "move"]))
        value = container[key]
        if kind == "delete":
            del container[key]
        elif kind == "double" and isinstance(container, list):
            container.insert(key, copy.deepcopy(value))
        elif kind == "nudge" and isinstance(value, int | float):
            container[key] = value + draw(st.sampled_from([-1, 1, 0.5]))
        elif kind == "move" and isinstance(container, list):
            container.append(container.pop(key))
        elif kind == "move" and isinstance(value, str):
            container[key] = value[: draw(st.integers(0, len(value)))] + draw(st.sampled_from(["", "A", "=", "-"]))
        else:
            container[key] = draw(VALUES)
    return given


# ---- the independent reader


def is_int(value: Any) -> bool:
    return type(value) is int


def read_strictly(found: Any) -> tuple[Any, ...] | None:
    """Returns (ids, fp32 log-probs, reason, (version, start, end)s, routes), or None if the answer must be refused."""
    try:
        meta, ids = found["meta_info"], found["output_ids"]
        finish, entries, spans = meta["finish_reason"], meta["output_token_logprobs"], meta["weight_versions"]
        reason = finish["type"]
    except (KeyError, TypeError, IndexError):
        return None
    containers = isinstance(ids, list) and isinstance(entries, list) and isinstance(spans, list)
    retractions, routed = meta.get("num_retractions", 0), meta.get("routed_experts")
    counts = (meta.get("prompt_tokens"), meta.get("completion_tokens"), retractions)
    if not containers or type(found.get("text")) is not str or not all(map(is_int, counts)):
        return None
    if not isinstance(finish, dict) or reason not in ("stop", "length", "abort") or type(reason) is not str:
        return None
    if not all(is_int(i) and 0 <= i < VOCAB for i in ids) or len(entries) != len(ids) or len(ids) > LONGEST:
        return None
    for entry, token in zip(entries, ids, strict=True):
        if not isinstance(entry, list) or len(entry) != 3 or not is_int(entry[1]) or entry[1] != token:
            return None
        logprob = entry[0]
        if type(logprob) not in (int, float) or not -3.4028234663852886e38 <= logprob <= 1e-6:
            return None
    if reason != "abort" and (not ids or counts[:2] != (len(PROMPT), len(ids))):
        return None
    if reason == "length" and len(ids) != LONGEST:
        return None
    if reason == "stop" and (not is_int(finish.get("matched")) or finish["matched"] != ids[-1]):
        return None
    covered: Any = 0
    kept = []
    for span in spans:
        if not isinstance(span, dict):
            return None
        version, start, end = span.get("version"), span.get("start"), span.get("end")
        if type(version) is not str or not is_int(start) or not is_int(end) or version not in ("6", "7"):
            return None
        if start != covered or end < start:
            return None
        covered = end
        if end > start:
            kept.append((int(version), start, end))
    if covered != len(ids):
        return None
    read = experts_of(routed, len(ids), reason, kept, retractions)
    if read is False:
        return None
    logprobs = [struct.unpack("f", struct.pack("f", min(float(e[0]), 0.0)))[0] for e in entries]
    return ids, logprobs, reason, kept, read


def experts_of(routed: Any, tokens: int, reason: str, kept: list[Any], retractions: int) -> Any:
    """Returns the second layer's experts by row; None: a missing row, or no routes; False: it must be refused."""
    if routed is not None and type(routed) is not str:
        return False
    if reason == "abort" and (routed is None or not kept):
        return None
    if routed is None or not re.fullmatch(r"[A-Za-z0-9+/]*={0,2}", routed) or len(routed) % 4:
        return False
    data = base64.b64decode(routed)
    rows = len(PROMPT) + tokens - 1
    if len(data) != rows * 2 * 2 * 4 or base64.b64encode(data).decode()[:-1] != routed[:-1]:
        # Unused bits of the last character are ignored.
        return False if len(data) != rows * 16 else _rows(data, rows, kept, retractions)
    return _rows(data, rows, kept, retractions)


def _rows(data: bytes, rows: int, kept: list[Any], retractions: int) -> Any:
    read: list[tuple[int, int] | None] = []
    for row in range(rows):
        one, other = struct.unpack_from("<2i", data, row * 16 + 8)
        if (one, other) == (0, 0):
            read.append(None)
            continue
        if one == other or not (0 <= one < 4 and 0 <= other < 4):
            return False
        read.append((one, other))
    if all(row is None for row in read):
        return False
    if retractions > 0:
        last = len(PROMPT) - 1 + kept[-1][1] if len(kept) > 1 else 0
        read[:last] = [None] * last
    return read


def as_read(found: Completion) -> tuple[Any, ...]:
    """Returns the trainer's sample in the form of `read_strictly`."""
    sample = append_completion(Sample.start(Prompt("p", "", PROMPT, "", ""), 0), found)
    spans = [(v.version, v.start - len(PROMPT), v.end - len(PROMPT)) for v in sample.versions]
    experts = None
    if found.trace is not None:
        experts = [
            tuple(map(int, ids)) if present else None
            for ids, present in zip(found.trace.experts[:, 0], found.trace.present, strict=True)
        ]
    ids, logprobs = sample.response_ids.tolist(), sample.rollout_logprobs[len(PROMPT) :].tolist()
    return ids, logprobs, sample.finish_reason, spans, experts
