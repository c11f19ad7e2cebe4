"""Models with gated delta networks: what config.json says of them, and how ranks share their weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from config_files import ARCHITECTURE
from paths import ROOT

from megatron_rl.config.layout import fitting_sizes
from megatron_rl.models.architecture import Architecture, DeltaNet, Router, read_architecture, refuse_unserved
from megatron_rl.models.fields import ModelError
from megatron_rl.models.registry import server_caveats, weights_of
from megatron_rl.models.shards import assemble, fill
from megatron_rl.models.weight import Weight

CONFIG = ROOT / "tests" / "families" / "published" / "Qwen--Qwen3-Next-80B-A3B-Instruct.json"
PUBLISHED: dict[str, Any] = json.loads(CONFIG.read_text())
NET = DeltaNet(layers=(0,), key_heads=4, value_heads=8, key_dim=3, value_dim=2, kernel=4)


def read(directory: Path, **changes: Any) -> Architecture:
    (directory / "config.json").write_text(json.dumps(PUBLISHED | changes))
    return read_architecture(directory)


def kinds(*full: int) -> list[str]:
    return ["full_attention" if layer in full else "linear_attention" for layer in range(48)]


def weight(arch: Architecture, name: str) -> Weight:
    return next(each for each in weights_of(arch) if each.name == f"decoder.layers.0.self_attention.{name}")


def test_the_published_model_is_read(tmp_path: Path) -> None:
    arch = read(tmp_path)
    assert arch.delta_net is not None
    assert [layer for layer in range(48) if not arch.has_delta_net(layer)] == list(range(3, 48, 4))
    assert replace(arch.delta_net, layers=()) == DeltaNet((), 16, 32, 128, 128, kernel=4)
    assert (arch.rotary_width, arch.qk_norm, arch.router) == (64, "head", Router(pre_softmax=False))
    assert (arch.output_gate, arch.zero_centred_norms, arch.shared_gate) == (True, True, True)
    assert arch.moe_layers == tuple(range(48))
    assert list(server_caveats(arch)) == []
    assert fitting_sizes("tp", arch) == [1, 2, 4, 8, 16]


def test_layers_may_be_listed_in_place_of_their_interval(tmp_path: Path) -> None:
    published = read(tmp_path)
    assert read(tmp_path, layer_types=kinds(*range(3, 48, 4))) == published
    del (rest := dict(PUBLISHED))["full_attention_interval"]
    (tmp_path / "config.json").write_text(json.dumps(rest | {"layer_types": kinds(5)}))
    listed = read_architecture(tmp_path)
    assert [layer for layer in range(48) if not listed.has_delta_net(layer)] == [5]
    with pytest.raises(ModelError, match=r"config\.json has no full_attention_interval, without which SGLang"):
        refuse_unserved(tmp_path, listed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": kinds(5)}, "layer_types is .*; expected what full_attention_interval says"),
        ({"layer_types": kinds(5)[1:]}, "for each of the 48 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, "for each of the 48 layers"),
        ({"layer_types": "full_attention"}, "for each of the 48 layers"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads is 24; expected a multiple of .* = 16"),
        ({"linear_conv_kernel_dim": 65}, "linear_conv_kernel_dim is 65; expected an integer of at most 64"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, **changes)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_has_whole_heads(ranks: int) -> None:
    arch = replace(ARCHITECTURE, model_type="qwen3_next", hidden_size=5, delta_net=NET, output_gate=True)
    projections, convolution = weight(arch, "in_proj.weight"), weight(arch, "conv_weight")
    files = {
        source.name: torch.randn(source.shape, generator=torch.Generator().manual_seed(number))
        for number, source in enumerate((*projections.sources, *convolution.sources))
    }
    qkvz, ba, conv = files.values()

    def cut(each: Weight, rank: int) -> torch.Tensor:
        shard = torch.full(each.cut(rank, ranks)[0], torch.nan)
        fill(each, shard, lambda source, dim, start, n: files[source.name].narrow(dim, start, n), rank, ranks)
        return shard

    of_heads = torch.cat((qkvz.view(4, -1, 5), ba.view(4, -1, 5)), dim=1)  # a key head's rows are together
    channels = [part.view(4, -1, 1, 4) for part in conv.split((12, 12, 16))]  # those of a kind are
    for rank in range(ranks):
        assert torch.equal(cut(projections, rank), of_heads.chunk(ranks)[rank].flatten(0, 1))
        mine = [kind.chunk(ranks)[rank].flatten(0, 1) for kind in channels]
        assert torch.equal(cut(convolution, rank), torch.cat(mine))
    for each in (projections, convolution):
        for name, whole in assemble([(each, [cut(each, rank) for rank in range(ranks)])]):
            assert torch.equal(whole, files[name])


def test_a_convolution_is_cut_by_heads_or_not_at_all() -> None:
    arch = replace(ARCHITECTURE, model_type="qwen3_next", delta_net=NET)
    with pytest.raises(ValueError, match=r"conv_weight: sections \[12, 12, 16\] do not divide into 8 shards"):
        weight(arch, "conv_weight").cut(0, 8)
