"""A server's answer, read without a server: rows and layers of routes, how a response ended, and refused answers."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from config_files import ARCHITECTURE

from megatron_rl.data.trace import TraceError
from megatron_rl.data.versions import VersionSpan
from megatron_rl.rollout.answers import Completion, RolloutError, read_completion
from megatron_rl.routing.wire import RouteSpec

PROMPT = 3
SPEC = RouteSpec(num_layers=4, moe_layers=(1, 3), top_k=2, num_experts=8)
ROWS = PROMPT + 5 - 1


def encode(ids: np.ndarray) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def ids_of(rows: int = ROWS) -> np.ndarray:
    """Returns ids [rows, 4, 2] that differ by row and layer. Layers 0 and 2 are dense, so SGLang leaves zeros."""
    rng = np.random.default_rng(rows)
    ids = rng.permuted(np.tile(np.arange(8), (rows, 4, 1)), axis=-1)[..., :2]
    ids[:, [0, 2]] = 0
    return ids


def answer(tokens: int = 5, reason: str = "length", **meta: Any) -> dict[str, Any]:
    given = {
        "finish_reason": {"type": reason},
        "prompt_tokens": PROMPT,
        "completion_tokens": tokens,
        "output_token_logprobs": [[-0.5, 4, None]] * tokens,
        "weight_versions": [{"version": "6", "start": 0, "end": tokens}],
        "num_retractions": 0,
        "routed_experts": encode(ids_of(PROMPT + tokens - 1)),
        **meta,
    }
    return {"text": "", "output_ids": [4] * tokens, "meta_info": {k: v for k, v in given.items() if v is not ...}}


def read(given: dict[str, Any], routes: RouteSpec | None = SPEC, longest: int = 5) -> Completion:
    return read_completion(
        given,
        where="http://a:1: request r",
        prompt_tokens=PROMPT,
        max_new_tokens=longest,
        vocab_size=9,
        versions={6, 7, 8},
        routes=routes,
    )


def spans(*spans: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in spans]


def test_routes_of_moe_layers_are_read_in_layer_order() -> None:
    trace = read(answer()).trace
    assert trace is not None
    assert np.array_equal(trace.experts, ids_of()[:, [1, 3]])
    assert trace.present.all()
    assert (trace.layers, trace.num_experts, trace.source) == ((1, 3), 8, "rollout")
    assert trace.versions == (VersionSpan(6, 0, ROWS),)
    assert trace.experts.dtype == np.uint8


def test_there_is_no_trace_unless_it_is_requested() -> None:
    assert read(answer(), routes=None).trace is None
    assert read(answer(routed_experts=...), routes=None).trace is None


def test_a_row_has_the_weight_version_of_the_token_sampled_from_it() -> None:
    """Rows 0 to 2 belong to the prompt; the first sampled token comes from row 2."""
    given = answer(weight_versions=spans(("6", 0, 1), ("7", 1, 3), ("8", 3, 5)))
    trace = read(given).trace
    assert trace is not None
    assert trace.versions == (VersionSpan(6, 0, 3), VersionSpan(7, 3, 5), VersionSpan(8, 5, 7))
    assert trace.present.all()


def test_a_retracted_request_keeps_only_the_last_weight_versions_rows() -> None:
    """The earlier rows were computed again after the retraction, under weights that did not sample their tokens."""
    two = spans(("6", 0, 2), ("7", 2, 5))
    trace = read(answer(weight_versions=two, num_retractions=1)).trace
    assert trace is not None
    assert trace.present.tolist() == [False] * 4 + [True] * 3
    assert trace.versions == (VersionSpan(6, 0, 4), VersionSpan(7, 4, 7))
    under_one_version = read(answer(num_retractions=2)).trace
    assert under_one_version is not None
    assert under_one_version.present.all()


def test_rows_that_the_server_never_wrote_are_missing() -> None:
    ids = ids_of()
    ids[[0, 4]] = 0
    trace = read(answer(routed_experts=encode(ids))).trace
    assert trace is not None
    assert trace.present.tolist() == [False, True, True, True, False, True, True]


def test_zeros_mean_expert_0_if_top_k_is_1() -> None:
    ids = ids_of()[..., :1]
    ids[2] = 0
    trace = read(answer(routed_experts=encode(ids)), dataclasses.replace(SPEC, top_k=1)).trace
    assert trace is not None
    assert trace.present.all()


def changed(change: Callable[[np.ndarray], Any]) -> str:
    ids = ids_of()
    change(ids)
    return encode(ids)


@pytest.mark.parametrize(
    ("routed_experts", "message"),
    [
        (..., "found none; expected: routes; was the server started with --enable-return-routed-experts?"),
        (None, "found none; expected: routes; was the server started with --enable-return-routed-experts?"),
        (5, "found 5; expected: "),
        ("a-_", "found 'a-_'; expected base64"),
        ("zähl", "expected base64"),
        ("*" + encode(ids_of()), "expected base64"),
        (encode(ids_of()[:-1]), "found 192 bytes; expected 224: int32 [7, 4, 2] (rows, layers, top_k)"),
        (encode(ids_of(ROWS + 1)), "found 256 bytes; expected 224"),
        (encode(ids_of()[:, 1:]), "found 168 bytes; expected 224"),
        (encode(ids_of()[..., :1]), "found 112 bytes; expected 224"),
        ("", "found 0 bytes; expected 224"),
        (changed(lambda ids: ids.__setitem__((4, 3), (8, 1))), "row 4, layer 3: found experts [8, 1]; expected ids in"),
        (changed(lambda ids: ids.__setitem__((4, 1), (3, 3))), "row 4, layer 1: found experts [3, 3]; expected 2 diff"),
        (changed(lambda ids: ids.__setitem__((4, 1), 0)), "row 4, layer 1: found experts [0, 0]; expected 2 different"),
        (changed(lambda ids: ids.__setitem__((4, 1, 0), -1)), "row 4, layer 1: found experts [-1"),
        (encode(np.zeros_like(ids_of())), "found no route in any of 7 rows; expected some"),
    ],
)
def test_the_error_for_bad_routes_names_server_request_and_field(routed_experts: Any, message: str) -> None:
    with pytest.raises(RolloutError) as caught:
        read(answer(routed_experts=routed_experts))
    assert str(caught.value).startswith("http://a:1: request r: routed_experts: ")
    assert message in str(caught.value)


def test_an_aborted_answer_has_the_computed_rows_or_no_trace() -> None:
    trace = read(answer(tokens=2, reason="abort")).trace
    assert trace is not None
    assert trace.rows == PROMPT + 1
    assert read(answer(tokens=2, reason="abort", routed_experts=...)).trace is None
    assert read(answer(tokens=0, reason="abort", routed_experts=...)).trace is None
    assert read(answer(tokens=0, reason="abort")).trace is None
    with pytest.raises(RolloutError, match=r"routed_experts: found \d+ bytes"):
        read(answer(tokens=2, reason="abort", routed_experts=encode(ids_of())))


def test_the_route_spec_lists_the_models_moe_layers() -> None:
    mixed = dataclasses.replace(ARCHITECTURE, dense_layers=(0, 5))
    spec = RouteSpec.of(mixed)
    assert spec == RouteSpec(num_layers=8, moe_layers=(1, 2, 3, 4, 6, 7), top_k=2, num_experts=16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_layers": (0, 3)}, r"layers: found \(1, 3\); expected \(0, 3\), as the model has"),
        ({"top_k": 3}, "top_k: found 2; expected 3"),
        ({"num_experts": 9}, "num_experts: found 8; expected 9"),
    ],
)
def test_a_trace_of_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    trace = read(answer()).trace
    assert trace is not None
    SPEC.check(trace)
    with pytest.raises(TraceError, match=message):
        dataclasses.replace(SPEC, **changes).check(trace)


# ---- mu's most likely tokens

TOP_IDS = np.array([[4, 1], [2, 4], [4, 3], [1, 8], [4, 0]], dtype="<i4")
TOP_LOGPROBS = np.array([[-0.5, -2], [-1.0, -0.5], [-0.5, -3.4028235e38], [-0.3, -1.5], [-0.5, -1]], dtype="<f4")


def flat(ids: np.ndarray = TOP_IDS, logprobs: np.ndarray = TOP_LOGPROBS) -> dict[str, Any]:
    """Returns what SGLang sends for return_flat_raw_output_top_logprobs in base64."""
    return {
        "output_top_logprobs_shape": list(ids.shape),
        "output_top_logprobs_null_prefix": 0,
        "output_top_logprobs_idx_flat_b64": base64.b64encode(ids.tobytes()).decode(),
        "output_top_logprobs_val_flat_b64": base64.b64encode(logprobs.tobytes()).decode(),
    }


def read_top(meta: dict[str, Any], top_k: int = 2, **options: Any) -> Completion:
    return read_completion(
        answer(**meta, **options),
        where="http://a:1: request r",
        prompt_tokens=PROMPT,
        max_new_tokens=5,
        vocab_size=9,
        versions={6},
        top_k=top_k,
    )


def put(array: np.ndarray, place: tuple[int, int], value: float) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


def test_the_most_likely_tokens_are_read_if_they_were_asked_for() -> None:
    top = read_top(flat()).top_tokens
    assert top is not None
    np.testing.assert_array_equal(top.ids, TOP_IDS)
    np.testing.assert_array_equal(top.logprobs, TOP_LOGPROBS)
    assert (top.ids.dtype, top.logprobs.dtype) == (np.int32, np.float32)
    assert read_top(flat(), top_k=0).top_tokens is None
    rounded = read_top(flat(logprobs=put(TOP_LOGPROBS, (1, 0), 3e-7)[:, :1], ids=TOP_IDS[:, :1]), top_k=1).top_tokens
    assert rounded is not None
    assert rounded.logprobs[1] == 0


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, "output_top_logprobs: found none; expected: the 2 likeliest tokens as flat arrays; is the server SGLang"),
        (flat() | {"output_top_logprobs_val_flat_b64": None}, "output_top_logprobs: found none"),
        (flat(TOP_IDS[:4], TOP_LOGPROBS[:4]), "output_top_logprobs_shape: found [4, 2]; expected: [5, 2]"),
        (flat(TOP_IDS[:, :1], TOP_LOGPROBS[:, :1]), "output_top_logprobs_shape: found [5, 1]; expected: [5, 2]"),
        (flat(TOP_IDS[:4]) | {"output_top_logprobs_shape": [5, 2]}, "output_top_logprobs: cannot reshape"),
        (flat() | {"output_top_logprobs_idx_flat_b64": "*"}, "output_top_logprobs: "),
        (flat(put(TOP_IDS, (3, 1), 9)), "output_top_logprobs: token 3: found ids [1, 9]..., log-probs"),
        (flat(put(TOP_IDS, (3, 1), 1)), "token 3: found ids [1, 1]..., log-probs [-0.3"),
        (flat(logprobs=put(TOP_LOGPROBS, (2, 1), 0.1)), "token 2: found ids [4, 3]..., log-probs"),
        (flat(logprobs=put(TOP_LOGPROBS, (2, 1), np.nan)), "expected log-probs of at most 0"),
        (flat(logprobs=put(TOP_LOGPROBS, (3, 1), -0.2)), "token 3: found ids [1, 8]..., log-probs [-0.3"),
        # Another temperature than the sampled token's, or the rows of another token.
        (flat(logprobs=put(TOP_LOGPROBS, (1, 1), -0.6)), "token 1: found ids [2, 4]..., log-probs [-1.0"),
    ],
)
def test_the_error_for_bad_likely_tokens_names_server_request_and_field(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError) as caught:
        read_top(meta)
    assert str(caught.value).startswith("http://a:1: request r: output_top_logprobs")
    assert message in str(caught.value)


def test_a_request_that_was_aborted_while_it_waited_has_an_empty_answer() -> None:
    found = answer(tokens=0, reason="abort")
    for field in ("prompt_tokens", "completion_tokens", "output_token_logprobs", "weight_versions"):
        found["meta_info"].pop(field)
    completion = read(found)
    assert (completion.finish_reason, completion.token_ids, completion.versions) == ("abort", (), ())


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens", "output_token_logprobs", "weight_versions"])
def test_a_finished_answer_has_all_fields(field: str) -> None:
    found = answer()
    found["meta_info"].pop(field)
    with pytest.raises(RolloutError, match=field):
        read(found)


def test_an_aborted_answer_may_lack_the_likely_tokens() -> None:
    assert read_top({}, tokens=2, reason="abort").top_tokens is None


# ---- how a response ended, and values with the right type but no meaning

STOP = {"type": "stop", "matched": 4}


@pytest.mark.parametrize(
    ("meta", "longest", "message"),
    [
        ({}, 6, "finish_reason: found length after 5 tokens; expected: 6, as asked for; is the server's context"),
        ({"finish_reason": {"type": "stop"}}, 5, "finish_reason.matched: found None; expected: 4, the last of"),
        ({"finish_reason": {"type": "stop", "matched": 3}}, 5, "finish_reason.matched: found 3; expected: 4"),
        ({"finish_reason": {"type": "stop", "matched": "NaN happened"}}, 5, "finish_reason.matched: found 'NaN happ"),
        ({"finish_reason": {"type": "stop", "matched": True}}, 5, "finish_reason.matched: found True"),
        ({"prompt_tokens": PROMPT - 1}, 5, "prompt_tokens: found 2; expected: 3, as sent"),
        ({"prompt_tokens": ...}, 5, "prompt_tokens: "),
        ({"completion_tokens": 6}, 5, "completion_tokens: found 6; expected: 5, as in output_ids"),
        ({"weight_versions": spans(("9" * 5000, 0, 5))}, 5, "weight_versions.0.version: found '999"),
        ({"weight_versions": spans(("٦", 0, 5))}, 5, "weight_versions.0.version: found '٦'"),
        ({"weight_versions": spans(("06", 0, 5))}, 5, "weight_versions.0.version: found '06'"),
        ({"output_token_logprobs": [[-1e308, 4, None]] * 5}, 5, "output_token_logprobs.0.0: found -1e+308"),
        ({"output_token_logprobs": [[-3.5e38, 4, None]] * 5}, 5, "output_token_logprobs.0.0: found -3.5e+38"),
        ({"output_token_logprobs": [[float("nan"), 4, None]] * 5}, 5, "output_token_logprobs.0.0: found nan"),
        ({"output_token_logprobs": [["-0.5", 4, None]] * 5}, 5, "output_token_logprobs.0.0: found '-0.5'"),
        ({"output_token_logprobs": [[False, 4, None]] * 5}, 5, "output_token_logprobs.0.0: found False"),
        ({"output_token_logprobs": [[-0.5, True, None]] * 5}, 5, "output_token_logprobs.0.1: found True"),
    ],
)
def test_an_inconsistent_answer_gives_one_error(meta: dict[str, Any], longest: int, message: str) -> None:
    with pytest.raises(RolloutError) as caught:
        read(answer(**meta), longest=longest)
    assert str(caught.value).startswith("http://a:1: request r: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_stopped_response_may_be_shorter_than_the_limit() -> None:
    found = read(answer(finish_reason=STOP), longest=9)
    assert (found.finish_reason, len(found.token_ids)) == ("stop", 5)
    lowest = float(np.finfo(np.float32).min)
    kept = read(answer(output_token_logprobs=[[lowest, 4, None]] * 5)).logprobs
    assert np.isfinite(np.array(kept, np.float32)).all()
