"""A study of saved rollouts against transformers in float64: ratios under every routing, clips and gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forced_routers import (
    Choose,
    force,
    load,
    moe_layers,
    perturb,
    response_distributions,
    response_logprobs,
    save_sampled,
)
from forks import Forks
from rl_runs import write_config
from tiny_models import make_tiny_model

from megatron_rl.config.load import ConfigError, load_config
from megatron_rl.config.schema import Config
from megatron_rl.counterfactual.attribution import check_attribution
from megatron_rl.counterfactual.objectives_compared import load_objective
from megatron_rl.counterfactual.replay_study import ROUTINGS, StudyOptions, check_options
from megatron_rl.data.sample import Group, Sample
from megatron_rl.data.store import read_groups, write_groups

Lines = list[dict[str, Any]]
TOP_K, GROUP_SIZE, CLIP, HEAD = 2, 3, 0.05, 4
OBJECTIVES = ("own", "grpo", "rspo", "minirl", "mimo", "ppo", "score_centering")
COMPARED = tuple(name for name in OBJECTIVES if name != "ppo")
FEW = ("r2", "r3-agreeing", "frozen-router")
KINDS = ("router", "expert", "attention", "embedding", "other")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    old = make_tiny_model(root / "old", num_layers=4, mlp_only_layers=(1,))
    others = {"later": (3, 0.04), "older": (5, 0.1), "graft": (7, 0.1)}
    return {"old": old} | {name: perturb(old, root / name, *how) for name, how in others.items()}


@pytest.fixture(scope="module")
def saved(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of pi_old's weights with a fifth of the routes at random."""
    run_dir = tmp_path_factory.mktemp("saved")
    generator = torch.Generator().manual_seed(2)

    def drifted(_: int, probabilities: torch.Tensor) -> torch.Tensor:
        live = probabilities.topk(TOP_K, dim=-1).indices
        drawn = torch.rand(probabilities.shape, generator=generator).topk(TOP_K, dim=-1).indices
        return torch.where(torch.rand(len(live), 1, generator=generator) < 0.2, drawn, live)

    save_sampled(load(models["old"], torch.float32), run_dir, group=GROUP_SIZE, choose=drifted, top_k=HEAD)
    return run_dir


@pytest.fixture(scope="module")
def config(models: dict[str, Path], saved: Path) -> Path:
    return write_config(saved / "config.yaml", models["old"], saved)


def overrides(run_dir: Path, more: str = "") -> str:
    return f"run_dir={run_dir} rollout.group_size={GROUP_SIZE} train.mini_batches=2 {more}"


@pytest.fixture(scope="module")
def one(forks: Forks, config: Path, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Lines]:
    """On one rank: a study of everything, and a small one whose later weights are two updates away."""
    root = tmp_path_factory.mktemp("one")
    whole = {"step": 1, "routings": tuple(ROUTINGS), "objectives": OBJECTIVES}
    whole |= {key: models[key] for key in ("later", "older", "graft")}
    few = {"step": 1, "routings": FEW, "objectives": ("rspo", "score_centering"), "updates": 2}
    runs = [(overrides(root / "whole"), whole), (overrides(root / "few"), few)]
    (found,) = forks.world(1, "counterfactual_worker:studies", config, runs)
    return found


def of(lines: Lines, kind: str, **wanted: str) -> dict[str, Any]:
    (found,) = (x for x in lines if x["kind"] == kind and all(x[key] == value for key, value in wanted.items()))
    return found


# ---- the float64 reference


def samples(saved: Path) -> list[tuple[Group, Sample]]:
    groups = read_groups(saved / "rollouts" / "step-000001-dp-0000.jsonl")
    return [(group, sample) for group in groups for sample in group.samples]


def replayed(sample: Sample, routes: list[torch.Tensor], least: int = 0) -> Choose:
    """Replays routes [n, K] of each layer in the rows that have at least `least` experts of the live choice."""

    def choose(column: int, probabilities: torch.Tensor) -> torch.Tensor:
        ids = probabilities.topk(TOP_K, dim=-1).indices
        for row, wanted in enumerate(routes[column].tolist()):
            if len(set(wanted) & set(ids[row].tolist())) >= least:
                ids[row] = torch.tensor(wanted)
        return ids

    return choose


def traced(sample: Sample) -> list[torch.Tensor]:
    assert sample.trace is not None
    return [torch.as_tensor(column.astype(np.int64)) for column in sample.trace.experts.transpose(1, 0, 2)]


class Reference:
    def __init__(self, models: dict[str, Path]) -> None:
        self.models = {name: load(path) for name, path in models.items()}
        for name, owner in (("frozen-router", "old"), ("grafted-router", "graft")):
            model = self.models[name] = load(models["later"])
            for layer in moe_layers(model):
                gate = self.models[owner].model.layers[layer].mlp.gate.weight
                model.model.layers[layer].mlp.gate.weight.data.copy_(gate.data)

    def logprobs(self, name: str, sample: Sample, choose: Choose | None = None) -> tuple[torch.Tensor, Any]:
        chosen = force(self.models[name], choose)
        return response_logprobs(self.models[name], sample.token_ids, len(sample.prompt.token_ids)), list(chosen)

    def pair(self, routing: str, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns pi_old's and pi_theta's log-probs of the response."""
        later = routing if routing in self.models else "later"
        if routing.startswith("r3"):
            choose = replayed(sample, traced(sample), least=1 if routing == "r3-agreeing" else 0)
            return self.logprobs("old", sample, choose)[0].detach(), self.logprobs(later, sample, choose)[0]
        old, routes = self.logprobs("old", sample)
        if routing == "r2-stale":
            routes = self.logprobs("older", sample)[1]
        choose_new = replayed(sample, routes) if routing in ("r2", "r2-stale") else None
        return old.detach(), self.logprobs(later, sample, choose_new)[0]


@pytest.fixture(scope="module")
def reference(models: dict[str, Path]) -> Reference:
    return Reference(models)


def advantage(group: Group, sample: Sample) -> float:
    rewards = np.array([each.verdict.reward for each in group.samples if each.verdict])
    assert sample.verdict is not None
    return (sample.verdict.reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-30)


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "r3-weights"])
def test_ratios_and_clips_of_every_routing_equal_the_reference(
    one: list[Lines], reference: Reference, saved: Path, routing: str
) -> None:
    ratios, s, r, signs = [], [], [], []
    for group, sample in samples(saved):
        with torch.no_grad():
            old, new = reference.pair(routing, sample)
        log_r = (new - old).numpy()
        ratios.append(log_r)
        s.append(np.exp(log_r.mean()))
        signs.append(np.sign(advantage(group, sample)))
        r += [(np.exp(x), signs[-1]) for x in log_r]
    every = np.concatenate(ratios)
    found = of(one[0], "ratios", routing=routing)
    assert found["kl/old_policy/k3"] == pytest.approx((np.exp(every) - 1 - every).mean(), rel=2e-3)
    kept = np.sort(every)[len(every) // 100 : len(every) - len(every) // 100]
    assert found["log_r/trimmed_variance"] == pytest.approx(kept.var(), rel=2e-3)
    assert found["abs_log_s/mean"] == pytest.approx(np.abs(np.log(s)).mean(), rel=2e-3)
    low, high = (
        np.mean([sign * side > 0 and side * (x - 1) > CLIP for x, sign in zip(s, signs, strict=True)])
        for side in (-1, 1)
    )
    own = of(one[0], "objective", routing=routing, objective="own")
    assert (own["clip/low/active/sequence"], own["clip/high/active/sequence"]) == pytest.approx((low, high))
    grpo = of(one[0], "objective", routing=routing, objective="grpo")
    assert grpo["clip/high/active/token"] == pytest.approx(np.mean([x > 1.2 and sign > 0 for x, sign in r]))
    assert grpo["clip/low/any/token"] == pytest.approx(np.mean([x < 0.8 for x, _ in r]))


def test_the_routings_differ_and_their_shares_are_of_live_routing(one: list[Lines]) -> None:
    lines = {x["routing"]: x for x in one[0] if x["kind"] == "ratios"}
    assert set(lines) == {*ROUTINGS, "rerun"} - {"r3-weights"}
    same = {"r3", "r3-unordered"}  # they differ in rounding alone
    sizes = [x["kl/old_policy/k3"] for name, x in lines.items() if name not in same]
    assert len({round(size, 7) for size in sizes}) == len(sizes)
    for name, line in lines.items():
        for key in ("kl/old_policy/k3", "log_r/trimmed_variance", "abs_log_s/mean"):
            assert line[f"share/{key}"] == pytest.approx(1 - line[key] / lines["none"][key]), (name, key)
    assert 0 < lines["rerun"]["abs_log_r/p99"] < 1e-4 < lines["none"]["abs_log_r/p50"]  # 0 in the same micro-batches
    assert lines["r3"]["abs_logprob_gap/mean"] < 1e-4 < lines["none"]["abs_logprob_gap/mean"]


def test_what_is_not_available_is_said(one: list[Lines]) -> None:
    header = one[0][0]
    assert set(header["unavailable"]) == {"r3-weights", "ppo"}
    assert "no gate weights" in header["unavailable"]["r3-weights"]
    assert (header["mini_batches"], header["responses"], header["agree"]) == (2, 4 * GROUP_SIZE, 1)


def kind_of(name: str) -> str:
    for part, kind in ((".gate.", "router"), (".experts.", "expert"), ("self_attn", "attention")):
        if part in name:
            return kind
    return "embedding" if "embed_tokens" in name or "lm_head" in name else "other"


def gspo_gradient(reference: Reference, saved: Path, routing: str) -> dict[str, torch.Tensor]:
    """The float64 gradient of -mean min(s A, clip(s) A) over all responses, by kind of weight."""
    model = reference.models["later"]
    model.zero_grad()
    for group, sample in samples(saved):
        old, new = reference.pair(routing, sample)
        s, a = (new - old).mean().exp(), advantage(group, sample)
        (-torch.minimum(s * a, s.clamp(1 - CLIP, 1 + CLIP) * a) / (4 * GROUP_SIZE)).backward()
    return by_kind(model)


def by_kind(model: Any) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        parts[kind_of(name)].append(parameter.grad.flatten().clone())
    return {kind: torch.cat(each) for kind, each in parts.items()}


def test_gradients_and_their_cosines_equal_the_reference(one: list[Lines], reference: Reference, saved: Path) -> None:
    expected = {routing: gspo_gradient(reference, saved, routing) for routing in ("none", "r2")}
    for routing, its in expected.items():
        found = of(one[0], "gradient", routing=routing, objective="own")
        for kind, gradient in its.items():
            assert found[f"norm/{kind}"] == pytest.approx(float(gradient.norm()), rel=2e-3), (routing, kind)
    pair = of(one[0], "cosine", a=["none", "own"], b=["r2", "own"])  # type: ignore[arg-type]
    none, r2 = (torch.cat([its[kind] for kind in KINDS]) for its in expected.values())
    assert pair["cosine/all"] == pytest.approx(float(none @ r2 / none.norm() / r2.norm()), abs=2e-4)
    assert pair["cosine/all"] < 0.999, "the two routings have one gradient: nothing is tested"
    assert pair["relative_difference"] == pytest.approx(float((none - r2).norm() / none.norm()), rel=5e-3)
    one_router, other = (each["router"] for each in expected.values())
    cosine = float(one_router @ other / one_router.norm() / other.norm())
    assert pair["cosine/router"] == pytest.approx(cosine, abs=5e-4)


def test_score_centering_equals_the_reference(one: list[Lines], reference: Reference, saved: Path) -> None:
    """REINFORCE less the mean over mu of its terms, whose tail is in proportion to pi_theta's."""
    model, terms, masses = reference.models["later"], [], []
    force(model)
    model.zero_grad()
    for group, sample in samples(saved):
        assert sample.verdict is not None
        assert sample.top_tokens is not None
        a = sample.verdict.reward - float(np.mean([each.verdict.reward for each in group.samples if each.verdict]))
        prompt = len(sample.prompt.token_ids)
        log_p = response_distributions(model, sample.token_ids, prompt)
        own = log_p.gather(1, torch.as_tensor(sample.response_ids.astype(np.int64))[:, None])[:, 0]
        head = log_p.gather(1, torch.as_tensor(sample.top_tokens.ids.astype(np.int64)))
        q, p = torch.as_tensor(np.exp(sample.top_tokens.logprobs.astype(np.float64))), head.detach().exp()
        alpha = (1 - q.sum(1, keepdim=True)) / (1 - p.sum(1, keepdim=True))
        terms.append(a * (own - ((q - alpha * p) * head).sum(1)))
        masses.append(p.sum(1))
    half = len(terms) // 2  # of two mini-batches
    means = [torch.cat(each).mean() for each in (terms[:half], terms[half:])]
    (-(means[0] + means[1]) / 2).backward()
    found = of(one[0], "objective", routing="none", objective="score_centering")
    assert found["centering/policy_mass/mean"] == pytest.approx(float(torch.cat(masses).mean()), rel=1e-4)
    gradients = of(one[0], "gradient", routing="none", objective="score_centering")
    for kind, gradient in by_kind(model).items():
        assert gradients[f"norm/{kind}"] == pytest.approx(float(gradient.norm()), rel=2e-3), kind
    again = of(one[0], "objective", routing="rerun", objective="score_centering")
    assert again["centering/policy_mass/mean"] != pytest.approx(found["centering/policy_mass/mean"], rel=1e-4)


def test_a_mean_over_prompts_equals_the_reference(one: list[Lines], reference: Reference, saved: Path) -> None:
    """mimo: pi_theta/mu weighs A log pi_theta within [0.2, 5], and each prompt counts alike."""
    terms: dict[int, list[float]] = {}
    for group, sample in samples(saved):
        assert sample.verdict is not None
        a = sample.verdict.reward - float(np.mean([each.verdict.reward for each in group.samples if each.verdict]))
        with torch.no_grad():
            new = reference.pair("none", sample)[1].numpy()
        omega = np.exp(new - sample.rollout_logprobs[len(group.prompt.token_ids) :])
        kept = (omega >= 0.2) & (omega <= 5)
        terms.setdefault(group.index, []).extend(kept * omega * a * new)
    means = [np.mean(values) for _, values in sorted(terms.items())]
    found = of(one[0], "objective", routing="none", objective="mimo")
    assert found["loss"] == pytest.approx(-np.mean(means[:2]) - np.mean(means[2:]), rel=2e-3, abs=1e-5)


def test_pairs_of_gradients_differ_in_the_routing_or_in_the_objective(one: list[Lines]) -> None:
    gradients = {(x["routing"], x["objective"]) for x in one[0] if x["kind"] == "gradient"}
    routings = {*ROUTINGS, "rerun"} - {"r3-weights"}
    assert gradients == {(name, "own") for name in routings} | {("none", name) for name in COMPARED}
    pairs = [x for x in one[0] if x["kind"] == "cosine"]
    assert all((x["a"][0] == x["b"][0]) != (x["a"][1] == x["b"][1]) for x in pairs)
    assert len(pairs) == len(routings) * (len(routings) - 1) // 2 + math.comb(len(COMPARED), 2)
    noise = of(one[0], "cosine", a=["none", "own"], b=["rerun", "own"])  # type: ignore[arg-type]
    assert noise["cosine/all"] > 0.99999
    assert noise["relative_difference"] < 1e-3


# ---- layouts and errors


def assert_same(found: Lines, expected: Lines) -> None:
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys()
        noise = "rerun" in (line.get("routing"), *(line.get("a") or ()), *(line.get("b") or ()))
        for key, value in wanted.items():
            if isinstance(value, float) and not noise:
                assert line[key] == pytest.approx(value, rel=5e-3, abs=2e-5), (wanted, key)
            elif not isinstance(value, float) and key not in ("ranks",):
                assert line[key] == value, key


@pytest.mark.slow
@pytest.mark.distributed
def test_layouts_do_not_change_a_study(forks: Forks, config: Path, one: list[Lines], tmp_path: Path) -> None:
    few = {"step": 1, "routings": FEW, "objectives": ("rspo", "score_centering"), "updates": 2}
    layouts = ("parallel.tp=2", "parallel.pp=2", "parallel.cp=2 parallel.ep=2")
    assert of(one[1], "ratios", routing="none")["kl/old_policy/k3"] > 1e-5  # the updates changed something
    runs = [(overrides(tmp_path / str(number), layout), few) for number, layout in enumerate(layouts)]
    leader, follower = forks.world(2, "counterfactual_worker:studies", config, runs)
    assert follower == [[]] * len(layouts)
    for found in leader:
        assert_same(found, one[1])


@pytest.mark.distributed
def test_the_command_studies_rollouts_without_traces_on_two_leaders(
    forks: Forks, config: Path, saved: Path, tmp_path: Path
) -> None:
    import dataclasses

    plain = tmp_path / "plain"
    file = saved / "rollouts" / "step-000001-dp-0000.jsonl"
    groups = [
        dataclasses.replace(
            group, samples=tuple(dataclasses.replace(s, trace=None, top_tokens=None) for s in group.samples)
        )
        for group in read_groups(file)
    ]
    write_groups(plain / "rollouts" / file.name, groups, weight_version=0)
    arguments = [*overrides(tmp_path / "out").split(), f"rollout.replay_from={plain}", "--objective", "gspo"]
    run = forks.run("-m", "megatron_rl", "replay-study", config, *arguments, "--updates", "1", ranks=2, together=True)
    assert run.returncode == 0, run.stderr
    assert "not available: r3: 12 samples have no routing trace" in " ".join(run.stdout.split())
    assert "routings at the same weights (12 responses" in run.stdout
    assert (tmp_path / "out" / "replay_study.jsonl").read_bytes().count(b"\n") > 10
    again = forks.run("-m", "megatron_rl", "replay-study", config, *arguments)
    assert again.returncode == 2
    assert "is not an empty directory" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routings": ("r4",)}, "--routing: found 'r4'; expected one of none, r2, r3"),
        ({"objectives": ("gsop",)}, "presets: found 'gsop', expected one of"),
        ({"updates": 5}, "--updates: 5, but a step has train.mini_batches = 4"),
        ({"updates": 1, "later": "old"}, "--later and --updates both say what pi_theta is"),
        ({"agree": 3}, "--agree: 3, but a token has 2 experts"),
        ({"graft": Path("nowhere")}, "--graft: nowhere/config.json"),
        ({"older": "dense"}, "--older: .* of another architecture than model.path: .*num_experts 0, not 8"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    config: Path, models: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "older" in options:
        options = {"older": make_tiny_model(tmp_path / "dense", family="qwen3")}
    if "later" in options:
        options = {**options, "later": models["old"]}
    wanted: dict[str, Any] = {"step": 1, "routings": (), "objectives": ()} | options
    with pytest.raises(ConfigError, match=message):
        check_options(load_config(Config, config, [f"run_dir={tmp_path}"]), StudyOptions(**wanted))


def test_studies_in_fp8_are_refused(config: Path, tmp_path: Path) -> None:
    loaded = load_config(Config, config, [f"run_dir={tmp_path}", "engine.fp8=mxfp8"])
    for check in (check_attribution, lambda loaded: check_options(loaded, StudyOptions(1, (), ()))):
        with pytest.raises(ConfigError, match=r"engine.fp8: mxfp8, under which no routes are replayed yet"):
            check(loaded)


def test_an_objective_brings_its_own_rewards_and_no_other_section(config: Path, tmp_path: Path) -> None:
    own = load_config(Config, config, [f"run_dir={tmp_path}", "reward.overlong_cache=8", "optim.lr=0.5"])
    topr = load_objective("topr", own).config
    assert (topr.reward.correct, topr.reward.wrong, topr.reward.overlong_cache) == (1.0, -1.0, 8)
    assert (topr.objective.ratio, topr.optim, topr.rollout) == ("sequence-product", own.optim, own.rollout)
    file = tmp_path / "narrow.yaml"
    file.write_text("presets: [gspo]\nobjective: {clip: {low: 0.01}}\n")
    arm = load_objective(str(file), own)
    assert (arm.name, arm.objective.ratio) == ("narrow", "sequence")
    assert arm.objective.clip.model_dump() == {"kind": "min", "low": 0.01, "high": 4e-4, "dual": None}
