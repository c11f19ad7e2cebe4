"""The checks that only a GPU can make, in one command; writes what they print to one Markdown file.

    python tools/gpu_campaign.py [--rollouts RUN_DIR --model DIR] [--minutes 10] [--out benchmarks/results/DATE-GPU.md]

`--rollouts` is a run of the demo with routing.replay=r3 (its rollouts hold the servers' log-probs and routes), and
`--model` the cold start that it began from. With them the trainer itself runs on the GPU, without servers: GSPO's
updates on the same batches, live, under R2 and under R3, and the two counterfactual commands.

Checks run side by side, except those that are timed. A check that fails does not stop the others; the exit status is
the number of those that failed. With a second GPU the checks have more layouts; with Transformer Engine installed those
in bf16 use its layers. With SGLang installed, runs with a server sync weights to it and measure what R3 costs. What is
left out, and why, stands at the top of the file.

`--device cpu` tries the campaign itself where no GPU is: the same commands, with small models.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from megatron_rl.cores import threads_per_process, usable_cores
from megatron_rl.lab.run import read_metrics

ROOT = Path(__file__).parent.parent
CLI = ("-m", "megatron_rl")
DEMO = ROOT / "megatron_rl" / "demo"
Device = Literal["cuda", "cpu"]
MISSING = "missing"
PRINTED_LINES = 60
"""Last lines of a check's output that the file keeps."""

METRICS = (
    "grad_norm",
    "loss",
    "ratio/max",
    "abs_log_sequence_ratio/max",
    "abs_logprob_gap/mean",
    "abs_logprob_gap/max",
    "rho/beyond_2",
    "routing/set_mismatch/rollout_old/effective/mean",
    "routing/set_mismatch/rollout_old/live/mean",
    "routing/set_mismatch/old_policy/effective/mean",
    "routing/set_mismatch/old_policy/live/mean",
    "routing/set_mismatch/rerun/mean",
    "time/weight_sync",
    "time/turns",
    "weights/bytes",
    "weights/probe_max_abs_diff",
    "weights/sampled_mean_abs_diff",
)
"""What the file says of a training run: its first two mini-batches and its last one."""


@dataclass(frozen=True)
class Check:
    name: str
    command: tuple[str, ...]
    seconds: float = 180.0
    timed: bool = False
    run_dir: Path | None = None
    """Run whose metrics follow the output."""


@dataclass(frozen=True)
class Outcome:
    check: Check
    status: int | None  # None: out of time
    seconds: float
    output: str

    @property
    def failed(self) -> bool:
        return self.status != 0


def layouts(gpus: int) -> list[str]:
    """Options of `parity` and `certify`."""
    wanted = ["tp=1"] + (["tp=2", "tp=2,ep=2", "pp=2", "cp=2", "ep=2"] if gpus >= 2 else [])
    return [word for layout in wanted for word in ("--layout", layout)]


def parity(work: Path, gpus: int, device: Device) -> Iterator[Check]:
    tokens = work / "tokens.jsonl"
    for dtype in ("fp32", "bf16"):
        for recompute in ("none", "full"):
            flags = ("--model", str(work / "random"), "--tokens", str(tokens), "--dtype", dtype)
            command = (*CLI, "parity", *flags, "--recompute", recompute, "--device", device, *layouts(gpus))
            yield Check(f"parity, {dtype}, recompute {recompute}", command)


def certificates(gpus: int, device: Device) -> Iterator[Check]:
    for dtype in ("fp32", "bf16"):
        yield Check(f"certify, {dtype}", (*CLI, "certify", "--dtype", dtype, "--device", device, *layouts(gpus)))


def training(work: Path, model: Path, rollouts: Path, device: Device) -> Iterator[Check]:
    """The trainer on saved rollouts, in both precisions and all routing modes, and its counterfactuals."""
    common = (f"engine.device={device}", f"model.path={model}", f"rollout.replay_from={rollouts}")
    common += ("data.heldout=null", "weights.verify=0", "eval.every=0", "train.steps=3", "optim.decay_steps=240")
    for dtype in ("fp32", "bf16"):
        for replay in ("none", "r2", "r3"):
            run_dir = work / f"{dtype}-{replay}"
            keys = (f"engine.dtype={dtype}", f"routing.replay={replay}", f"run_dir={run_dir}", "routing.noise_floor=1")
            command = (*CLI, "train", str(DEMO / "gspo.yaml"), *common, *keys)
            yield Check(f"train, {dtype}, replay {replay}", command, run_dir=run_dir)
    for name, dtype, flags in (
        ("attribute", "fp32", ()),
        ("replay-study", "bf16", shlex.split("--updates 2 --routing none --routing r2 --routing r3 --objective own")),
    ):
        keys = (f"engine.dtype={dtype}", f"run_dir={work / name}")
        yield Check(f"{name}, {dtype}", (*CLI, name, str(DEMO / "gspo.yaml"), *common, *keys, *flags))


def fine_tuning(work: Path, device: Device) -> Iterator[Check]:
    keys = (f"engine.device={device}", f"model.path={work / 'demo'}", f"run_dir={work / 'sft'}", "steps=10")
    yield Check("sft, fp32", (*CLI, "sft", str(DEMO / "sft.yaml"), *keys), run_dir=work / "sft")


def tests() -> Iterator[Check]:
    yield Check("tests of a GPU", ("-m", "pytest", "-q", "-m", "gpu", "tests/ranks/test_engine_layers.py"))


def throughput(device: Device) -> Iterator[Check]:
    """Tokens a second and share of the hardware's arithmetic, and memory beside its plan."""
    long = "--sequences 32 --rows 8 --response-tokens 2048"
    cases = [
        ("1b", "bf16", long),
        ("100m", "bf16", "--sequences 64 --rows 16 --response-tokens 1024"),
        ("1b", "bf16", f"{long} --recompute full"),
        ("100m", "fp32", "--sequences 16 --rows 16 --response-tokens 512"),
    ]
    if installed("transformer-engine") != MISSING:
        cases.insert(1, ("1b", "bf16", f"{long} --layers torch"))
    if device == "cpu":
        cases = [("demo", "fp32", ""), ("demo", "fp32", "--rows 32 --recompute full")]
    for size, dtype, flags in cases:
        command = ("benchmarks/train_throughput.py", "--device", device, "--size", size, "--dtype", dtype)
        name = f"throughput, {size}, {dtype}"
        name += ", full recompute" if "full" in flags else ", plain PyTorch" if "torch" in flags else ""
        yield Check(name, (*command, *shlex.split(flags), "--repeats", "3"), timed=True)


def servers(work: Path, gpus: int, device: Device) -> Iterator[Check]:
    """Two steps of training with a server, whose weights are verified after each; and the cost of R3. A coin's rewards
    train the random model, whose answers are all wrong."""
    keys = (f"engine.device={device}", "routing.replay=r3", "data.heldout=null", "eval.every=0", "train.steps=2")
    keys += (f"model.path={work / 'demo'}", "rollout.prompts_per_step=8", "weights.verify=1")
    keys += ("data.verifier=megatron_rl.demo.coin:toss", "optim.lr=1e-3", "optim.warmup_steps=0")
    shared = "rollout.servers.extra_flags=[--base-gpu-id=0,--mem-fraction-static=0.3]"
    cases = [("on the trainer's GPU, by disk", ("weights.route=disk", *([shared] if device == "cuda" else [])))]
    if gpus >= 2:
        cases.append(("on a second GPU, by broadcast", ("weights.route=collective",)))
    for number, (name, more) in enumerate(cases):
        run_dir = work / f"sync-{number}"
        command = (*CLI, "train", str(DEMO / "gspo.yaml"), *keys, *more, f"run_dir={run_dir}")
        yield Check(f"weight sync to a server {name}", command, timed=True, run_dir=run_dir)
    dtype = "bf16" if device == "cuda" else "fp32"
    shares = (
        "rollout.servers.colocate=true",
        "weights.route=ipc",
        f"engine.dtype={dtype}",
        f"run_dir={work / 'shared'}",
    )
    command = ("benchmarks/shared_gpu.py", str(DEMO / "gspo.yaml"), *keys, *shares)
    yield Check("a GPU shared in turns", command, timed=True, run_dir=work / "shared")
    command = ("benchmarks/replay_cost.py", "--device", device, "--dtype", dtype, "--repeats", "3")
    yield Check("cost of R3", command, seconds=300, timed=True)


def run(check: Check, deadline: float, threads: int) -> Outcome:
    limit = min(check.seconds, deadline - time.monotonic())
    start = time.monotonic()
    if limit <= 0:
        return Outcome(check, None, 0.0, "not started: the campaign's time was over\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(threads),
    }
    process = subprocess.Popen(
        (sys.executable, *check.command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        status = None
    return Outcome(check, status, time.monotonic() - start, output)


def run_all(checks: list[Check], deadline: float, at_once: int) -> Iterator[Outcome]:
    beside = [c for c in checks if not c.timed]
    with ThreadPoolExecutor(at_once) as pool:
        for outcome in pool.map(lambda check: run(check, deadline, threads_per_process(at_once)), beside):
            yield say(outcome)
    for check in checks:
        if check.timed:
            yield say(run(check, deadline, usable_cores()))


def say(outcome: Outcome) -> Outcome:
    print(f"{verdict(outcome):8} {outcome.seconds:5.0f} s  {outcome.check.name}", flush=True)
    if outcome.failed:
        print("\n".join(outcome.output.splitlines()[-12:]), flush=True)
    return outcome


def verdict(outcome: Outcome) -> str:
    return {0: "passed", None: "no time"}.get(outcome.status, "FAILED")


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return MISSING


def header(device: Device) -> str:
    packages = ("torch", "megatron-core", "transformers", "triton", "transformer-engine", "sglang")
    return "\n".join(
        (
            f"# {datetime.date.today()}, {name_of(device)}",
            "",
            f"{hardware(device)}, Python {platform.python_version()}; "
            + ", ".join(f"{name} {installed(name)}" for name in packages),
            "",
            "    " + shlex.join(("python", *sys.argv)),
            "",
        )
    )


def name_of(device: Device) -> str:
    return torch.cuda.get_device_name(0) if device == "cuda" else "CPU"


def hardware(device: Device) -> str:
    if device == "cpu":
        return f"{usable_cores()} cores"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.device_count()} GPU of {memory:.0f} GiB, CUDA {torch.version.cuda}"


def has_servers() -> bool:
    return importlib.util.find_spec("sglang") is not None


def left_out(gpus: int) -> Iterator[str]:
    if installed("transformer-engine") == MISSING:
        yield "Transformer Engine is not installed: all layers are those in plain PyTorch.\n"
    if gpus < 2:
        yield "One GPU: no layout with several ranks, and no weight sync by broadcast.\n"
    if not has_servers():
        yield "SGLang is not installed: neither weight sync nor the cost of R3 was measured.\n"


def metrics_of(run_dir: Path) -> str:
    lines = read_metrics(run_dir / "metrics.jsonl")
    chosen = [lines[i] for i in sorted({0, min(1, len(lines) - 1), len(lines) - 1})]
    rows = [" " * 52 + "".join(f"{'step ' + str(d['step']) + '.' + str(d.get('mini_batch', 0)):>14}" for d in chosen)]
    for name in METRICS:
        if any(name in line for line in chosen):
            values = (line.get(name) for line in chosen)
            rows.append(f"{name:52}" + "".join(f"{'' if v is None else format(v, '.5g'):>14}" for v in values))
    return "\n".join(rows) + "\n"


def section(outcome: Outcome) -> str:
    lines = [line.rsplit("\r", 1)[-1] for line in outcome.output.splitlines()]
    kept = [line for line in lines if line.strip() and "Warning" not in line and "it/s]" not in line]
    text = "\n".join(kept[-PRINTED_LINES:])
    run_dir = outcome.check.run_dir
    if run_dir is not None and (run_dir / "metrics.jsonl").is_file():
        text += "\n\n" + metrics_of(run_dir)
    body = "\n".join("    " + line for line in text.splitlines())
    command = shlex.join(("python", *outcome.check.command))
    return f"## {outcome.check.name}: {verdict(outcome)}, {outcome.seconds:.0f} s\n\n    {command}\n\n{body}\n"


def make_inputs(work: Path) -> None:
    """The models and tokens that the checks read."""
    from megatron_rl.demo.demo_model import make_demo_model
    from megatron_rl.models.random_model import make_random_model

    make_random_model(work / "random", vocab_size=512)
    make_demo_model(work / "demo")
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 33, 64, 100, 128, 90)
    sequences = [torch.randint(0, 512, (n,), generator=generator).tolist() for n in lengths]
    (work / "tokens.jsonl").write_text("".join(json.dumps(ids) + "\n" for ids in sequences))


def main(
    rollouts: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Run with saved rollouts")] = None,
    model: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Model it began from")] = None,
    minutes: Annotated[float, typer.Option(min=0.5, help="Time for all checks together")] = 10.0,
    out: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/DATE-GPU.md")] = None,
    only: Annotated[str, typer.Option(help="Checks whose name has this in it")] = "",
    device: Annotated[Device, typer.Option(help="cpu: the same commands with small models, to try them")] = "cuda",
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU; --device cpu tries the campaign with small models")
    if (rollouts is None) != (model is None):
        raise typer.BadParameter("--rollouts and --model belong together")
    deadline, gpus = time.monotonic() + 60 * minutes, torch.cuda.device_count() if device == "cuda" else 2
    name = name_of(device).split()[-1]
    out = (out or ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{name}.md").absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        make_inputs(work)
        checks = [*tests(), *parity(work, gpus, device), *certificates(gpus, device), *fine_tuning(work, device)]
        if rollouts is not None and model is not None:
            checks += training(work, model.absolute(), rollouts.absolute(), device)
        checks += [*throughput(device), *(servers(work, gpus, device) if has_servers() else [])]
        checks = [check for check in checks if only in check.name]
        if not checks:
            raise typer.BadParameter(f"--only: no check has {only!r} in its name")
        at_once = max(1, usable_cores() * 2 // 3)
        sections, failed = [], 0
        for outcome in run_all(checks, deadline, at_once):
            sections.append(section(outcome))
            failed += outcome.failed
            out.write_text("\n".join([header(device), *left_out(gpus), *sections]))
    print(f"wrote {out}")
    raise typer.Exit(failed)


if __name__ == "__main__":
    typer.run(main)
