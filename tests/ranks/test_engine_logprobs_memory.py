"""The memory that log-probs take, as torch's allocator counts it: a fraction of whole logits, and what is planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from forks import Forks
from tiny_models import make_tiny_model

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.models.architecture import read_architecture
from megatron_rl.planner.activations import Workload, logits_bytes

VOCAB_SIZE = 2048
HIDDEN_SIZE = 16  # few, so that the gradients of hidden states and of the output layer do not hide the logits
SHARE = 1 / 8
PLAN_BOUND = 0.1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return make_tiny_model(path, vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, head_dim=4, num_layers=1)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_log_probs_take_an_eighth_of_whole_logits_at_most_and_what_is_planned(
    forks: Forks, model: Path, ranks: int, dtype: Literal["fp32", "bf16"]
) -> None:
    engine = EngineConfig(device="cpu", dtype=dtype)
    tokens, item = engine.max_tokens_per_micro_batch, 4 if dtype == "fp32" else 2
    whole = 4 * tokens * VOCAB_SIZE // ranks  # of this rank's part of the vocabulary
    planned = planned_bytes(model, ranks, tokens, item, engine.logit_chunk_tokens)
    for found in forks.world(ranks, "logprobs_worker:peaks", model, dtype):
        assert found["forward"] <= SHARE * whole
        assert found["gradient"] <= SHARE * whole
        assert found["gradient"] == pytest.approx(planned, rel=PLAN_BOUND)


def planned_bytes(model: Path, ranks: int, tokens: int, item: int, chunk: int) -> float:
    """Returns the planned bytes without the final norm. Hidden states count if several ranks gather them; on one rank
    they are the head's input, which is there before."""
    arch = read_architecture(model)
    work = Workload(arch, Layout.resolve(*parse_layout(f"tp={ranks}")), tokens, item)
    critic = dataclasses.replace(work, arch=dataclasses.replace(arch, value_head=True))
    gathered = tokens * HIDDEN_SIZE * item if ranks > 1 else 0
    return logits_bytes(work, chunk) - logits_bytes(critic, chunk) + gathered
