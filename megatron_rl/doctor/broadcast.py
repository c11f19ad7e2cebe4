"""Sends a server one tensor as the trainer sends weights. Its models skip a weight of this name, so none changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_rl.engine.device import use_device
from megatron_rl.rollout.background import BackgroundLoop
from megatron_rl.rollout.client import SGLangClient
from megatron_rl.rollout.server_needs import CannotTell
from megatron_rl.weights.all_servers import AllServers
from megatron_rl.weights.collective import CollectiveRoute

SKIPPED_WEIGHT = "model.layers.0.self_attn.rotary_emb.inv_freq"
"""Old checkpoints have it, so every model of SGLang skips it."""


def broadcast(
    client: SGLangClient, loop: BackgroundLoop, info: Mapping[str, Any], version: int, timeout_seconds: float
) -> str:
    """`info`: the answer of /server_info. Raises WeightSyncError, and CannotTell if it would be unsafe."""
    if info.get("quantization"):
        raise CannotTell(
            f"its weights are quantised ({info['quantization']}): an update without weights may spoil them"
        )
    on_cpu = info.get("device") == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        raise CannotTell("the server is on a GPU; ask from a machine with one")
    device = torch.device("cpu") if on_cpu else use_device("cuda")
    route = CollectiveRoute(AllServers([client], loop, timeout_seconds), device)
    try:
        route.push([[(SKIPPED_WEIGHT, torch.zeros(1))]], version)
    finally:
        route.close()
    return f"joined a process group of {'gloo' if on_cpu else 'NCCL'}, began and ended an update, received a tensor"
