"""The mismatch of a rollout engine with an injected fault is attributed to that fault, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from forced_routers import force, load, moe_layers, save_sampled
from forks import Forks
from rl_runs import write_config
from tiny_models import make_tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_rl.config.load import ConfigError, load_config
from megatron_rl.config.schema import Config
from megatron_rl.counterfactual.attribution import check_attribution
from megatron_rl.counterfactual.substitutions import added_up

Lines = list[dict[str, Any]]
LAYER, EXPERT = 2, 5
"""Where the faults are: a layer with experts after a dense one."""


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def in_bf16(module: torch.nn.Module) -> None:
    """Makes a module read and write bf16."""
    for parameter in module.parameters():
        parameter.data = rounded(parameter.data)
    module.register_forward_pre_hook(lambda _, args: tuple(map(rounded, args)))
    module.register_forward_hook(lambda _, __, out: rounded(out))


def bf16_attention(model: Any) -> None:
    def core(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any, scaling: float, **___: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(
            rounded(q), rounded(k), rounded(v), is_causal=True, scale=scaling, enable_gqa=True
        )
        return rounded(out).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("rounded", core)
    model.set_attn_implementation("rounded")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            in_bf16(getattr(layer.self_attn, name))


def bf16_norms(model: Any) -> None:
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            in_bf16(module)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of attributions; beside it the rollouts of an engine with each fault."""
    root = tmp_path_factory.mktemp("attribution")
    model = make_tiny_model(root / "model", num_layers=4, mlp_only_layers=(1,))
    save_sampled(load(model, torch.float32), root / "clean")

    generator = torch.Generator().manual_seed(4)
    shuffled = load(model, torch.float32)
    column = moe_layers(shuffled).index(LAYER)

    def choose(number: int, probabilities: torch.Tensor) -> torch.Tensor:
        live = probabilities.topk(2, dim=-1).indices
        return live[torch.randperm(len(live), generator=generator)] if number == column else live

    save_sampled(shuffled, root / "shuffled", choose=choose)

    head = load(model, torch.float32)
    weight = head.lm_head.weight.data.bfloat16()
    head.lm_head.forward = lambda hidden: (hidden.bfloat16() @ weight.T).float()
    save_sampled(head, root / "head")

    scaled = load(model, torch.float32)
    scaled.model.layers[LAYER].mlp.experts.down_proj.data[EXPERT] *= 1.2
    save_sampled(scaled, root / "scaled")

    for part, change in (("attention", bf16_attention), ("norms", bf16_norms)):
        changed = load(model, torch.float32)
        change(changed)
        save_sampled(changed, root / part)
    save_sampled(load(model, torch.float32), root / "gates", rounds_gates=True)
    return write_config(root / "config.yaml", model, root / "clean")


def overrides(config: Path, fault: str, run_dir: Path, more: str = "") -> str:
    return f"run_dir={run_dir} rollout.replay_from={config.parent / fault} {more}"


@pytest.fixture(scope="module")
def one(forks: Forks, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lines]:
    """Attributions on one rank, by fault."""
    root = tmp_path_factory.mktemp("one")
    faults = ("shuffled", "head", "scaled", "attention", "norms", "gates")
    whole = "train.mini_batches=1 engine.max_tokens_per_micro_batch=600"
    runs = [overrides(config, fault, root / fault, whole) for fault in faults]
    (found,) = forks.world(1, "counterfactual_worker:attributions", config, runs)
    return dict(zip(faults, found, strict=True))


def shares(lines: Lines) -> dict[str, float]:
    return {line["part"]: line["share"] for line in lines if line["kind"] == "substitution"}


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("shuffled", f"routing of layer {LAYER}"),
        ("head", "head"),
        ("scaled", f"expert {EXPERT} of layer {LAYER}"),
        ("attention", "attention"),
        ("norms", "norms"),
        ("gates", "gate weights"),
    ],
)
def test_an_injected_fault_is_named_as_the_cause(one: dict[str, Lines], fault: str, cause: str) -> None:
    assert one[fault][0]["before/mean"] > 1e-4
    assert one[fault][0]["cause"] == cause, shares(one[fault])
    if cause in shares(one[fault]):
        assert shares(one[fault])[cause] > 0.9
    assert abs(shares(one[fault])["expert order"]) < 0.01  # of two experts the order does not matter


def test_shuffled_routes_of_a_layer_are_explained_by_replaying_that_layer_alone(one: dict[str, Lines]) -> None:
    lines = one["shuffled"]
    assert shares(lines)["routing"] > 0.999
    assert all(share < 0.3 for part, share in shares(lines).items() if part != "routing")
    layers = {line["layer"]: line for line in lines if line["kind"] == "layer"}
    assert layers.keys() == {0, 2, 3}
    assert layers[LAYER]["share"] > 0.999
    assert all(line["share"] < 0.3 for layer, line in layers.items() if layer != LAYER)
    assert layers[0]["set_mismatch"] == 0
    assert layers[LAYER]["set_mismatch"] > 0.5


def test_a_head_in_bf16_is_explained_by_the_head_alone(one: dict[str, Lines]) -> None:
    found = shares(one["head"])
    assert found["head"] > 0.95
    assert all(share < 0.2 for part, share in found.items() if part != "head")


def test_a_scaled_expert_is_explained_by_no_part_but_its_tokens_stand_out(one: dict[str, Lines]) -> None:
    lines = one["scaled"]
    assert max(shares(lines).values()) < 0.5
    (joint,) = (line for line in lines if line["kind"] == "joint")
    assert joint["unattributed"] > 0.5
    first, second = [line for line in lines if line["kind"] == "expert"][:2]
    assert (first["layer"], first["expert"]) == (LAYER, EXPERT)
    assert first["t"] > 1.5 * second["t"]
    assert first["mean"] > 2 * first["others"]


def assert_same(found: Lines, expected: Lines, fault: str, *, splits_sums: bool) -> None:
    assert len(found) == len(expected)
    if fault == "scaled":
        by_place = [{(x["layer"], x["expert"]): x for x in each if x["kind"] == "expert"} for each in (found, expected)]
        assert by_place[0].keys() == by_place[1].keys()
        for place, wanted in by_place[1].items():
            numbers = {key: value for key, value in wanted.items() if isinstance(value, float)}
            assert {key: by_place[0][place][key] for key in numbers} == pytest.approx(numbers, rel=1e-2, abs=1e-3), (
                place
            )
    # The contrasts of the other faults are of rounding: nothing is left when all routes are replayed.
    found, expected = ([x for x in lines if x["kind"] != "expert"] for lines in (found, expected))
    for line, wanted in zip(found, expected, strict=True):
        if line.get("part") == "expert order" and "unavailable" in line:
            continue  # under expert parallelism
        assert line.keys() == wanted.keys() or line["kind"] == "joint"
        # A number next to the middle of two bf16 numbers is rounded to either, and moves the tail of a gap.
        loose = line["kind"] == "joint" or line.get("part", "routing") != "routing"
        for key, value in wanted.items():
            if not isinstance(value, float):
                assert loose or line[key] == value, (wanted, key)
            elif not loose:
                assert line[key] == pytest.approx(value, rel=1e-2, abs=1e-3), (wanted, key)
            elif key in ("after/mean", "share") and key in line:
                # Tensor parallelism rounds the parts of a sum to bf16 before they are added: .0425 against .0379 here.
                rel = 0.2 if splits_sums and line.get("part") == "precision" else 0.05
                assert line[key] == pytest.approx(value, rel=rel, abs=0.05 if key == "share" else 2e-3), (wanted, key)


@pytest.mark.slow
@pytest.mark.distributed
def test_layouts_do_not_change_an_attribution(
    forks: Forks, config: Path, one: dict[str, Lines], tmp_path: Path
) -> None:
    runs = [("shuffled", "parallel.pp=2"), ("head", "parallel.tp=2"), ("scaled", "parallel.cp=2 parallel.ep=2")]
    cut = "train.mini_batches=2 engine.max_tokens_per_micro_batch=300"
    words = [overrides(config, fault, tmp_path / fault, f"{layout} {cut}") for fault, layout in runs]
    leader, follower = forks.world(2, "counterfactual_worker:attributions", config, words)
    assert follower == [[]] * len(runs)
    for (fault, layout), found in zip(runs, leader, strict=True):
        assert_same(found, one[fault], fault, splits_sums="tp=" in layout)


def test_the_command_finds_no_cause_where_there_is_none(forks: Forks, config: Path, tmp_path: Path) -> None:
    words = overrides(config, "clean", tmp_path / "out").split()
    run = forks.run("-m", "megatron_rl", "attribute", config, *words)
    assert run.returncode == 0, run.stderr
    assert "one part substituted at a time" in run.stdout
    head = orjson.loads((tmp_path / "out" / "attribution.jsonl").read_bytes().splitlines()[0])
    assert head["before/max"] < 1e-4
    assert head["cause"] == "none"
    assert "cause: none" in run.stdout


def test_experts_are_added_up_by_falling_gate_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    gates = torch.rand(50, 8, generator=generator)
    chosen = torch.zeros(50, 8, dtype=torch.bool).scatter(1, gates.argsort(dim=1)[:, 2:6], True)
    gates = gates * chosen
    experts, tokens = chosen.t().nonzero(as_tuple=True)
    outputs = torch.randn(len(tokens), 16, generator=generator).bfloat16()
    out = torch.zeros(50, 1, 16, dtype=torch.bfloat16)
    found, bias = added_up({"routed": (gates, chosen), "output": outputs}, (out, None))
    differs = False
    for token in range(50):
        rows = {int(e): outputs[n] for n, (e, t) in enumerate(zip(experts, tokens, strict=True)) if t == token}
        falling, ascending = out[0, 0], out[0, 0]
        for expert in sorted(rows, key=lambda e: -float(gates[token, e])):
            falling = falling + rows[expert]
        for expert in sorted(rows):
            ascending = ascending + rows[expert]
        assert torch.equal(found[token, 0], falling)
        differs |= not torch.equal(falling, ascending)
    assert differs
    assert bias is None


def test_an_attribution_needs_saved_rollouts(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.replay_from: not set; name the run directory"):
        check_attribution(load_config(Config, config, [f"run_dir={tmp_path}", "rollout.replay_from=null"]))


def test_forced_routes_are_those_of_the_model_itself(tmp_path: Path) -> None:
    """Otherwise the faults above would be of the test's own making."""
    path = make_tiny_model(tmp_path / "model", num_layers=2)
    ids = torch.randint(2, 30, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = load(path)(ids).logits
        forced = load(path)
        force(forced)
        assert torch.allclose(forced(ids).logits, plain, atol=1e-6)
