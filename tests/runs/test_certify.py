"""The certificate of routing replay: it holds in every kind of layout, and fails if the replay is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from family_models import make_family_model
from forks import Forks
from tiny_models import make_tiny_model

from megatron_rl.certify import RECOMPUTE, VOCABULARY, CertifyError, run
from megatron_rl.certify.result import CertificateResult, CertificateSpec
from megatron_rl.certify.samples import LENGTHS, make_trace, token_of
from megatron_rl.cli import app
from megatron_rl.models.architecture import read_architecture
from megatron_rl.models.random_model import make_random_model

Check = Callable[[list[str], str], None]
TOKENS, MOE_LAYERS = sum(LENGTHS), 7
# Most trace bytes that a rank holds: its rows with padding x its MoE layers x top-4 x one byte.
TRACE_BYTES = {"tp=1": 270 * 7 * 4, "tp=2": 137 * 7 * 4, "cp=2,ep=2": 142 * 7 * 4, "tp=2,pp=2,ep=2": 137 * 4 * 4}


@pytest.fixture
def check(forked_ranks: None, capsys: pytest.CaptureFixture[str]) -> Check:
    def check(layouts: list[str], recompute: str) -> None:
        status = run(None, layouts, [recompute], device="cpu", as_json=True)
        lines = capsys.readouterr().out.splitlines()
        check_results(layouts, recompute, status, [json.loads(line) for line in lines if line.startswith("{")])

    return check


def check_results(layouts: list[str], recompute: str, status: int, results: list[dict[str, Any]]) -> None:
    assert [r["layout"] for r in results] == layouts
    for result in results:
        assert result["passed"], result
        assert result["replayed_rows"] + result["live_rows"] == TOKENS * MOE_LAYERS
        assert result["replayed_rows"] > 5 * result["live_rows"] > 0
        rerun = _rerun_layers(result["layout"], recompute)
        assert result["recomputed_rows"] == result["replayed_rows"] // MOE_LAYERS * rerun
        if result["layout"] in TRACE_BYTES:
            assert 1 <= result["trace_bytes"] / TRACE_BYTES[result["layout"]] <= 1.1
        expected = {"shifted by one row", "two layers swapped", "another sample's trace", "router fusion"}
        expected |= {"CP halves swapped"} if "cp=2" in result["layout"] else set()
        expected |= {"SP slices swapped"} if "tp=2" in result["layout"] else set()
        expected |= {"backward without replay"} if rerun else set()
        assert result["caught"] == dict.fromkeys(expected, True)
    assert status == 0


def _rerun_layers(layout: str, recompute: str) -> int:
    """Returns how many of the 7 MoE layers run their routers again; the first of the 8 layers is dense."""
    if recompute == "full:2":
        degrees = dict(part.split("=") for part in layout.split(","))
        stages = int(degrees.get("pp", 1)) * int(degrees.get("vpp", 1))
        return 2 * stages - 1
    return MOE_LAYERS if recompute in ("full", "moe") else 0


@pytest.mark.distributed
def test_the_certificate_holds_on_two_ranks(check: Check) -> None:
    """With recomputation: its passes begin with all that is done without it."""
    check(["tp=2", "pp=2,vpp=2", "cp=2,ep=2"], "full")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "recompute", [pytest.param("none", marks=pytest.mark.slow), "moe", pytest.param("full:2", marks=pytest.mark.slow)]
)
def test_the_certificate_holds_on_two_ranks_with_other_recomputation(check: Check, recompute: str) -> None:
    check(["pp=2" if recompute == "full:2" else "cp=2,ep=2"], recompute)


@pytest.mark.distributed
def test_the_certificate_holds_for_sigmoid_routers_with_a_bias_and_groups(
    forked_ranks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_family_model(tmp_path / "model", "deepseek_v3")
    status = run(model, ["tp=2,pp=2,ep=2"], ["full"], device="cpu", as_json=True)
    (result,) = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (status, result["passed"]) == (0, True), result
    assert result["replayed_rows"] + result["live_rows"] == TOKENS * 3
    assert all(result["caught"].values())


@pytest.mark.slow
@pytest.mark.distributed
def test_the_certificate_holds_with_few_experts(
    forked_ranks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of a token in padding chooses its trace by chance in 1 of 28 cases."""
    model = make_family_model(tmp_path / "model", "qwen3_next")
    assert run(model, ["cp=2,ep=2"], ["none"], device="cpu", as_json=True) == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    "layouts",
    [
        ["tp=1"],
        ["tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "ep=2", "dp=2", "cp=2,ep=2"],
        ["tp=2,ep=2,etp=2", "tp=2,pp=2,ep=2", "tp=2,cp=2"],
    ],
    ids=["1 rank", "2 ranks", "4 ranks"],
)
def test_the_certificate_holds_in_every_layout(check: Check, layouts: list[str], recompute: str) -> None:
    check(layouts, recompute)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("certify") / "model"
    make_random_model(path, VOCABULARY)
    return path


@pytest.mark.parametrize(
    ("mutation", "error"),
    [
        ("none", ""),
        ("replay off", ""),
        ("missing rows replayed", ""),
        ("micro-batches mixed up", "RoutingError: layer 1, micro-batch 0: routes"),
        ("hook not called", "RoutingError: layer 1: its router ran for micro-batches []"),
    ],
)
def test_a_broken_replay_is_not_certified(forks: Forks, model: Path, tmp_path: Path, mutation: str, error: str) -> None:
    spec, answer = tmp_path / "spec.json", tmp_path / "answer.json"
    spec.write_text(json.dumps(asdict(CertificateSpec(str(model), ["tp=1"], ["none"], "fp32", "cpu"))))
    done = forks.run(
        *("-m", "megatron_rl.certify.ranks", spec, answer), before=[("certify_worker:break_replay", mutation)]
    )
    if error:
        assert error in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (CertificateResult(**r) for r in json.loads(answer.read_bytes()))
    assert result.passed == (mutation == "none"), result


def test_a_users_own_model_is_certified(forked_ranks: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small = make_tiny_model(tmp_path / "small", num_layers=3, mlp_only_layers=(1,), norm_topk_prob=False)
    options = ["--device", "cpu", "--json", "--layout", "tp=1", "--recompute", "none"]
    with pytest.raises(SystemExit) as end:
        app(["certify", "--model", str(small), *options])
    (result,) = (json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{"))
    assert (end.value.code, result["passed"]) == (0, True), result
    assert result["replayed_rows"] + result["live_rows"] == TOKENS * 2


def test_trace_rows_have_different_experts(model: Path) -> None:
    arch = read_architecture(model)
    traces = [make_trace(arch, number, length) for number, length in enumerate(LENGTHS[:4])]
    rows = [tuple(row) for trace in traces for row in trace.experts[trace.present].reshape(-1, 4).tolist()]
    assert len(set(rows)) > 0.98 * len(rows)
    assert [token_of(i).sample for i in (0, LENGTHS[0] - 1, LENGTHS[0], TOKENS - 1)] == [0, 0, 1, len(LENGTHS) - 1]


def test_certify_refuses_unusable_models_and_layouts_before_ranks_start(model: Path, tmp_path: Path) -> None:
    dense = make_tiny_model(tmp_path / "dense", family="qwen3")
    for directory, layout, message in (
        (dense, "tp=1", "no layer has experts"),
        (model, "ep=3", "--layout ep=3: "),
    ):
        with pytest.raises(CertifyError, match=message):
            run(directory, [layout])
