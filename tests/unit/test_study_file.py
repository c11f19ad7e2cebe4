"""Study files: what is read, what is refused with which words, and the plan that follows."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from paths import ROOT
from study_files import QUESTION, write_study
from tiny_models import make_tiny_model

from megatron_rl.config.load import ConfigError
from megatron_rl.study.fingerprint import take_fingerprint
from megatron_rl.study.planning import Plan, check_files, make_plan
from megatron_rl.study.study_file import load_study

FEW = {"data": {"train": "arithmetic:terms=3,count=600"}}
ARMS: dict[str, Any] = {"a": {}, "b": {"set": {"optim": {"lr": 1e-4}}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("study") / "model", num_layers=1)


@pytest.fixture
def base(model: Path, tmp_path: Path) -> Path:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "base.yaml"
    file.write_text(
        f"""
presets: [grpo]
run_dir: unset
model: {{path: {tmp_path / "model"}}}
data: {{train: "arithmetic:terms=3", max_prompt_tokens: 16}}
rollout: {{prompts_per_step: 8, max_response_tokens: 16}}
train: {{steps: 3}}
"""
    )
    return file


def plan_of(base: Path, arms: dict[str, Any] | None = None, **keys: Any) -> Plan:
    file = write_study(base.with_name("study.yaml"), base, arms or ARMS, **keys)
    return make_plan(load_study(file), file)


def refusal(base: Path, arms: dict[str, Any] | None = None, **keys: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        plan_of(base, arms, **keys)
    return str(refused.value)


# ---- the plan --------------------------------------------------------------------------------------------------


def test_each_arm_is_run_with_each_seed_and_its_own_values(base: Path) -> None:
    plan = plan_of(base, seeds=[5, 3], set={"optim": {"eps": 1e-6}}, budget={"steps": 7, "minutes": 2.0})
    assert [(run.task, run.run) for run in plan.runs] == [
        (0, "a-seed-3"),
        (1, "b-seed-3"),
        (2, "a-seed-5"),
        (3, "b-seed-5"),
    ]
    for run in plan.runs:
        config = run.config
        assert (config.seed, config.train.steps, config.train.max_minutes, config.optim.eps) == (run.seed, 7, 2.0, 1e-6)
        assert config.run_dir == base.with_name("study") / "runs" / run.run
        assert config.optim.lr == (1e-4 if run.arm == "b" else 1e-6)


def test_a_grid_is_written_out(base: Path) -> None:
    arms = {
        "{replay}-n{n}-lr{lr}": {
            "grid": {"replay": ["none", "r2"], "n": [1, 4], "lr": [1e-4, 2e-4, 4e-4]},
            "at": {"kind": "grid"},
            "set": {"routing": {"replay": "{replay}"}, "train": {"mini_batches": "{n}"}, "optim": {"lr": "{lr}"}},
        }
    }
    plan = plan_of(base, arms)
    assert len(plan.runs) == 12
    run = next(run for run in plan.runs if run.arm == "r2-n4-lr0.0002")
    assert run.at == {"kind": "grid", "replay": "r2", "n": 4, "lr": 2e-4}
    assert (run.config.routing.replay, run.config.train.mini_batches, run.config.optim.lr) == ("r2", 4, 2e-4)


def test_runs_that_others_replay_come_first(base: Path) -> None:
    arms = {
        "none": {"replay": {"from": "collect"}},
        "r2": {"replay": {"from": "collect", "seed": 0}, "set": {"routing": {"replay": "r2"}}},
        "collect": {"ranks": 2},
    }
    plan = plan_of(base, arms, seeds=[0, 1])
    assert [(run.run, run.ranks, run.needs) for run in plan.runs] == [
        ("collect-seed-0", 2, None),
        ("collect-seed-1", 2, None),
        ("none-seed-0", 1, "collect-seed-0"),
        ("r2-seed-0", 1, "collect-seed-0"),
        ("none-seed-1", 1, "collect-seed-1"),
        ("r2-seed-1", 1, "collect-seed-0"),
    ]
    runs = base.with_name("study") / "runs"
    assert plan.runs[4].config.rollout.replay_from == runs / "collect-seed-1"
    assert plan.runs[5].config.rollout.replay_from == runs / "collect-seed-0"


def test_an_arm_starts_from_the_model_of_another(base: Path, model: Path) -> None:
    """Models and rollouts that the study makes are no part of its fingerprint."""
    arms: dict[str, Any] = {
        "graft": {"start": {"from": "train", "graft": ["router", "embedding"]}},
        "again": {"start": {"from": "train", "seed": 0}, "set": {"optim": {"lr": 1e-9}}},
        "third": {"start": {"from": "again"}},
        "replay": {"replay": {"from": "train"}, "seeds": [0]},
        "train": {},
    }
    plan = plan_of(base, arms, seeds=[0, 1], set=FEW)
    check_files(plan)
    study = base.with_name("study")
    assert [run.run for run in plan.runs[:2]] == ["train-seed-0", "train-seed-1"]
    assert [run.run for run in plan.runs[-2:]] == ["third-seed-0", "third-seed-1"]
    by_name = {run.run: run for run in plan.runs}
    grafted, again, third = by_name["graft-seed-1"], by_name["again-seed-1"], by_name["third-seed-1"]
    assert (grafted.needs, again.needs, third.needs) == ("train-seed-1", "train-seed-0", "again-seed-1")
    assert all(run.needs_model for run in (grafted, again, third))
    assert not plan.runs[0].needs_model
    assert again.config.model.path == study / "runs" / "train-seed-0" / "model"
    assert third.config.model.path == study / "runs" / "again-seed-1" / "model"
    assert again.graft is third.graft is None
    assert grafted.graft is not None
    assert grafted.as_json()["graft"] == {
        "donor": str(base.with_name("model")),
        "base": str(study / "runs" / "train-seed-1" / "model"),
        "out": str(grafted.config.model.path),
        "kinds": ("router", "embedding"),
    }
    assert grafted.config.model.path == study / "models" / "graft-seed-1"
    configs = {run.run: run.config for run in plan.runs}
    shutil.copytree(model, study / "runs" / "train-seed-0" / "model")  # the study may have made some already
    taken = take_fingerprint(base, b"", plan.bases, configs, study)
    assert {Path(name).parent for name in taken["model"]} == {base.with_name("model")}
    assert taken["rollouts"] == {}


def test_an_arm_starts_from_a_model_of_its_own_architecture(base: Path) -> None:
    make_tiny_model(base.with_name("wide"), num_layers=1, ffn_hidden_size=64)
    other = {"set": {"model": {"path": str(base.with_name("wide"))}}}
    told = refusal(base, {"a": other, "b": {"start": {"from": "a", "graft": ["router"]}}})
    assert "arms.b.start: model.path is of another architecture than that of a: ffn_hidden_size 96, not 64" in told


def test_a_factor_alone_may_name_the_arm_that_another_needs(base: Path) -> None:
    arms = {"{n}": {"grid": {"n": [1, 2]}}, "from-{n}": {"grid": {"n": [1, 2]}, "start": {"from": "{n}"}}}
    assert [run.needs for run in plan_of(base, arms).runs] == [None, None, "1-seed-0", "2-seed-0"]


def test_a_note_on_several_arms_is_told_once(base: Path) -> None:
    parent = base.read_text().replace("rollout: {", "optim: {schedule: cosine, decay_steps: 9}\nrollout: {")
    base.with_name("parent.yaml").write_text(parent)
    base.write_text("presets: [parent.yaml]\n")
    constant = {"set": {"optim": {"schedule": "constant"}}}
    frozen = {"set": {"optim": {"freeze": ["router"]}, "engine": {"aux_loss_coefficient": 0.1}}}
    cases: list[dict[str, Any]] = [{"a": constant, "b": {}, "c": constant}, {"a": frozen}, {"a": {}}]
    plans = [plan_of(base, arms).notes for arms in cases]
    assert [[note.partition(" ")[0] for note in notes] for notes in plans] == [["2"], ["arms.a:"], []]
    assert plans[0][0].startswith("2 arms, from a on: optim.decay_steps: 9 does nothing")
    assert plan_of(base, {"a": constant, "b": constant}).notes[0].startswith("all arms: optim.decay_steps: 9")


def test_base_is_relative_to_the_study_file_and_an_arm_may_have_its_own(base: Path) -> None:
    base.with_name("other.yaml").write_text("presets: [base.yaml, gspo]\n")
    file = write_study(base.with_name("study.yaml"), Path("base.yaml"), {"a": {}, "b": {"base": "other.yaml"}})
    plan = make_plan(load_study(file), file)
    assert [run.config.objective.ratio for run in plan.runs] == ["token", "sequence"]
    assert plan.bases == (base, base.with_name("other.yaml"))


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"question": ""}, 'study.yaml:1: question: found "", expected String should have at least 1 character'),
        ({"seeds": []}, "seeds: found [], expected"),
        ({"seeds": [1, 1]}, "seeds: found [1, 1], expected each seed once"),
        ({"seeds": ["1"]}, 'seeds.0: found "1", expected a valid integer'),
        ({"sedes": [1]}, "sedes: no such key"),
        ({"budget": {"hours": 1}}, "budget.hours: no such key"),
        ({"set": {"seed": 3}}, "set: seed is set by the study itself"),
        ({"rule": {"kind": "slop"}}, "rule: found {\"kind\": \"slop\"}, expected a `kind`: 'difference', 'slope'"),
        (
            {"rule": {"kind": "share", "metric": "m", "of": "a"}},
            "rule.without: not set, and it has no default",
        ),
        (
            {"rule": {"kind": "share", "metric": "m", "of": "a", "without": "b", "confirms": {"min": 1}}},
            "rule: no metric is called 'm'; `metrics` declares: none",
        ),
        (
            {
                "metrics": {"m": {"name": "loss"}},
                "rule": {"kind": "share", "metric": "m", "of": "a", "without": "bb", "confirms": {"min": 1}},
            },
            "rule: no arm is called 'bb'",
        ),
        (
            {
                "metrics": {"m": {"name": "loss"}},
                "rule": {
                    "kind": "all",
                    "of": [{"kind": "threshold", "metric": "m", "arm": "x", "confirms": {"min": 1}}],
                },
            },
            "rule.of.0: no arm is called 'x'",
        ),
        (
            {
                "metrics": {"m": {"name": "loss"}},
                "rule": {"kind": "slope", "metric": "m", "x_factor": "n", "confirms": {"min": 1}},
            },
            "rule: no arm has 'n' in its `at` or `grid`",
        ),
        (
            {"also": {"x": {"kind": "threshold", "metric": "m", "arm": "a", "confirms": {}}}},
            "also.x.confirms: found {}, expected a band with `min`, `max` or both",
        ),
        (
            {
                "also": {
                    "x": {
                        "kind": "threshold",
                        "metric": "m",
                        "arm": "a",
                        "confirms": {"min": 0.1},
                        "refutes": {"max": 0.2},
                    }
                }
            },
            "expected `confirms` and `refutes` without a number in common",
        ),
        ({"metrics": {"m": {"name": ["a", "b"]}}}, "metrics.m: `combine` is for a `name` of two metrics"),
        ({"metrics": {"m": {"name": "a", "combine": "sum"}}}, "metrics.m: `combine` is for a `name` of two metrics"),
        ({"stops": [{"kind": "fall"}]}, "stops.0.name: not set"),
        (
            {"stops": [{"kind": "fall", "name": "avg_at"}]},
            "stops.0.name: found 'avg_at', which no line of eval.jsonl has",
        ),
        (
            {"metrics": {"m": {"name": "kl/old_polcy/k3"}}},
            "no line of metrics.jsonl has; did you mean 'kl/old_policy/k3'?",
        ),
        (
            {"metrics": {"m": {"name": "loss", "mini_batches": [9]}}},
            "m.mini_batches: found [9], but the arms have at most",
        ),
        (
            {"metrics": {"m": {"file": "eval", "name": "avg_at_k", "error": "binomial"}}},
            "metrics.m.error: one evaluation has it, and reduce is mean; take first or last",
        ),
        (
            {
                "metrics": {"m": {"name": "loss"}},
                "rule": {"kind": "difference", "metric": "m", "arm": "a", "against": "a", "confirms": {"min": 2}},
            },
            "rule: 'a' is compared with itself; name another arm",
        ),
        (
            {
                "metrics": {"m": {"name": "loss"}},
                "rule": {"kind": "threshold", "metric": "m", "arm": "a", "confirms": {"min": 2}, "seeds": 2},
            },
            "rule.seeds: found 2, but the runs have 1 seeds",
        ),
        ({"set": {"optim": {"rl": 1}}}, "arms.a: override 'optim={\"rl\": 1}': optim.rl: no such key"),
    ],
)
def test_a_study_file_with_a_mistake_is_refused(base: Path, keys: dict[str, Any], words: str) -> None:
    assert words in refusal(base, **keys)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"a b": {}}, "arms: found 'a b', expected a name of letters"),
        ({"a/b": {}}, "arms: found 'a/b', expected a name of letters"),
        ({"a-{n}": {}}, "arms: found 'a-{n}', expected a name of letters"),
        ({"a": {"grid": {"n": [1, 2]}}}, "arms: two arms are called 'a'; put every factor of a grid into its name"),
        ({"a": {"replay": {"from": "c"}}}, "arms.a.replay: no arm is called 'c'"),
        ({"a": {"replay": {"from": "b"}}, "b": {"replay": {"from": "a"}}}, "replays rollouts itself and saves none"),
        ({"a": {"replay": {"from": "b"}}, "b": {"seeds": [7]}}, "arms.a.replay: b has no seed 0; its seeds are [7]"),
        (
            {"a": {"replay": {"from": "b"}}, "b": {"set": {"rollout": {"group_size": 4}}}},
            "arms.a: rollout.group_size: 8, but b saves rollouts with 4",
        ),
        (
            {"a": {"replay": {"from": "b"}}, "b": {"set": {"train": {"steps": 1}}}},
            "arms.a: train.steps: 3, but b saves 1 steps",
        ),
        ({"a": {"start": {"from": "c"}}}, "arms.a.start: no arm is called 'c'"),
        ({"a": {"start": {"from": "b", "seed": 3}}, "b": {}}, "arms.a.start: b has no seed 3; its seeds are [0]"),
        (
            {"a": {"start": {"from": "b"}}, "b": {"start": {"from": "c"}}, "c": {"start": {"from": "a"}}},
            "arms.b.start: c needs b itself, directly or through other arms",
        ),
        ({"a": {"start": {"from": "b"}, "replay": {"from": "b"}}, "b": {}}, "arms.a.start: an arm has `replay` or"),
        ({"a": {"start": {"from": "b", "graft": ["routers"]}}, "b": {}}, "start.graft.0: found"),
        (
            {"a": {"set": {"rollout": {"replay_from": "x"}}}},
            "arms.a.set: rollout.replay_from is set by the study itself; use",
        ),
        ({"b": {"ranks": 3, "set": {"parallel": {"tp": 2}}}}, "arms.b: parallel: tp * cp * pp = 2 does not divide"),
        (
            {"a": {"set": {"rollout": {"servers": {"colocate": True}}, "weights": {"route": "ipc"}}}},
            "arms.a: rollout.servers.colocate: true, but a study keeps servers from one run to the next",
        ),
        ({"a": {"at": {"n": 1}, "grid": {"n": [1]}}}, "arms.a.at: n is a factor of the arm's grid too"),
    ],
)
def test_an_arm_with_a_mistake_is_refused(base: Path, arms: dict[str, Any], words: str) -> None:
    assert words in refusal(base, arms)


def test_a_run_that_replays_by_its_own_configuration_cannot_be_replayed(base: Path) -> None:
    base.write_text(base.read_text().replace("rollout: {", "rollout: {replay_from: elsewhere, "))
    told = refusal(base, {"a": {}, "b": {"replay": {"from": "a"}}})
    assert "arms.b: replay: a has rollout.replay_from, so it saves no rollouts; name elsewhere" in told


def test_the_mistakes_of_all_arms_are_told_at_once(base: Path) -> None:
    told = refusal(base, {"a": {"set": {"optim": {"lr": -1}}}, "b": {"set": {"train": {"mini_batches": 3}}}})
    assert "arms.a: " in told
    assert "arms.b: train.mini_batches: 3 does not divide" in told


def test_what_is_no_study_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    for content, words in (
        (b"[1]", "found [1], expected keys and values"),
        (b"a: [", "not YAML"),
        (b"\xff", "cannot be read as text"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
            load_study(file)
    with pytest.raises(ConfigError, match="no such file; expected a study file"):
        load_study(tmp_path / "missing.yaml")


def test_a_missing_data_set_is_named_with_its_arm(base: Path) -> None:
    plan = plan_of(base, {"a": {}, "b": {"set": {"data": {"train": str(base.with_name("gone.jsonl"))}}}}, set=FEW)
    with pytest.raises(ConfigError, match=r"arms\.b: data\.train: .*gone\.jsonl does not exist"):
        check_files(plan)


def test_a_verifier_that_cannot_be_imported_is_named_with_its_arm(base: Path) -> None:
    plan = plan_of(base, {"a": {}, "b": {"set": {"data": {"verifier": "nowhere:judge"}}}}, set=FEW)
    with pytest.raises(ConfigError, match=r"^arms\.b: data\.verifier: .*nowhere"):
        check_files(plan)


def test_a_task_with_too_few_problems_is_named_with_its_arm(base: Path) -> None:
    plan = plan_of(base, {"a": {"set": {"data": {"train": "arithmetic:terms=3,count=600"}}}, "b": {}})
    with pytest.raises(ConfigError, match=r"^arms\.b: data\.train: arithmetic: count: found 637 problems"):
        check_files(plan)


# ---- published studies -----------------------------------------------------------------------------------------

EXAMPLES = sorted((ROOT / "examples" / "studies").glob("*.yaml"))


def test_there_are_published_studies() -> None:
    assert {file.stem for file in EXAMPLES} >= {"gspo-clip-small", "routing-share-small"}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_a_published_study_can_be_planned(
    file: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cold starts take minutes to make; a model of their family stands in for them here."""
    monkeypatch.chdir(tmp_path)
    for cold_start in ("cold-start", "lengths/cold-start"):
        shutil.copytree(model, tmp_path / ".demo" / cold_start)
    study = load_study(file)
    plan = make_plan(study, file)
    assert len(plan.runs) >= 6
    assert str(study.directory).startswith(".demo/studies/")
    assert yaml.safe_load(file.read_text())["question"] == study.question
    assert orjson.dumps([run.as_json() for run in plan.runs])
    assert study.question != QUESTION["question"]
