"""Adam with moments in bf16, and on the host: Transformer Engine's and Megatron-Core's own, without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizer_worker import ALL, BF16, HALF
from paths import SUPPORT
from rl_runs import environment
from tiny_models import make_tiny_model

from megatron_rl.config.schema import OptimConfig
from megatron_rl.engine.optimizer import check_machine
from megatron_rl.engine.split_weights import join_weight, split_weight
from megatron_rl.errors import UserError
from megatron_rl.planner.shares import state_bytes

DIRECTORY = Path(sys.prefix) / "te"
SIZES: dict[str, Any] = {"num_layers": 4, "hidden_size": 32, "num_experts": 4, "expert_hidden_size": 16}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run_cases(tmp_path_factory.mktemp("optimizers"), "numbers")


def run_cases(root: Path, kind: str) -> dict[str, dict[str, Any]]:
    if not DIRECTORY.is_dir():
        pytest.skip(f"no Transformer Engine in {DIRECTORY}; make install puts it there")
    make_tiny_model(root / "model", mlp_only_layers=(1,), **SIZES)
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "optimizer_worker.py"), str(root), str(DIRECTORY), kind],
        env={**environment(), "TORCHDYNAMO_DISABLE": "1"},  # it would need a C++ compiler
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers: dict[str, dict[str, Any]] = torch.load(root / "answers.pt")
    return answers


def apart(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference of a tensor over its largest value."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - each).abs().max() / each.abs().max()) for name, each in theirs.items())


@pytest.mark.distributed
def test_on_the_host_adam_computes_the_same(answers: dict[str, dict[str, Any]]) -> None:
    for beside, name in (("", "all on the host"), ("", "half on the host"), ("critic", "critic, all on the host")):
        plain, found = answers[beside or "plain"], answers[name]
        assert found["norm"] == plain["norm"], name
        assert apart(found["held"], plain["held"]) <= 1e-6, name
        # In bf16: a last bit of a weight in fp32, which depends on the processor, may round the other way.
        assert apart(found["weights"][1], plain["weights"][1]) <= 2**-8, name
    assert answers["plain"]["on_host"] == 0
    assert 0.4 < answers["half on the host"]["on_host"] < 0.9
    assert answers["all on the host"]["on_host"] == 1


@pytest.mark.distributed
def test_moments_in_bf16_change_little(answers: dict[str, dict[str, Any]]) -> None:
    for beside in ("plain", "critic"):
        plain, found = answers[beside], answers["bf16" if beside == "plain" else "critic, bf16"]
        assert found["norm"] != plain["norm"], beside
        assert found["norm"] == pytest.approx(plain["norm"], rel=2e-3), beside
        assert apart(found["weights"][1], plain["weights"][1]) <= 0.02, beside
        kinds = {name.split("/")[1]: tensor.dtype for name, tensor in found["held"].items()}
        assert kinds == {"param": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}, beside


@pytest.mark.distributed
def test_they_keep_as_many_bytes_as_a_plan_counts(answers: dict[str, dict[str, Any]]) -> None:
    for name, optim in (("bf16", BF16), ("all on the host", ALL)):
        planned = sum(state_bytes(2, OptimConfig.model_validate(dict(optim))))
        assert answers[name]["state_bytes"] == pytest.approx(planned, rel=1e-3), name


@pytest.mark.distributed
def test_gradients_in_bf16_are_read_too(answers: dict[str, dict[str, Any]]) -> None:
    for name in ("gradients, bf16", "gradients, half on the host"):
        assert answers[name]["norm"] == pytest.approx(answers["gradients"]["norm"], rel=5e-3), name
        assert answers[name]["norm"][0] == answers["gradients"]["norm"][0], name
    for name, overlaps in (("half on the host", True), ("gradients, half on the host", False)):
        assert set(answers[name]["overlaps"]) == {overlaps}, name


@pytest.mark.slow
@pytest.mark.distributed
def test_a_checkpoint_holds_all_of_them(tmp_path: Path) -> None:
    """Before the first step as well, when there are no moments. The worker reads them under other layouts too."""
    answers = run_cases(tmp_path, "checkpoints")
    for name in ("all on the host", "half on the host", "bf16"):
        without, restored = answers[name], answers[f"{name}, restored"]
        assert restored["norm"] == without["norm"], name
        assert apart(restored["held"], without["held"]) == 0, name
        assert apart(restored["weights"][1], without["weights"][1]) == 0, name
        assert apart(without["first"], answers["plain"]["first"]) == 0, name


def test_a_weight_is_put_together_from_bf16_and_the_rest_of_its_bits() -> None:
    bits = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, 4096, dtype=np.int64).astype(np.int32)
    weight = torch.from_numpy(bits).view(torch.float32)
    weight = torch.cat([weight[weight.isfinite()], torch.tensor([0.0, -0.0, 1.0, 1 + 2**-8, 1 - 2**-9])])
    rounded, rest = split_weight(weight)
    assert (rounded.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_weight(rounded, rest).view(torch.int32), weight.view(torch.int32))
    tie = (rest == -(1 << 15)) & (rounded.float() != weight.bfloat16().float())  # torch rounds these to even
    assert torch.equal(rounded[~tie].view(torch.int16), weight[~tie].bfloat16().view(torch.int16))


def test_what_the_machine_lacks_is_said_with_the_key() -> None:
    """engine.device auto says nothing of it before."""
    check_machine(OptimConfig(), "optim", torch.device("cpu"))
    for optim, setting in ((HALF, "offload: 0.5"), (BF16, "moments_dtype: bf16")):
        config = OptimConfig.model_validate(dict(optim))
        with pytest.raises(UserError, match=rf"critic.optim.{setting} needs a GPU, and there is none"):
            check_machine(config, "critic.optim", torch.device("cpu"))
        with pytest.raises(UserError, match=rf"optim.{setting} needs Transformer Engine's FusedAdam, but"):
            check_machine(config, "optim", torch.device("cuda"))
