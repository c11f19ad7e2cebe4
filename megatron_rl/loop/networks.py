"""The networks of a run on this rank, and what a resume must find unchanged: the models and the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import orjson
import torch

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.data.prompts import data_digest
from megatron_rl.engine.critic import Critic
from megatron_rl.engine.manifest import Identity, ModelIdentity
from megatron_rl.engine.network import Network
from megatron_rl.engine.policy import Policy
from megatron_rl.models.architecture import features_of
from megatron_rl.models.identity import file_digests
from megatron_rl.ranks.place import Place


@dataclass(frozen=True)
class Networks:
    """A run's models on this rank, all under one layout."""

    policy: Policy
    critic: Critic | None
    reference: Policy | None

    @property
    def trained(self) -> dict[str, Network]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})

    def count_moves(self, moved: Callable[[], None]) -> None:
        """Calls `moved` after each micro-batch's forward pass of a stage, and for each bucket that is exported."""
        for network in filter(None, (self.policy, self.critic, self.reference)):
            network.moved = moved
            for stage in network.stages:
                stage.register_forward_hook(lambda *_: moved())


def build_networks(
    config: Config | SftConfig, layout: Layout, place: Place, device: torch.device, temperature: float
) -> Networks:
    """Loads the weights of all networks that the configuration asks for. Collective."""
    policy = Policy(config.model.path, layout, place, config.engine, device, config.optim, temperature)
    critic = reference = None
    if isinstance(config, Config) and config.critic is not None:
        path = config.critic.path or config.model.path
        critic = Critic(path, layout, place, config.engine, device, config.critic.optim)
    if isinstance(config, Config) and config.objective.kl.kind != "none":
        path = config.model.reference or config.model.path
        reference = Policy(path, layout, place, config.engine, device, None, temperature, frozen=True)
    return Networks(policy, critic, reference)


def identify(config: Config | SftConfig, networks: Networks, run: str) -> Identity:
    """Returns what the run computes on: its models and the data sets that it reads. Rank 0 alone need call it."""
    keys = {"policy": "model.path", "critic": "critic.path", "reference": "model.reference"}
    models = {}
    for name, network in {**networks.trained, "reference": networks.reference}.items():
        if network is not None:
            architecture = orjson.loads(orjson.dumps(features_of(network.arch)))
            files = file_digests(network.model_dir)
            models[name] = ModelIdentity(key=keys[name], architecture=architecture, files=files)
    sources = {"data.train": config.data.train}
    if isinstance(config, Config):
        sources |= {"data.heldout": config.data.heldout} if config.data.heldout else {}
        sources = {} if config.rollout.replay_from else sources  # saved rollouts hold their prompts
    return Identity(run=run, models=models, data={key: data_digest(source) for key, source in sources.items()})
