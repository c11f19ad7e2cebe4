"""The engine against transformers in every kind of layout, through the command `parity`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from parity_checks import Compare, check
from tiny_models import VOCAB_SIZE, make_tiny_model

from megatron_rl import parity

ONE_RANK = ["tp=1"]
TWO_RANKS = ["tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "ep=2", "dp=2", "cp=2,ep=2"]
FOUR_RANKS = ["tp=2,ep=2,etp=2", "tp=2,pp=2", "tp=2,pp=2,ep=2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "moe", num_layers=4, mlp_only_layers=(1,))


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [ONE_RANK, TWO_RANKS, FOUR_RANKS], ids=["1 rank", "2 ranks", "4 ranks"])
def test_log_probs_and_gradients_equal_transformers(
    compare: Compare, model: Path, tokens: Path, layouts: list[str]
) -> None:
    check(compare, model, tokens, layouts)


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["full", pytest.param("core_attn", marks=pytest.mark.slow)])
def test_parity_holds_with_recompute(compare: Compare, model: Path, tokens: Path, recompute: str) -> None:
    check(compare, model, tokens, ["tp=2", "pp=2,vpp=2", "cp=2,ep=2"], recompute)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["full", "core_attn"])
@pytest.mark.parametrize("layouts", [ONE_RANK, TWO_RANKS, FOUR_RANKS], ids=["1 rank", "2 ranks", "4 ranks"])
def test_parity_holds_with_recompute_in_every_layout(
    compare: Compare, model: Path, tokens: Path, layouts: list[str], recompute: str
) -> None:
    check(compare, model, tokens, layouts, recompute)


@pytest.mark.distributed
def test_parity_holds_with_uneven_stages(compare: Compare, tmp_path: Path, tokens: Path) -> None:
    model = make_tiny_model(tmp_path / "five", num_layers=5, mlp_only_layers=(1,))
    check(compare, model, tokens, ["pp=3", "pp=2,vpp=2", "tp=2,pp=2"])


@pytest.mark.distributed
def test_parity_holds_with_more_ranks_than_key_value_heads(compare: Compare, tmp_path: Path, tokens: Path) -> None:
    model = make_tiny_model(tmp_path / "shared", num_heads=8, mlp_only_layers=(1,))
    check(compare, model, tokens, ["tp=4"])
    model = make_tiny_model(tmp_path / "one", num_kv_heads=1, mlp_only_layers=(1,))
    check(compare, model, tokens, ["tp=2,cp=2,ep=2"], recompute="core_attn")


@pytest.mark.distributed
def test_parity_holds_with_tied_embeddings(compare: Compare, tmp_path: Path, tokens: Path) -> None:
    tied = make_tiny_model(tmp_path / "tied", num_layers=4, mlp_only_layers=(1,), tied=True)
    check(compare, tied, tokens, ["tp=2", "pp=2", "pp=2,vpp=2", "dp=2"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "full", "core_attn"])
@pytest.mark.parametrize("layouts", [ONE_RANK, TWO_RANKS, FOUR_RANKS], ids=["1 rank", "2 ranks", "4 ranks"])
def test_parity_holds_with_tied_embeddings_in_every_layout(
    compare: Compare, tmp_path: Path, tokens: Path, layouts: list[str], recompute: str
) -> None:
    tied = make_tiny_model(tmp_path / "tied", num_layers=4, mlp_only_layers=(1,), tied=True)
    check(compare, tied, tokens, layouts, recompute)


@pytest.mark.distributed
def test_in_bf16_the_engine_is_as_near_to_fp32_as_transformers_in_bf16(
    compare: Compare, model: Path, tokens: Path
) -> None:
    status, (result,) = compare(model, tokens, ["tp=1"], dtype="bf16")
    assert (status, result["passed"]) == (0, True)
    for name, bound in (("logprob_rms", "logprob"), ("grad_rms", "grad"), ("grad_tensor_rms", "grad_tensor")):
        assert 1e-3 < result[name] <= result["bounds"][bound]


@pytest.mark.slow
@pytest.mark.distributed
def test_parity_holds_for_a_dense_model_and_for_unnormalised_routes(
    compare: Compare, tmp_path: Path, tokens: Path
) -> None:
    check(compare, make_tiny_model(tmp_path / "dense", family="qwen3", num_layers=4), tokens, ["tp=2", "pp=2", "cp=2"])
    raw = make_tiny_model(tmp_path / "raw", num_layers=2, norm_topk_prob=False)
    check(compare, raw, tokens, ["tp=2", "ep=2"])


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_parity_fails_if_two_experts_are_swapped(
    compare: Compare, model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """The engine reads a copy of transformers' model in which experts 2 and 5 of layer 0 are swapped."""
    import shutil

    from safetensors.torch import load_file, save_file

    swapped = tmp_path / "swapped"
    shutil.copytree(model, swapped)
    weights = load_file(swapped / "model.safetensors")
    for part in ("gate_proj", "up_proj", "down_proj"):
        a, b = (f"model.layers.0.mlp.experts.{e}.{part}.weight" for e in (2, 5))
        weights[a], weights[b] = weights[b].clone(), weights[a].clone()
    save_file(weights, swapped / "model.safetensors", metadata={"format": "pt"})
    plain = parity.write_reference
    monkeypatch.setattr(parity, "write_reference", lambda _, *rest: plain(model, *rest))
    # Under pp=2 rank 0, which reports, has no log-probs of its own.
    status, results = compare(swapped, tokens, ["tp=1", "pp=2"], dtype=dtype)
    assert status == 1
    for result in results:
        assert not result["passed"]
        assert result["logprob_max"] > 1e-3


# ---- against a live server -------------------------------------------------------------------------------------


@pytest.mark.server
def test_parity_passes_for_a_server_with_the_same_weights(
    compare: Compare, served: str, tiny_model_dir: Path, tokens: Path
) -> None:
    sequences = [json.loads(line) for line in tokens.read_text().splitlines()]
    assert any(VOCAB_SIZE - 1 in ids[1:] for ids in sequences)  # SGLang reports this token under another id
    status, (engine, server) = compare(tiny_model_dir, tokens, ["tp=1"], url=served)
    assert status == 0
    assert (engine["layout"], engine["passed"]) == ("tp=1", True)
    assert (server["server"], server["tokens"], server["passed"]) == (served, 235, True)
    assert 0 < server["logprob_max"] <= server["bounds"]["logprob"] == 2e-5


@pytest.mark.server
def test_parity_fails_for_a_server_with_other_weights(
    forked_ranks: None, served: str, tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    capsys.readouterr()
    assert parity.run(other, tokens, ["tp=1"], device="cpu", url=served) == 1
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    (engine,) = (row for row in rows if row[0] == "tp=1")
    (server,) = (row for row in rows if row[0] and served.startswith(row[0]))
    assert (engine[1], engine[-1]) == (server[1], "yes")
    assert (float(server[2]) > 0.1, server[-1]) == (True, "NO")
    assert served in "".join(row[0] for row in rows)


def test_parity_asks_the_server_before_it_starts_ranks(
    model: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from megatron_rl.rollout.answers import RolloutError

    monkeypatch.setattr(parity, "_run_ranks", None)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as no_sglang:
        Thread(target=no_sglang.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{no_sglang.server_port}"
        with pytest.raises(RolloutError, match=f"{url}/generate: status 501"):
            parity.run(model, tokens, ["tp=1"], url=url)
        no_sglang.shutdown()


# ---- input -----------------------------------------------------------------------------------------------------


def test_the_error_for_unusable_tokens_names_the_line(model: Path, tmp_path: Path) -> None:
    from megatron_rl.parity import ParityError, read_tokens

    for content, message in (
        ("[1, 2]\n[3]", ":2: expected a list of at least two"),
        ("[1, 2]\nx", ":2: not JSON"),
        ("[1, 99]", ":1: token 99 is not in the model's vocabulary of 44"),
        ("\n", "no sequences"),
    ):
        path = tmp_path / "tokens.jsonl"
        path.write_text(content)
        with pytest.raises(ParityError, match=message):
            read_tokens(path, 44)
