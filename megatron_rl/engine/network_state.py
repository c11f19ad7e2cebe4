"""A network's training state as named tensors of this rank, and back, under this layout or another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from megatron_rl.engine.export import model_ranks
from megatron_rl.engine.fragments import Held, held_by, read_saved
from megatron_rl.engine.network import Network
from megatron_rl.engine.optimizer import optimizer_parts
from megatron_rl.engine.optimizer_state import restore_steps, restore_tensors, steps_of, tensors_of
from megatron_rl.engine.shard_file import ShardReader
from megatron_rl.models.binding import bind


def network_tensors(network: Network, name: str) -> dict[str, Tensor]:
    """Returns the stretches that this rank's optimizers hold, flattened, by network, kind, weight and place."""
    found: dict[str, Tensor] = {}
    for part, parameter, stretches in _held(network):
        for kind, tensor in tensors_of(part, parameter).items():
            flat = tensor.detach().view(-1)
            for held in stretches:
                found[held.stretch.named(name, kind)] = flat[held.at : held.at + held.stretch.length]
    return found


def network_state(network: Network) -> dict[str, Any]:
    """Returns the rest: what all ranks have alike, and the digest of this rank's frozen weights."""
    return {
        "frozen": network.frozen_digest,
        "steps": max(map(steps_of, _parts(network)), default=0),
        "scheduler": network.scheduler.state_dict(),
        "skipped": network.skipped,
    }


def restore_network(network: Network, name: str, readers: Sequence[ShardReader], *, moments: bool = True) -> None:
    """Restores the network from the files of `readers`, of which the first that has a stretch is read. Without
    `moments` the optimizer begins anew. Raises KeyError if no file has a stretch that is needed."""
    state = readers[0].state["networks"][name]
    # Some ranks may train nothing.
    steps = max(reader.state["networks"][name]["steps"] for reader in readers) if moments else 0
    kinds = read_saved(readers, name)
    for part in _parts(network):
        restore_steps(part, steps)
    for part, parameter, stretches in _held(network):
        values = {}
        for kind, tensor in tensors_of(part, parameter).items():
            values[kind] = tensor.detach().clone()
            for held in stretches:
                values[kind].view(-1)[held.at : held.at + held.stretch.length] = kinds[kind].values(held)
        restore_tensors(part, parameter, values)
    for part in _parts(network):
        part._copy_main_params_to_model_params()
    for stage in network.stages:
        stage.start_param_sync(force_sync=True)
    network.scheduler.load_state_dict(dict(state["scheduler"]))
    network.skipped = state["skipped"]


def _parts(network: Network) -> list[Any]:
    return [part for part in optimizer_parts(network.optimizer) if not part.is_stub_optimizer]


def _held(network: Network) -> Iterator[tuple[Any, Any, list[Held]]]:
    """Yields each optimizer's parameters, and what it has of them."""
    ranks = model_ranks(network.layout, network.place.rank)
    slots = bind(list(network.models), network.arch, ranks, network.layers.weight_names)
    for part in _parts(network):
        for parameter, stretches in held_by(part, slots, ranks).items():
            yield part, parameter, stretches
