"""Problems of the package reasoning-gym: their specification, their verifier, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from config_files import ARCHITECTURE, RL, write

from megatron_rl.config.load import ConfigError, check_config, load_config
from megatron_rl.config.schema import Config
from megatron_rl.data.files import DataError
from megatron_rl.data.generated import check_generated, default_verifier, is_generated
from megatron_rl.data.gym_task import GymTask
from megatron_rl.data.prompts import Fields, data_digest, source_records
from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.gym_scores import verify_gym

pytest.importorskip("reasoning_gym", reason="its dependency pycosat needs a C compiler (requirements/gym.txt)")
SPEC = "reasoning-gym:basic_arithmetic,size=5,seed=3,max_terms=2,operators=+"
FIELDS = Fields("prompt", "answer")


def prompts(spec: str) -> list[Prompt]:
    records = source_records(spec, FIELDS, (), answer_text=str)
    return [Prompt(r.id, r.text("prompt"), (), r.text("answer"), default_verifier(spec)) for r in records]


def test_problems_come_with_their_answers_and_are_made_again_alike() -> None:
    made = prompts(SPEC)
    assert [prompt.id for prompt in made] == [f"{SPEC}:{n}" for n in range(5)]
    assert made == prompts(SPEC)
    assert made[:3] == [
        Prompt(p.id.replace("size=3", "size=5"), p.text, (), p.answer, p.verifier)
        for p in prompts(SPEC.replace("size=5", "size=3"))
    ]
    assert made[0].text != prompts(SPEC.replace("seed=3", "seed=4"))[0].text
    assert {prompt.verifier for prompt in made} == {"reasoning-gym"}
    assert not is_generated("data.jsonl")


def test_the_generators_own_score_is_the_reward() -> None:
    for prompt in prompts(SPEC):
        assert verify_gym(prompt, prompt.answer) == Verdict(1.0, True)
        assert verify_gym(prompt, f"first <answer>7</answer>, no: <answer> {prompt.answer} </answer>!").correct
        assert not verify_gym(prompt, f"<answer>{prompt.answer}1</answer>").correct
        assert verify_gym(prompt, "well").reward < 1


def test_a_problem_that_many_answers_solve_has_no_reference_and_is_still_judged() -> None:
    (prompt,) = prompts("reasoning-gym:propositional_logic,size=1")
    assert prompt.answer == ""
    assert not verify_gym(prompt, "no").correct


def test_a_prompt_that_is_not_the_problem_of_its_id_has_no_verdict() -> None:
    with pytest.raises(ValueError, match="makes another problem 0 than the prompt's"):
        verify_gym(Prompt(f"{SPEC}:0", "2+2=", (), "4", "reasoning-gym"), "4")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("", "expected the name of a generator after reasoning-gym:, found ''"),
        ("basic_arithmetics", "no such generator; there are .* such as basic_arithmetic"),
        ("basic_arithmetic,size", "expected key=value, found 'size'"),
        ("basic_arithmetic,size=2,size=3", "size: given twice"),
        ("basic_arithmetic,size=0", "size: expected 1 to 10000000, found 0"),
        ("basic_arithmetic,seed=-1", "seed: expected 0 to 10000000, found -1"),
        ("basic_arithmetic,size=many", "size: expected 1 to 10000000, found 'many'"),
        ("basic_arithmetic,colour=red", "basic_arithmetic: .*unexpected keyword argument 'colour'"),
        ("basic_arithmetic,min_terms=9,max_terms=2", "basic_arithmetic: max_terms must be"),
    ],
)
def test_a_specification_that_cannot_be_made_is_one_error(spec: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        check_generated(f"reasoning-gym:{spec}")


def test_settings_are_numbers_truths_and_text() -> None:
    task = GymTask.parse("reasoning-gym:x,a=1,b=.5,c=true,d=red")
    assert (task.size, task.seed) == (1000, 0)
    assert task.settings == (("a", 1), ("b", 0.5), ("c", True), ("d", "red"))


def test_the_digest_follows_the_task_and_not_its_spelling() -> None:
    same = "reasoning-gym:basic_arithmetic,max_terms=2,operators=+,seed=3,size=5"
    assert data_digest(SPEC) == data_digest(same) != data_digest(SPEC.replace("seed=3", "seed=4"))


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"needs the package reasoning-gym .*pip install 'megatron_rl\[environments\]'"):
        check_generated(SPEC)


def test_held_out_problems_need_another_seed(tmp_path: Path) -> None:
    def check(heldout: str) -> None:
        overrides = [f"data.train={SPEC}", f"data.heldout={heldout}"]
        check_config(load_config(Config, write(tmp_path / "a.yaml", RL), overrides), ARCHITECTURE, 1)

    check(SPEC.replace("seed=3", "seed=4"))
    check(SPEC.replace("max_terms=2", "max_terms=3"))
    check("arithmetic:split=heldout")
    with pytest.raises(ConfigError, match=r"data.heldout: .* has the problems of data.train; give it another seed"):
        check(SPEC.replace("size=5", "size=9"))
