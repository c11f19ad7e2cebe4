"""device_worker.py MODEL LAYOUT ITEM: takes one optimizer step on a CPU without one item of the CPU layer."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rl.config.layout import Layout, parse_layout
from megatron_rl.config.schema import EngineConfig, OptimConfig
from megatron_rl.engine.device import use_device


def main(model: str, layout_text: str, left_out: str) -> None:
    device = use_device("cpu", leave_out=[left_out] if left_out != "nothing" else [])
    import numpy as np

    from megatron_rl.data.packing import pack
    from megatron_rl.data.sample import Prompt, Sample
    from megatron_rl.engine.policy import Policy
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    layout = Layout.resolve(*parse_layout(layout_text))
    place = start_process_groups(layout, device, seed=0)
    engine = EngineConfig(dtype="fp32", recompute="core_attn,layernorm" if left_out == "norm_recomputation" else "full")
    policy = Policy(Path(model), layout, place, engine, device, OptimConfig(lr=1e-3))
    # Each rank has other tokens, so that experts get unequal numbers of them.
    ids = np.random.default_rng(place.rank).integers(0, 40, 23).tolist()
    sample = Sample.start(Prompt("", "", (1,), "", ""), 0).extend(ids, [0.0] * len(ids), 0)
    batch = pack([sample], [0.0], cp=layout.cp, tp=layout.tp)
    result = policy.update([batch], lambda _, logprobs, __: -logprobs.mean())
    assert result.grad_norm > 0
    print("UPDATED", flush=True)
    stop_process_groups()


if __name__ == "__main__":
    main(*sys.argv[1:])
