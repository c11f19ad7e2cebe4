"""Checks on two ranks that a policy takes changed weights for a while, and gets its own back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from export_worker import start
from stress_reference import integers, rounded
from torch import Tensor

from megatron_rl.config.schema import EngineConfig, WeightsConfig
from megatron_rl.engine.policy import Policy
from megatron_rl.errors import UserError
from megatron_rl.weights.stressed import read_stress
from megatron_rl.weights.substitute import substituted
from megatron_rl.weights.verify import probe, trainer_logprobs

BUCKET_BYTES = 20_000


def main(model: Path, changed: Path, layouts: list[str]) -> None:
    """`changed` holds the model's weights as the stress int4 leaves them."""
    for layout in layouts:
        check(model, changed, layout)


def check(model: Path, changed: Path, layout_text: str) -> None:
    layout, place = start(layout_text)

    def load(directory: Path) -> Policy:
        return Policy(directory, layout, place, EngineConfig(dtype="fp32"), torch.device("cpu"), optim=None)

    def logprobs(policy: Policy) -> np.ndarray | None:
        found = trainer_logprobs(policy, probe(policy.arch), 1.0)
        return None if found is None else np.concatenate(found)

    policy, other = load(model), load(changed)
    before = weights(policy)
    stress = read_stress(WeightsConfig.model_validate({"stress": {"kind": "int4"}}).stress, policy.arch, 0)
    assert stress is not None

    def change(name: str, weight: Tensor) -> Tensor:
        return stress.change(name, weight, 1)

    own, expected = logprobs(policy), logprobs(other)
    with substituted(policy, BUCKET_BYTES, change):
        found = logprobs(policy)
        for mine, its in zip(weights(policy), weights(other), strict=True):
            torch.testing.assert_close(mine, its, rtol=3e-7, atol=1e-12)
    assert all(map(torch.equal, before, weights(policy)))
    if dist.get_rank() == 0:
        assert own is not None
        assert expected is not None
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert np.abs(found - own).max() > 0.01

    with pytest.raises(ZeroDivisionError), substituted(policy, BUCKET_BYTES, change):
        raise ZeroDivisionError
    assert all(map(torch.equal, before, weights(policy)))

    export = policy.export
    policy.export = lambda _, **options: damaged(export(BUCKET_BYTES, **options))  # type: ignore[method-assign]
    error = pytest.raises(UserError, match=r"linear_proj.weight is exported with other")
    with error, substituted(policy, BUCKET_BYTES, change):
        pass
    assert all(map(torch.equal, before, weights(policy)))


def weights(policy: Policy) -> list[Tensor]:
    return [parameter.detach().clone() for model in policy.models for parameter in model.parameters()]


def damaged(buckets: Iterator[list[tuple[str, Tensor]]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Changes one bit of one weight, in the last layer."""
    for bucket in buckets:
        for name, tensor in bucket:
            if name == "model.layers.1.self_attn.o_proj.weight":
                tensor.view(torch.int32)[-1, -1] ^= 1
        yield bucket


def int4(weight: np.ndarray) -> np.ndarray:
    return rounded(weight, integers(4), 1, 128)
