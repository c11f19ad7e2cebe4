"""Files of changed elements, and how a server's loader writes them: against plain indexing."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.server import LOADER
from megatron_rl.weights.all_servers import AllServers, WeightSyncError
from megatron_rl.weights.delta import DeltaRoute
from megatron_rl.weights.delta_file import Block, DeltaError, as_integers, encode, read_blocks, write_delta
from megatron_rl.weights.delta_loader import MaskedTensor, load_delta
from megatron_rl.weights.directory import DiskRoute


def written(path: Path, *blocks: Block) -> Path:
    with path.open("wb") as file:
        write_delta(file, [encode(block) for block in blocks])
    return path


def changed_block(share: float, dtype: torch.dtype, size: int = 400_000) -> Block:
    generator = torch.Generator().manual_seed(0)
    indices = (torch.rand(size, generator=generator) < share).nonzero()[:, 0]
    values = 0.02 * torch.randn(len(indices), generator=generator)
    return Block("weight", (size // 100, 100), indices, values.to(dtype))


@given(st.sets(st.integers(0, 2999)), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
def test_a_file_has_the_blocks_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, places: set[int], dtype: torch.dtype, seed: int
) -> None:
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    bits = torch.randint(-(2**15), 2**15, (len(places),), generator=torch.Generator().manual_seed(seed))
    values = (bits * (65537 if dtype == torch.float32 else 1)).to(integers).view(dtype)  # NaN and -0 as well
    block = Block("a.b", (30, 100), torch.tensor(sorted(places), dtype=torch.int64), values)
    path = written(tmp_path_factory.mktemp("delta") / "file", block, block)
    for found in read_blocks(path):
        assert (found.name, found.shape) == (block.name, block.shape)
        assert torch.equal(found.indices, block.indices)
        assert found.values.dtype == dtype
        assert torch.equal(as_integers(found.values), as_integers(values))


@pytest.mark.parametrize(
    ("share", "dtype", "most"),
    [
        (0.01, torch.bfloat16, 1.2),
        (0.04, torch.bfloat16, 1.1),  # of Adam's steps at a learning rate of 1e-6
        (1.0, torch.bfloat16, 0.75),
        (0.005, torch.float32, 1.2),
        (0.01, torch.float32, 1.15),
        (1.0, torch.float32, 0.9),
    ],
)
def test_a_file_is_hardly_larger_than_the_changed_values(
    tmp_path: Path, share: float, dtype: torch.dtype, most: float
) -> None:
    block = changed_block(share, dtype)
    size = written(tmp_path / "file", block).stat().st_size
    assert 0.6 * block.values.nbytes < size < most * block.values.nbytes


@pytest.mark.parametrize("damage", ["cut", "extended", "flipped", "format", "empty"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "file", changed_block(0.1, torch.float32, 1000))
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        {
            "cut": data[:-1],
            "extended": data + b"\n",
            "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
            "format": data.replace(b'"format": 1', b'"format": 2'),
            "empty": b"",
        }[damage]
    )
    with pytest.raises(DeltaError, match="file: no whole file of changed weights"):
        list(read_blocks(path))


class Fused(nn.Module):
    """Loads tensors as models of SGLang do: joined, turned, cut and cast."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = nn.Parameter(torch.zeros(12, 4), requires_grad=False)
        self.low = nn.Parameter(torch.zeros(3, 6, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights: Any) -> None:
        found: dict[str, Tensor] = dict(weights)
        self.joined.data.copy_(torch.cat([found["up"], found["down"].t().contiguous()]))
        self.low.data[1:].copy_(found["half"].chunk(2)[1].to(torch.bfloat16).view(2, 6))


def test_the_loader_changes_the_elements_of_the_file_alone(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    old = {"up": (8, 4), "down": (4, 4), "half": (4, 6)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in old.items()}
    model, expected = Fused(), Fused()
    model.load_weights(tensors.items())
    model.joined.data[0, 3] = 7.0  # differs from the file's tensor, and must stay
    changes = {"up": [0, 17], "down": [1, 2, 14], "half": [0, 12, 23]}
    blocks = []
    for name, places in changes.items():
        values = torch.randn(len(places), generator=generator)
        tensors[name].view(-1)[places] = values
        blocks.append(Block(name, old[name], torch.tensor(places), values))
    load_delta(model, [(str(written(tmp_path / "file", *blocks)), torch.empty(0))])
    expected.load_weights(tensors.items())
    expected.joined.data[0, 3] = 7.0
    assert torch.equal(model.joined, expected.joined)
    assert torch.equal(model.low, expected.low)


def test_a_calculation_with_changed_elements_is_refused() -> None:
    """A norm that is stored without its 1 would lose it where nothing has changed."""
    masked = MaskedTensor(torch.ones(2), torch.tensor([True, False]))
    with pytest.raises(NotImplementedError, match=r"aten\.add\.Tensor, which may change weights; set another route"):
        masked + 1


def test_the_flag_of_servers_names_the_loader() -> None:
    module, _, name = LOADER.rpartition(".")
    assert getattr(importlib.import_module(module), name) is load_delta


class Foreign:
    url = "http://127.0.0.1:1"

    def __init__(self, *loaders: str) -> None:
        self.loaders = [*loaders] or None

    async def server_info(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"custom_weight_loader": self.loaders}


@pytest.mark.parametrize("server", [Foreign(), Foreign("theirs.load")])
def test_a_server_without_the_loader_is_refused_before_weights_are_sent(tmp_path: Path, server: Foreign) -> None:
    loop = BackgroundLoop()
    servers = AllServers([server], loop, 60.0)  # type: ignore[list-item]
    route = DeltaRoute(DiskRoute(servers, tmp_path / "weights", tmp_path, torch.float32))
    message = rf"the server at {server.url} was started without our loader; start it by .*megatron-rl serve"
    with pytest.raises(WeightSyncError, match=message):
        route.push([], 1)
    assert not (tmp_path / "weights").exists()
    loop.close()
