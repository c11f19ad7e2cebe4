"""What a run needs of a cluster: nodes, ranks, servers, and the words that start each. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rl.config.bounds import MOST_RANKS
from megatron_rl.config.load import load_config
from megatron_rl.config.resolve import resolve
from megatron_rl.config.schema import Config
from megatron_rl.config.sources import ConfigError
from megatron_rl.rollout.sglang_launch import KEY_VARIABLE
from megatron_rl.routing.wire import SERVER_FLAG

WAYS_OUT = "change those, set rollout.servers.colocate, or give servers nodes of their own by --rollout-nodes"
FIRST_PORT = 30000
"""Port of a node's first server; the others follow."""


@dataclass(frozen=True)
class Nodes:
    """What the user asks for."""

    trainers: int
    servers: int
    """Nodes of servers; 0: the trainer starts its own."""
    gpus: int
    """GPUs of each node; on CPUs, ranks of a trainer node and `tp` parts of servers of a node of servers."""


@dataclass(frozen=True)
class ClusterJob:
    """What the templates are filled with, besides the site."""

    config: Config
    nodes: Nodes
    command: tuple[str, ...]
    """CONFIG and overrides, as they were given."""
    ranks: int
    """Ranks of each trainer node."""
    gpus: int
    """GPUs of each node; 0 on CPUs."""
    servers_per_node: int

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    def trainer_overrides(self, urls: str) -> tuple[str, ...]:
        """Returns what the trainer is told of servers that it does not start: `urls` is urls=[...] or urls_file=..."""
        if not self.nodes.servers:
            return ()
        servers = self.config.rollout.servers
        undone = {"launch=1": servers.launch > 1, "extra_flags=[]": bool(servers.extra_flags)}
        told = [urls, f"api_key_env={KEY_VARIABLE}", *(text for text, is_needed in undone.items() if is_needed)]
        return tuple(f"rollout.servers.{text}" for text in told)

    def trainer_config(self, urls: Sequence[str]) -> Config:
        """Returns the trainer's configuration if its servers have these URLs. Raises ConfigError."""
        path, *overrides = self.command
        told = self.trainer_overrides(f"urls=[{','.join(urls)}]")
        return resolve(Config, Path(path), [*overrides, *told], self.nodes.trainers * self.ranks).config

    @property
    def serve(self) -> tuple[str, ...]:
        """Returns the arguments of `megatron-rl serve` but --host, --port and --random-seed."""
        servers, engine = self.config.rollout.servers, self.config.engine
        given = {
            "--device": engine.device,
            "--dtype": engine.dtype if servers.dtype == "auto" else servers.dtype,
            "--tp": servers.tp,
            "--api-key-env": KEY_VARIABLE,
            "--max-total-tokens": servers.max_total_tokens,
            "--threads": servers.threads,
        }
        words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        flags = ["--max-running-requests", str(self.config.rollout.concurrency), *servers.extra_flags]
        if self.config.routing.needs_rollout_routes:
            flags.append(SERVER_FLAG)
        return (str(self.config.model.path), *words, "--", *flags)


def plan_job(path: Path, overrides: Sequence[str], nodes: Nodes) -> ClusterJob:
    """Raises ConfigError if the run does not fit the nodes, or its servers are not ones that these nodes can hold."""
    if (all_gpus := (nodes.trainers + nodes.servers) * nodes.gpus) > MOST_RANKS:
        raise ConfigError(
            f"--nodes, --rollout-nodes, --gpus-per-node: {all_gpus} GPUs in all, and a run has at most {MOST_RANKS}"
        )
    beside = _gpus_of_own_servers(load_config(Config, path, overrides), nodes)
    ranks = nodes.gpus - beside
    try:
        config = resolve(Config, path, overrides, nodes.trainers * ranks).config
    except ConfigError as error:
        if not beside:
            raise
        raise ConfigError(f"{error}\n{_beside(nodes, beside)}, which leaves {ranks} ranks; {WAYS_OUT}") from None
    servers = config.rollout.servers
    if nodes.servers:
        _check_servers(config, nodes)
    job = ClusterJob(
        config,
        nodes,
        (str(path), *overrides),
        ranks=ranks,
        gpus=nodes.gpus if config.engine.device != "cpu" else 0,
        servers_per_node=nodes.gpus // servers.tp if nodes.servers else 0,
    )
    job.trainer_config(("http://server",))  # what the trainer will be told must be no contradiction either
    return job


def _gpus_of_own_servers(config: Config, nodes: Nodes) -> int:
    """Returns how many GPUs of the only node go to servers that rank 0 starts. Raises ConfigError if none is left."""
    servers = config.rollout.servers
    if nodes.servers or servers.colocate or config.engine.device == "cpu" or not _launches(config):
        return 0
    beside = servers.launch * servers.tp
    if nodes.trainers > 1:
        raise ConfigError(
            f"--rollout-nodes 0: rank 0 would start {servers.launch} servers, for whose {beside} GPUs its node has no "
            "room among equal nodes; give servers nodes of their own, or set rollout.servers.colocate"
        )
    if beside >= nodes.gpus:
        raise ConfigError(f"{_beside(nodes, beside)}, which leaves none for ranks; {WAYS_OUT}")
    return beside


def _beside(nodes: Nodes, beside: int) -> str:
    return (
        f"--gpus-per-node: {nodes.gpus}, of which the servers of the run take {beside} "
        "(rollout.servers.launch times rollout.servers.tp)"
    )


def _launches(config: Config) -> bool:
    return config.rollout.replay_from is None and not config.rollout.servers.are_elsewhere


def _check_servers(config: Config, nodes: Nodes) -> None:
    servers = config.rollout.servers
    if config.rollout.replay_from is not None:
        raise ConfigError(f"--rollout-nodes {nodes.servers}: rollout.replay_from needs no servers; give 0")
    if not _launches(config):
        raise ConfigError(
            f"--rollout-nodes {nodes.servers}: rollout.servers names servers that run already; drop urls and "
            "urls_file, or give --rollout-nodes 0"
        )
    if servers.colocate:
        raise ConfigError(
            f"--rollout-nodes {nodes.servers}: rollout.servers.colocate puts servers on the trainer's GPUs; set it to "
            "false, or give --rollout-nodes 0"
        )
    if nodes.gpus % servers.tp:
        raise ConfigError(
            f"rollout.servers.tp: {servers.tp} does not divide the {nodes.gpus} GPUs of a node; a server has one node"
        )
