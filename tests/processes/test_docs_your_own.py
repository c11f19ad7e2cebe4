"""The files of docs/your-own.md do what the page says: each is written as it stands and executed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from doc_blocks import read_blocks
from paths import ROOT

from megatron_rl.config.load import load_config
from megatron_rl.config.resolve import resolve
from megatron_rl.config.schema import Config
from megatron_rl.data.prompts import Fields
from megatron_rl.data.schedule import Denominators
from megatron_rl.objectives.custom import get_objective
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.objectives.policy_loss import policy_loss
from megatron_rl.rewards.checked_prompts import load_prompts
from megatron_rl.rewards.verifiers import call_verifier, check_answer, get_verifier

PAGE = ROOT / "docs" / "your-own.md"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with all files of the page and the model, which is current and on Python's path."""
    path = tmp_path_factory.mktemp("own")
    for block in read_blocks(PAGE):
        if block.title:
            (path / block.title).write_text(block.text)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}"}
    subprocess.run([sys.executable, "make_model.py"], cwd=path, env=environment, check=True)
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path)
        patch.chdir(path)
        yield path
    assert Path.cwd() == before


@pytest.fixture
def config(directory: Path) -> Config:
    return load_config(Config, directory / "run.yaml")


def test_the_run_resolves_without_contradictions(directory: Path) -> None:
    resolved = resolve(Config, directory / "run.yaml", [], 2)
    assert resolved.notes == ()
    assert (resolved.arch.model_type, resolved.arch.num_experts) == ("qwen3_moe", 8)


def test_the_prompts_are_read(config: Config) -> None:
    from transformers import AutoTokenizer

    data = config.data
    fields = Fields(data.prompt_field, data.answer_field, data.verifier)
    dataset = load_prompts(data.train, fields, AutoTokenizer.from_pretrained("model"), data.max_prompt_tokens)
    prompts = [dataset[number] for number in range(len(dataset))]
    assert len(prompts) == config.rollout.prompts_per_step
    assert [prompt.answer[-1] for prompt in prompts] == ["8", "4", "7", "4"]
    assert all(len(prompt.token_ids) == len(prompt.text) for prompt in prompts), "a token for each character"


def test_the_reward_judges(config: Config, directory: Path) -> None:
    from megatron_rl.data.sample import Prompt, Verdict

    assert config.data.verifier is not None
    judge = get_verifier(config.data.verifier)
    prompt = Prompt(id="1", text="", token_ids=(), answer="3 + 5 = 8\n#### 8", verifier="")
    found = [call_verifier(judge, prompt, [text])[0] for text in ("#### 8", "3 + 5 #### 9", "none")]
    assert found == [Verdict(1.0, True), Verdict(0.1, False), Verdict(0.0, False)]
    assert check_answer(config.data.verifier, "#### 8") is None
    assert check_answer(config.data.verifier, "8") == "has no ####"


def test_the_reward_can_be_tried_alone(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "try_reward.py"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": f"{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line[:19] for line in done.stdout.splitlines()] == [
        "Verdict(reward=1.0,",
        "Verdict(reward=0.1,",
        "Verdict(reward=0.0,",
    ]


def test_the_loss_adds_the_likelihood_of_better_responses(config: Config) -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        rollout_logprobs=logprobs.detach(),
        advantages=torch.tensor([0.0, 1.0, 1.0, -1.0]),
        loss_mask=torch.tensor([False, True, True, True]),
        sequence_ids=torch.tensor([0, 0, 0, 1]),
        num_sequences=2,
    )
    denominators = Denominators(tokens=10, sequences=4)
    preset = config.objective.model_copy(update={"custom": None})
    ours = get_objective(config.objective)(inputs, config.objective, denominators).loss
    assert ours.item() == pytest.approx(policy_loss(inputs, preset, denominators).loss.item() + 0.1 * 5 / 10)
    empty = LossInputs(**{**vars(inputs), "loss_mask": torch.zeros(4, dtype=torch.bool)})
    loss = get_objective(config.objective)(empty, config.objective, denominators).loss
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad is not None
    assert not logprobs.grad.any()
