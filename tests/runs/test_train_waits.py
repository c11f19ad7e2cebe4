"""A run's passes over micro-batches wait for the device in two known places."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import Forks
from rl_runs import save_rollouts, write_config
from tiny_models import make_tiny_model

from megatron_rl.lab.run import read_metrics

# The objective and its metrics select the masked-in tokens, once a micro-batch each.
SELECTIONS = [
    "metrics.py: kept, present = (mask.nonzero().squeeze(1) for mask in (inputs.loss_mask, tokens.lengths > 0))",
    "ratios.py: kept = inputs.loss_mask.nonzero().squeeze(1)",
]


@pytest.mark.distributed
def test_a_pass_over_micro_batches_waits_for_the_device_only_to_select_tokens(forks: Forks, tmp_path: Path) -> None:
    """Log-probs under tensor parallelism, of likely tokens too, the objective, R3, and all metrics of routing."""
    model = make_tiny_model(tmp_path / "model", num_layers=2)
    save_rollouts(model, tmp_path / "saved", steps=1, traces=True, top_k=4)
    config = write_config(tmp_path / "config.yaml", model, tmp_path / "saved", preset="score_centering", steps=1)
    run = f"run_dir={tmp_path / 'run'} parallel.tp=2 routing.replay=r3 objective.centering.top_k=4"
    assert forks.world(2, "host_waits:main", config, run) == [SELECTIONS, SELECTIONS]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4
