"""What a checkpoint costs a step, and its thread's time: engine steps with and without one, side by side in one run.

    python benchmarks/checkpoint_cost.py [--model DIR | --size 100m] [--directory /a/disk] [--repeats 5]

A step is passes of log-probs, as long as a rollout would be with `--passes`, and an update. In turn, one step is alone
and one begins a checkpoint, as a run does: the update waits for the copy before its optimizer steps, and the file is
waited for after the step, apart. What counts is the share of the thread's time in which the run waited.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from train_throughput import Size, engine_steps, make_model, make_policy, make_samples

from megatron_rl.config.schema import Device, EngineConfig, EngineDtype
from megatron_rl.cores import usable_cores
from megatron_rl.engine.device import use_device
from megatron_rl.engine.manifest import Identity, State


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory; default: a random one of --size")] = None,
    size: Annotated[Size, typer.Option()] = "100m",
    device: Annotated[Device, typer.Option()] = "cpu",
    dtype: Annotated[EngineDtype, typer.Option()] = "fp32",
    directory: Annotated[Path | None, typer.Option(help="of the checkpoints; default: temporary")] = None,
    passes: Annotated[int, typer.Option(help="of log-probs before the update")] = 3,
    repeats: Annotated[int, typer.Option()] = 5,
) -> None:
    used = use_device(device)
    import torch

    from megatron_rl.engine.checkpoint import describe, held_by_rank
    from megatron_rl.engine.checkpoint_writer import CheckpointWriter

    torch.set_num_threads(usable_cores())
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        if model is None:
            model = Path(scratch) / "model"
            make_model(model, size, dtype, used)
        policy = make_policy(model, EngineConfig(device=device, dtype=dtype), used)
        steps = engine_steps(policy, make_samples(policy.arch.vocab_size, 4, 128), 4)
        steps["update"]()  # makes the optimizer's moments
        writer = CheckpointWriter(Path(scratch) / "checkpoints", policy.place.control, keep=1)
        identity = Identity(run="0" * 32, models={}, data={})
        waited: list[float] = []
        alone: list[float] = []
        beside: list[float] = []
        written: list[float] = []

        def step() -> float:
            """Returns the seconds in which the run waited for the copy."""
            for _ in range(passes):
                steps["log-probs"]()
            start = time.perf_counter()
            writer.wait_copied()
            seconds = time.perf_counter() - start
            steps["update"]()
            return seconds

        for number in range(1, repeats + 1):
            start = time.perf_counter()
            step()
            alone.append(time.perf_counter() - start)
            start = time.perf_counter()
            manifest = describe({"policy": policy}, identity, State(step=number, cursor={}))
            writer.start(number, *held_by_rank({"policy": policy}), manifest)
            waited.append(time.perf_counter() - start + step())
            beside.append(time.perf_counter() - start)
            writer.wait()
            done = writer.take_written()
            assert done is not None
            written.append(done.seconds)
        (file,) = (Path(scratch) / "checkpoints").glob("*/rank-*")
        mebibytes = file.stat().st_size / 2**20

    shares = [w / s for w, s in zip(waited, written, strict=True)]
    slower = [b / a for a, b in zip(alone, beside, strict=True)]
    print(f"{policy.parameters() / 1e6:.0f}M parameters, {dtype} on {used}: {mebibytes:.0f} MiB")
    seconds, plain = statistics.median(written), statistics.median(alone)
    print(f"copied and written in {seconds:.2f} s ({mebibytes / seconds:.0f} MiB/s)")
    print(f"the run waited {statistics.median(waited):.3f} s: {statistics.median(shares):.1%} of that (goal: 10%)")
    print(f"a step with a checkpoint takes {statistics.median(slower):.2f} x one without ({plain:.2f} s)")


if __name__ == "__main__":
    typer.run(main)
